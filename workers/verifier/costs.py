"""Step-cost table: seconds of one verify step by tokens, and of one draft round by requests (DSpark section 3.2, SPS(B))."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Curve:
    """A monotone, piecewise linear cost: ``seconds[i]`` at ``sizes[i]``; beyond the last size the last slope goes on."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    @staticmethod
    def fit(points: Sequence[tuple[int, float]]) -> Curve:
        """The smallest non-decreasing curve through measured points (a cheaper larger step caps the smaller ones).

        A step can always be padded, so a size never costs more than a larger one was measured to cost.
        """
        ordered = sorted(points)
        seconds = [s for _, s in ordered]
        for i in range(len(seconds) - 2, -1, -1):
            seconds[i] = min(seconds[i], seconds[i + 1])
        return Curve(tuple(size for size, _ in ordered), tuple(seconds))

    def __call__(self, size: int) -> float:
        """Seconds at ``size`` (at least the first measured size)."""
        sizes, seconds = self.sizes, self.seconds
        if len(sizes) == 1:
            return seconds[0]
        right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (sizes[right] - sizes[left])
        return max(seconds[0], seconds[left] + slope * (size - sizes[left]))


@dataclass(frozen=True, slots=True)
class CostTable:
    """What a step costs on this engine."""

    verify: Curve
    draft: Curve

    def step_seconds(self, num_tokens: int, num_drafting: int) -> float:
        """Seconds of a step that verifies ``num_tokens`` after a draft round of ``num_drafting`` requests."""
        return self.verify(num_tokens) + (self.draft(num_drafting) if num_drafting else 0.0)
