"""The loop that follows latency budgets: once a second it asks the scaling policy, and tells verifiers what it decided.

Verifiers limit their speculation by it and repeat the wanted number of verifiers to Serve (``cluster/autoscaling.py``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from dspark.cluster.fleet import Fleet
from dspark.cluster.http.budgets import Ledger
from dspark.config import ServeConfig
from dspark.router.replica_count import CountRules
from dspark.router.scaling import Decision, Report, Rules, VerifierScaler
from dspark.types import LatencyBudget
from dspark.workers.wire.codec import Tune

PERIOD_S: Final = 1.0

_log = logging.getLogger(__name__)


def rules_of(config: ServeConfig) -> Rules:
    """What the configuration says of scaling. A fixed number of verifiers has nothing but the limit on speculation."""
    scale = config.autoscale
    is_fixed = scale.max_verifiers is None
    return Rules(
        count=CountRules(
            min_count=scale.min_verifiers,
            max_count=scale.max_verifiers or config.num_verifiers,
            up_cooldown_s=scale.up_cooldown_s,
            down_cooldown_s=scale.down_cooldown_s,
            start_timeout_s=scale.start_timeout_s,
        ),
        target_met=scale.target_met,
        window_s=scale.scaling_window_s,
        min_samples=scale.scaling_min_samples,
        cold_start_s=scale.cold_start_s,
        default_budget=LatencyBudget() if is_fixed else LatencyBudget(scale.default_ttft_ms, scale.default_tpot_ms),
        speculation_lever=scale.speculation_lever,
        is_fixed=is_fixed,
    )


class Steering:
    """Runs beside one router. ``decision`` is the last one; ``after`` is called with each."""

    def __init__(self, fleet: Fleet, ledger: Ledger, rules: Rules, after: Callable[[Decision], None] = lambda _: None) -> None:
        self.decision: Decision | None = None
        self._fleet = fleet
        self._ledger = ledger
        self._scaler = VerifierScaler(rules)
        self._is_fixed = rules.is_fixed
        self._after = after

    async def run(self) -> None:
        """Decide once a second, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                self._after(self.decide(time.monotonic()))
            except Exception:  # noqa: BLE001 - the loop must go on; what failed is in the log
                _log.exception("no decision about scaling this time")

    def decide(self, now_s: float) -> Decision:
        """Decide and tell the verifiers. The time is of the clock of ``time.monotonic``."""
        reports = [Report(s.view, s.healthy, self._fleet.joined_s(s.view.id)) for s in self._fleet.statuses]
        decision = self._scaler.decide(now_s, reports, self._ledger.take(now_s))
        before, self.decision = self.decision, decision
        if before is None or (before.wanted, before.speculation_limit) != (decision.wanted, decision.speculation_limit):
            _log.info("%d verifiers, speculation limit %g: %s", decision.wanted, decision.speculation_limit, decision.reason)
        self._fleet.tune(Tune(decision.speculation_limit, 0 if self._is_fixed else decision.wanted))
        return decision
