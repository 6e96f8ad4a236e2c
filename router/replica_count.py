"""The wanted number of replicas of one kind, and what became of the last change. Pure: time is an argument.

Replicas take a while to come and to go, and may never come. Until they have, nothing new is decided about them; those that
did not come in time are no longer wanted, and are not asked for again for as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ScalingState(StrEnum):
    """Why the count is what it is."""

    STEADY = "steady"
    SETTLING = "settling"  # too little was seen since the last change
    SCALING = "scaling"  # the last change is under way
    BLIND = "blind"  # data is missing; a missing number is no zero, so nothing is decided
    AT_LIMIT = "at limit"  # more are needed than may be
    NO_GAIN = "no gain"  # budgets are missed, but more replicas would not help
    UNSCHEDULABLE = "unschedulable"  # those that were asked for did not come


@dataclass(frozen=True, slots=True)
class CountRules:
    """Bounds and waits of one kind of replica."""

    min_count: int
    max_count: int
    up_cooldown_s: float
    down_cooldown_s: float
    start_timeout_s: float


class ReplicaCount:
    """``wanted`` replicas; ``changed_s`` is when that or the presence of one last changed by a decision."""

    def __init__(self, rules: CountRules) -> None:
        self.rules = rules
        self.wanted = 0  # nothing was seen yet
        self.changed_s = 0.0
        self._blocked_until_s = float("-inf")
        self._astray_since_s: float | None = None
        self._spare_since_s: float | None = None
        self._gave_up = False

    def is_blocked(self, now_s: float) -> bool:
        """Whether replicas did not come lately, so that asking for more is of no use."""
        return now_s < self._blocked_until_s

    def observe(self, present: int, now_s: float) -> ScalingState | None:
        """Note how many replicas are there; a state means that nothing can be decided now."""
        if not self.wanted:
            self._set(self._bounded(present), now_s)
        if present == self.wanted:
            self._gave_up = False
            if self._astray_since_s is not None:
                self.changed_s, self._astray_since_s = now_s, None  # what was seen while it changed is not of this count
            return None
        self._spare_since_s = None
        if self._astray_since_s is None:
            self._astray_since_s = now_s
        if now_s - self._astray_since_s < self.rules.start_timeout_s:
            return ScalingState.UNSCHEDULABLE if present < self.wanted and self._gave_up else ScalingState.SCALING
        if present < self.wanted:
            self._blocked_until_s, self._gave_up = now_s + self.rules.start_timeout_s, True
        self._astray_since_s = None
        state = ScalingState.UNSCHEDULABLE if present < self.wanted else ScalingState.SCALING
        self._set(self._bounded(present), now_s)
        return state

    def follow(self, present: int, now_s: float) -> None:
        """Take what is there for what is wanted: somebody else decides."""
        if present != self.wanted:
            self._set(present, now_s)

    def grow(self, count: int, now_s: float) -> None:
        """Want more."""
        self._set(self._bounded(count), now_s)

    def may_grow(self, now_s: float) -> bool:
        return now_s - self.changed_s >= self.rules.up_cooldown_s

    def shrink_if_spare(self, is_spare: bool, now_s: float) -> bool:
        """Want one less once one has been spare for all of the cooldown; whether that is now."""
        if not is_spare or self.wanted <= self.rules.min_count:
            self._spare_since_s = None
            return False
        if self._spare_since_s is None:
            self._spare_since_s = now_s
        if now_s - max(self._spare_since_s, self.changed_s) < self.rules.down_cooldown_s:
            return False
        self._set(self.wanted - 1, now_s)
        return True

    def _set(self, wanted: int, now_s: float) -> None:
        self.wanted, self.changed_s, self._spare_since_s = wanted, now_s, None

    def _bounded(self, count: int) -> int:
        return min(max(count, self.rules.min_count), self.rules.max_count)
