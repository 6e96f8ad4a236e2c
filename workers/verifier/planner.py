"""Which drafted tokens to verify: the hardware-aware prefix scheduler (DSpark section 3.2).

Pure functions of survival probabilities (``survival.py``) and step costs::

    survival   [R, n]   of R requests' nodes in order, never rising along a row; 0 where there is none
    seconds    [k + 1]  of a step that verifies 0 .. k drafted tokens
    theta      (rows + sum of admitted survivals) / seconds[admitted]: expected tokens a second

Tokens are admitted in order of survival; what has to be found is how many. Three ways, each lossless where it is used:

* ``early_stop`` (Algorithm 1): up to the first token that does not raise theta. The admission of a token then never depends
  on the token itself through the confidence of its successors.
* ``best_count`` over the fresh ranking: the best of the whole curve, for steps whose texts no schedule can bias (greedy and
  coupled requests, and drafts that are a function of the history alone: docs/adr/003).
* ``best_count`` over a ranking that is two steps old gives a budget for the fresh ranking (section 5.2): old data for how
  many, fresh data for which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark.workers.verifier.costs import Floats

MIN_GAIN = 0.01  # predicted relative gain below which a longer plan is noise
LEVELS = 65535.0  # survival is compared in steps of 1 / LEVELS: 16-bit keys sort three times as fast as floats
GRID = 24  # admitted counts that are looked at to keep latency budgets


@dataclass(frozen=True, slots=True)
class Ranking:
    """Drafted tokens best first: ``survival`` [N]; ties go by position, then request, never by value.

    ``place`` [N] is position * num_requests + request.
    """

    survival: Floats
    place: NDArray[np.int64]
    num_requests: int

    def lengths(self, count: int) -> NDArray[np.int64]:
        """How many nodes of each request [R] are among the best ``count``: always the first ones of its list."""
        return np.bincount(self.place[:count] % self.num_requests, minlength=self.num_requests)

    def down_to(self, depth: int) -> Ranking:
        """Only the first ``depth`` positions of every request."""
        chosen = self.place < depth * self.num_requests
        return Ranking(self.survival[chosen], self.place[chosen], self.num_requests)


def rank(survival: Floats) -> Ranking:
    """Order all nodes of survival [R, n]."""
    values = survival.T.ravel()  # position by position: a stable sort then breaks ties by place
    keys = 1.0 - values
    keys *= LEVELS
    order = keys.astype(np.uint16).argsort(kind="stable")
    best = values.take(order)
    if best.size and survival[:, -1].min() > 0.0:
        return Ranking(best, order, len(survival))
    is_node = best > 0.0
    return Ranking(best[is_node], order[is_node], len(survival))


def _theta(ranking: Ranking, num_rows: int, seconds: Floats) -> Floats:
    """Expected tokens a second [m + 1] with the best 0 .. m tokens admitted; m is limited by both arguments."""
    m = min(len(ranking.survival), len(seconds) - 1)
    expected = np.empty(m + 1)
    expected[0] = num_rows
    gained = expected[1:]
    np.add.accumulate(ranking.survival[:m], out=gained)
    gained += num_rows
    expected /= seconds[: m + 1]
    return expected


def early_stop(ranking: Ranking, num_rows: int, seconds: Floats) -> int:
    """Algorithm 1: admit while each token raises theta by the margin that is asked of every token by itself.

    A margin on the sum would let the confidence of the second token decide about the first.
    """
    theta = _theta(ranking, num_rows, seconds)
    if len(theta) == 1:
        return 0
    steps = np.diff(seconds[: len(theta)])
    pays = ranking.survival[: len(steps)] >= (1 + MIN_GAIN) * theta[:-1] * steps
    return len(pays) if pays.all() else int(np.argmin(pays))


def best_count(ranking: Ranking, num_rows: int, seconds: Floats) -> int:
    """The count with the largest theta of the whole curve; 0 if it is not worth the margin. The smallest of equal ones."""
    theta = _theta(ranking, num_rows, seconds)
    count = int(theta.argmax())
    return count if theta[count] >= theta[0] * (1 + MIN_GAIN) else 0


@dataclass(frozen=True, slots=True)
class Pace:
    """What running requests were promised, as seconds a token: ``allowed`` [R] of the ranked requests (inf: no budget), and the
    tightest of the requests that verify no drafts this step, times the tokens of their usual rounds.

    ``usual`` [R] tokens of a round of the ranked ones. ``prompt_s`` of the step are for prompts: budgets are averages, and those seconds
    pass whatever is verified beside them.
    """

    allowed: Floats
    others: float = float("inf")
    usual: Floats | float = 1.0
    prompt_s: float = 0.0


def count_within(ranking: Ranking, survival: Floats, num_rows: int, seconds: Floats, pace: Pace, limit: int) -> int:
    """Among counts up to ``limit`` the one with the largest theta whose predicted seconds a token keep every request's pace.

    If none does, the one with the largest theta: work that is done sooner helps late requests most (docs/adr/011). A request's seconds
    a token are the step's over the tokens that it is expected to get: 1 and the survival of its admitted nodes, or those of its usual
    rounds if that is more, because one poor draft does not decide about an average (latency budgets of ours; no counterpart in the paper).
    """
    theta = _theta(ranking, num_rows, seconds)
    last = min(limit, len(theta) - 1)
    counts = np.unique(np.linspace(0, last, min(last + 1, GRID)).astype(np.int64))
    cumulated = np.concatenate([np.ones((survival.shape[0], 1)), 1.0 + np.cumsum(survival, axis=1)], axis=1)
    rows = np.arange(survival.shape[0])
    overshoot = np.empty(len(counts))
    for i, count in enumerate(counts):
        expected = np.maximum(cumulated[rows, ranking.lengths(int(count))], pace.usual)
        step_s = seconds[count] - pace.prompt_s
        worst = float(np.max(step_s / (expected * pace.allowed), initial=0.0))
        overshoot[i] = max(worst, step_s / pace.others)
    keeps = overshoot <= 1.0
    within = counts[keeps] if keeps.any() else counts
    return int(within[np.argmax(theta[within])])


def pack(survivals: Sequence[Sequence[float]]) -> Floats:
    """Rows of different lengths as survival [R, n], padded with 0."""
    width = max(map(len, survivals), default=0)
    packed = np.zeros((len(survivals), width))
    for row, values in zip(packed, survivals, strict=True):
        row[: len(values)] = values
    return packed
