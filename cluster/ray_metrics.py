"""A handful of our figures as metrics of Ray, so that they stand beside Serve's own in the Ray dashboard and its Prometheus.

Everything is at ``/metrics`` of the router (``cluster/http/metering.py``); this is the part that an operator of Ray looks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray.serve import metrics

from dspark.router.replica_count import ScalingState
from dspark.router.scaling import Decision
from dspark.types import SpeculationState
from dspark.workers.wire.codec import Status


class RayMetrics:
    """Gauges of one router replica; Ray adds the application, the deployment and the replica to their tags."""

    def __init__(self) -> None:
        self._gauges: dict[str, metrics.Gauge] = {}

    def update(self, statuses: Iterable[Status], in_flight: int, decision: Decision) -> None:
        """Show the cluster as it is now."""
        statuses = list(statuses)
        self._set("dspark_verifiers", "Verifiers that make progress.", sum(status.healthy for status in statuses))
        self._set("dspark_wanted_verifiers", "Verifiers that the scaling policy wants.", decision.wanted)
        self._set("dspark_in_flight", "Choices that are generated for this router's clients.", in_flight)
        self._set("dspark_speculation_limit", "Share of the longest draft that may be verified.", decision.speculation_limit)
        if decision.met is not None:
            self._set("dspark_budgets_met", "Share of recent requests that kept their latency budgets.", decision.met)
        for state in ScalingState:
            self._set("dspark_scaling_state", "1 for the state of the scaling policy.", state is decision.state, state=state.value)
        for status in statuses:
            view = status.view
            used = 1.0 - view.free_blocks / view.num_blocks if view.num_blocks else 0.0
            idle = view.speculation is SpeculationState.INACTIVE
            self._set("dspark_requests_running", "Requests that run at a verifier.", view.running, verifier=view.id)
            self._set("dspark_requests_waiting", "Requests that wait at a verifier.", view.queued, verifier=view.id)
            self._set("dspark_kv_cache_usage", "Share of the KV blocks in use.", used, verifier=view.id)
            self._set("dspark_tokens_per_round", "Tokens that a request gets a round.", view.tokens_per_round, verifier=view.id)
            self._set("dspark_speculation_inactive", "1 where speculation was asked for and no drafts come.", idle, verifier=view.id)

    def _set(self, name: str, text: str, value: float, **tags: str) -> None:
        if name not in self._gauges:
            keys: Any = tuple(tags)  # annotated as a tuple of one
            self._gauges[name] = metrics.Gauge(name, description=text, tag_keys=keys)
        self._gauges[name].set(float(value), tags)
