"""How many draft workers there should be. Pure: time is an argument.

A draft that comes too late costs speed and nothing else, so the measure is the share of drafts that verifiers asked for and did
not get in time, together with how busy the workers are: late drafts of idle workers are the network's fault, and more workers
would not help.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dspark.router.replica_count import CountRules, ReplicaCount, ScalingState

MAX_REPORT_AGE_S: Final = 30.0
MANY_LATE: Final = 0.10
FEW_LATE: Final = 0.03
BUSY: Final = 0.7  # share of the time; from here on queueing makes drafts late
AIM_BUSY: Final = 0.55
SPARE_BUSY: Final = 0.5  # predicted for the others before one is removed


@dataclass(frozen=True, slots=True)
class DraftReport:
    """One draft worker at one moment. ``asked`` and ``in_time`` count drafts since its start, ``busy_s`` seconds of drafting."""

    worker_id: str
    asked: float
    in_time: float
    busy_s: float
    up_s: float
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DraftDecision:
    wanted: int
    state: ScalingState
    reason: str


class DraftScaler:
    """Call ``decide`` whenever new reports came."""

    def __init__(self, rules: CountRules, window_s: float, min_asked: int) -> None:
        self.count = ReplicaCount(rules)
        self._window_s = window_s
        self._min_asked = min_asked
        self._history: deque[tuple[float, dict[str, DraftReport]]] = deque()

    def decide(self, now_s: float, reports: Sequence[DraftReport]) -> DraftDecision:
        """How many to want from now on."""
        silent = [report.worker_id for report in reports if report.age_s > MAX_REPORT_AGE_S]
        if silent or not reports:
            return self._hold(ScalingState.BLIND, f"no word of {', '.join(silent) or 'any draft worker'}")
        self._history.append((now_s, {report.worker_id: report for report in reports}))
        while self._history[0][0] < now_s - self._window_s:
            self._history.popleft()
        state = self.count.observe(len(reports), now_s)
        if state is not None:
            return self._hold(state, f"{len(reports)} draft workers are there, {self.count.wanted} are wanted")
        asked, late, busy = self._window(now_s, reports)
        if asked >= self._min_asked and late > MANY_LATE:
            return self._help(now_s, late, busy)
        fewer = self.count.wanted - 1
        spare = fewer > 0 and late <= FEW_LATE and busy * self.count.wanted / fewer <= SPARE_BUSY
        if self.count.shrink_if_spare(spare, now_s):
            return self._hold(ScalingState.SCALING, f"workers are {busy:.0%} busy; {fewer} are enough")
        return self._hold(ScalingState.STEADY, f"{late:.1%} of {asked:.0f} drafts came late; workers are {busy:.0%} busy")

    def _help(self, now_s: float, late: float, busy: float) -> DraftDecision:
        count = self.count
        count.shrink_if_spare(False, now_s)
        told = f"{late:.0%} of the drafts came late; workers are {busy:.0%} busy"
        if busy < BUSY:
            return self._hold(ScalingState.NO_GAIN, told)
        if count.is_blocked(now_s):
            return self._hold(ScalingState.UNSCHEDULABLE, told)
        if count.wanted >= count.rules.max_count:
            return self._hold(ScalingState.AT_LIMIT, told)
        if not count.may_grow(now_s):
            return self._hold(ScalingState.SETTLING, told)
        count.grow(min(math.ceil(count.wanted * busy / AIM_BUSY), 2 * count.wanted), now_s)
        return self._hold(ScalingState.SCALING, f"{told}; {count.wanted} are wanted")

    def _window(self, now_s: float, reports: Sequence[DraftReport]) -> tuple[float, float, float]:
        """(drafts asked for, share that came late, mean busy share) since the last change, as far as the window goes."""
        first_s, first = next(entry for entry in self._history if entry[0] >= min(self.count.changed_s, now_s))
        asked = in_time = busy = 0.0
        for report in reports:
            before = first.get(report.worker_id)
            if before is None or report.asked < before.asked:  # it came in between, or was replaced: all it did is new
                before = DraftReport(report.worker_id, 0.0, 0.0, 0.0, 0.0)
            asked += report.asked - before.asked
            in_time += report.in_time - before.in_time
            busy += (report.busy_s - before.busy_s) / max(min(now_s - first_s, report.up_s), 1.0)
        return asked, 1.0 - in_time / asked if asked else 0.0, busy / len(reports)

    def _hold(self, state: ScalingState, reason: str) -> DraftDecision:
        return DraftDecision(self.count.wanted, state, reason)
