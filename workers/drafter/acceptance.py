"""A running estimate of how often copied tokens are accepted.

Every (bucket, position in the draft) has a Beta-like posterior: the mean of its observed outcomes and of a prior worth
``PRIOR_WEIGHT`` observations. Old observations fade once a place holds ``MAX_WEIGHT`` of them, so that the estimate follows
the traffic.

An estimate is a function of committed tokens only, so it may rank drafts under both acceptance rules.
"""

from __future__ import annotations

from collections.abc import Sequence

PRIOR_WEIGHT = 8.0
MAX_WEIGHT = 400.0
EDGE = 1e-3  # estimates stay this far from 0 and 1


class AcceptanceEstimator:
    """P(draft token accepted | the draft tokens before it accepted), by place; always strictly between 0 and 1."""

    def __init__(self, prior: Sequence[Sequence[float]]) -> None:
        """``prior[bucket][position]`` is the estimate before anything was observed, in (0, 1)."""
        if any(not 0 < p < 1 for row in prior for p in row):
            raise ValueError("a prior must be a probability between 0 and 1, both excluded")
        self._hits = [[p * PRIOR_WEIGHT for p in row] for row in prior]
        self._trials = [[PRIOR_WEIGHT] * len(row) for row in prior]

    def estimate(self, bucket: int) -> tuple[float, ...]:
        """Estimates of all positions of a draft in ``bucket``."""
        return tuple(hits / trials for hits, trials in zip(self._hits[bucket], self._trials[bucket], strict=True))

    def observe(self, bucket: int, position: int, was_accepted: bool) -> None:
        """Count one outcome; only call it when everything before ``position`` was accepted."""
        hits, trials = self._hits[bucket], self._trials[bucket]
        if trials[position] >= MAX_WEIGHT:
            keep = (MAX_WEIGHT - 1.0) / trials[position]
            hits[position] *= keep
            trials[position] *= keep
        trials[position] += 1.0
        # The prior's share fades with the rest, so only a bound keeps the estimate inside (0, 1) after a long run of equal outcomes.
        low, high = trials[position] * EDGE, trials[position] * (1.0 - EDGE)
        hits[position] = min(max(hits[position] + was_accepted, low), high)
