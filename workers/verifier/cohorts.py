"""Two cohorts of requests that take turns: one is verified while draft workers draft for the other.

Drafts for a request can only begin when its verification has ended, so a drafter elsewhere idles while the target computes, and
the target waits while the drafter does. Split in two, each half is drafted for under the verification of the other. Every
request still gets one round a cycle; whether a cycle gets shorter is a question of what steps and rounds cost. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

MIN_GAIN: Final = 1.05  # a cycle in two halves must be this much shorter than in one
DECIDE_EVERY: Final = 16  # steps

Seconds = Callable[[int], float]  # of that many requests


def pays(num_requests: int, verify_s: Seconds, draft_s: Seconds) -> bool:
    """Whether a cycle of two halves is predicted to be shorter than verifying all after drafting for all."""
    if num_requests < 2:
        return False
    small, large = num_requests // 2, num_requests - num_requests // 2
    halves = max(verify_s(large), draft_s(small)) + max(verify_s(small), draft_s(large))
    return halves * MIN_GAIN < verify_s(num_requests) + draft_s(num_requests)


@dataclass(slots=True)
class Cohorts:
    """Who takes part in a step. Requests keep their cohort; new ones join the smaller. ``forced`` decides instead of the prediction."""

    is_split: bool = False
    forced: bool | None = None
    _cohort: dict[str, int] = field(default_factory=dict)
    _turn: int = 0
    _steps: int = 0
    _decided_for: int = 0  # requests

    def choose(self, request_ids: Sequence[str], verify_s: Seconds, draft_s: Seconds) -> set[str]:
        """Those of the decoding requests that take part in this step."""
        if self.forced is not None:
            self.is_split = self.forced
        elif self._is_due(len(request_ids)):
            self.is_split = pays(len(request_ids), verify_s, draft_s)
        self._steps += 1
        if not self.is_split or len(request_ids) < 2:
            return set(request_ids)
        self._assign(request_ids)
        self._turn = 1 - self._turn
        return {request_id for request_id in request_ids if self._cohort[request_id] == self._turn}

    def _is_due(self, num_requests: int) -> bool:
        """Whether to decide anew: now and then, and when there are more than twice or less than half as many requests."""
        is_other = not self._decided_for <= 2 * num_requests <= 4 * self._decided_for
        if is_other or self._steps % DECIDE_EVERY == 0:
            self._decided_for = num_requests
            return True
        return False

    def _assign(self, request_ids: Sequence[str]) -> None:
        """A cohort for everybody; when one has no members left the other is split."""
        self._cohort = {request_id: self._cohort[request_id] for request_id in request_ids if request_id in self._cohort}
        if len(set(self._cohort.values())) < 2:
            self._cohort = {request_id: place % 2 for place, request_id in enumerate(self._cohort)}
        for request_id in request_ids:
            if request_id not in self._cohort:
                members = list(self._cohort.values())
                self._cohort[request_id] = int(members.count(0) > members.count(1))
