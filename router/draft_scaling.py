"""How many draft workers there should be. Pure: time is an argument.

A draft that comes too late costs speed and nothing else, so workers are kept below the load at which queueing makes drafts
late: by the share of time that they draft, and by the share of requests that they refuse for lack of room.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dspark.drafting import FULL_RETRY_S
from dspark.router.replica_count import CountRules, ReplicaCount, ScalingState

MAX_REPORT_AGE_S: Final = 30.0
BUSY: Final = 0.7  # share of the time; a draft then waits more than twice as long as it takes
AIM_BUSY: Final = 0.55
SPARE_BUSY: Final = 0.5  # predicted for the others before one is removed
MANY_REFUSED: Final = 0.02  # of the requests
FAILED_SHARE: Final = 0.8  # a count that failed is tried again under this share of the work with which it failed,
FAILED_MEMORY: Final = 10.0  # or after this many down cooldowns


@dataclass(frozen=True, slots=True)
class DraftReport:
    """One draft worker at one moment.

    ``busy_s``: seconds that it drafted, ``turns`` and ``refused``: turns that it took and refused, all since its start;
    ``requests``: that it holds now.
    """

    worker_id: str
    busy_s: float
    turns: float
    refused: float
    requests: float = 0.0
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DraftDecision:
    """How many draft workers are wanted, and why."""

    wanted: int
    state: ScalingState
    reason: str


class DraftScaler:
    """Call ``decide`` whenever new reports came."""

    def __init__(self, rules: CountRules, window_s: float) -> None:
        self.count = ReplicaCount(rules)
        self._window_s = window_s
        self._failed: dict[int, tuple[float, float]] = {}  # count: when it was too small, and seconds of drafting a second then
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
        seen_s = now_s - max(self.count.changed_s, self._history[0][0])
        if seen_s < min(self.count.rules.up_cooldown_s, self._window_s / 2):
            return self._hold(ScalingState.SETTLING, f"{seen_s:.0f} s since the last change")
        busy, refused = self._window(reports)
        told = f"workers draft {busy:.0%} of the time and have no room for {refused:.1%} of the requests"
        if busy > BUSY or refused > MANY_REFUSED:
            return self._help(now_s, busy, told)
        fewer = self.count.wanted - 1
        total = busy * self.count.wanted
        can_do_without = fewer > 0 and not refused and total / fewer <= SPARE_BUSY and not self._failed_near(fewer, total, now_s)
        if self.count.shrink_if_spare(can_do_without, now_s):
            return self._hold(ScalingState.SCALING, f"{told}; {fewer} are enough")
        return self._hold(ScalingState.STEADY, told)

    def _help(self, now_s: float, busy: float, told: str) -> DraftDecision:
        count = self.count
        count.shrink_if_spare(False, now_s)
        if count.is_blocked(now_s):
            return self._hold(ScalingState.UNSCHEDULABLE, told)
        if count.wanted >= count.rules.max_count:
            return self._hold(ScalingState.AT_LIMIT, told)
        self._failed[count.wanted] = (now_s, busy * count.wanted)
        enough = max(math.ceil(count.wanted * busy / AIM_BUSY), count.wanted + 1)
        count.grow(min(enough, 2 * count.wanted), now_s)
        return self._hold(ScalingState.SCALING, f"{told}; {count.wanted} are wanted")

    def _failed_near(self, count: int, total_busy: float, now_s: float) -> bool:
        """Whether that many were too few not long ago, with nearly the present work."""
        failed_s, failed_busy = self._failed.get(count, (float("-inf"), 0.0))
        return now_s - failed_s < FAILED_MEMORY * self.count.rules.down_cooldown_s and total_busy > FAILED_SHARE * failed_busy

    def _window(self, reports: Sequence[DraftReport]) -> tuple[float, float]:
        """(Mean busy share, share of requests without room) since the last change, as far as the window goes.

        A request without room is refused again every ``FULL_RETRY_S``.
        """
        entries = [entry for entry in self._history if entry[0] >= self.count.changed_s]
        (first_s, first), last_s = entries[0], entries[-1][0]
        busy_s = refused = 0.0
        for report in reports:
            before = first.get(report.worker_id)
            if before is None or report.turns < before.turns or report.busy_s < before.busy_s:
                before = DraftReport(report.worker_id, 0.0, 0.0, 0.0)  # it was replaced in between: all that it counts is new
            busy_s += report.busy_s - before.busy_s
            refused += report.refused - before.refused
        span_s = max(last_s - first_s, 1e-9)
        without_room = refused * FULL_RETRY_S / span_s
        held = sum(report.requests for _, entry in entries for report in entry.values()) / len(entries)
        return busy_s / span_s / len(reports), without_room / max(without_room + held, 1.0)

    def _hold(self, state: ScalingState, reason: str) -> DraftDecision:
        return DraftDecision(self.count.wanted, state, reason)
