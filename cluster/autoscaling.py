"""Serve's custom autoscaling policies: thin adapters that want what ``router/`` decided. Serve owns the counts.

The routers decide about verifiers (``cluster/steering.py``): they alone see what clients see, and every view. Serve's policies
see only what the replicas of their own deployment report, so routers tell the verifiers, and the newest that any of them
repeats is taken. Draft workers report how busy they are, and their policy decides here.

Serve's controller calls a policy about nine times a second on the same reports, pickles this module by value, and leaves the
application deploying for ever if a policy raises: so a report is used once, nothing heavy is imported, and everything is caught.
"""

from __future__ import annotations

import logging
from typing import Any

from dspark.router.draft_scaling import DraftReport, DraftScaler
from dspark.router.replica_count import CountRules

MAX_REPORT_AGE_S = 15.0  # replicas report every second or, without our settings, every ten
LOOK_BACK_S = 5.0
WANTED = "wanted_verifiers"
BUSY, TURNS, REFUSED, REQUESTS = "draft_seconds_total", "turns_total", "refused_turns_total", "num_requests"

_log = logging.getLogger("ray.serve")


class WantedVerifiers:
    """The number of verifiers that the routers want; as many as now while nobody has said lately."""

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        try:
            return self._decide(context), {}
        except Exception:  # noqa: BLE001 - an exception in a policy wedges the application
            _log.exception("the number of verifiers stays as it is")
            return context.target_num_replicas, {}

    def _decide(self, context: Any) -> int:
        fresh = [value for value, age_s in newest(context, WANTED).values() if age_s <= MAX_REPORT_AGE_S and value > 0]
        return round(max(fresh)) if fresh else int(context.target_num_replicas)


class BusyDraftWorkers:
    """The number of draft workers by ``DraftScaler``, asked once for each new report."""

    def __init__(self, rules: dict[str, Any], window_s: float) -> None:
        self._scaler = DraftScaler(CountRules(**rules), window_s)
        self._seen_s = 0.0
        self._wanted = 0

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        try:
            return self._decide(context), {}
        except Exception:  # noqa: BLE001 - an exception in a policy wedges the application
            _log.exception("the number of draft workers stays as it is")
            return context.target_num_replicas, {}

    def _decide(self, context: Any) -> int:
        busy, turns, refused, held = (newest(context, name) for name in (BUSY, TURNS, REFUSED, REQUESTS))
        newest_s = max((context.current_time - age_s for _, age_s in busy.values()), default=0.0)
        if newest_s > self._seen_s:
            self._seen_s = newest_s
            unknown = (0.0, float("inf"))
            reports = []
            for name in (replica.unique_id for replica in context.running_replicas):
                figures = [values.get(name, unknown)[0] for values in (busy, turns, refused, held)]
                reports.append(DraftReport(name, figures[0], figures[1], figures[2], figures[3], busy.get(name, unknown)[1]))
            decision = self._scaler.decide(context.current_time, reports)
            if decision.wanted != self._wanted:
                _log.info("%d draft workers are wanted: %s", decision.wanted, decision.reason)
            self._wanted = decision.wanted
        return self._wanted or int(context.target_num_replicas)


def newest(context: Any, name: str) -> dict[str, tuple[float, float]]:
    """The last value of a metric and its age in seconds, by running replica; replicas that never reported it are absent."""
    series = (context.raw_metrics or {}).get(name, {})
    running = {replica.unique_id for replica in context.running_replicas}
    return {
        replica.unique_id: (float(points[-1].value), context.current_time - points[-1].timestamp)
        for replica, points in series.items()
        if points and replica.unique_id in running
    }
