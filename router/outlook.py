"""What latencies would become of more or less load a replica, or of more or less drafting: ratios, not seconds.

Measured latencies contain what no model knows (clients, network, a busy machine); the cost table knows how they change with
load. So a measured latency is multiplied by predicted(then) / predicted(now).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from dspark.router.predict import NOTHING_SENT, predicted_tpot, predicted_ttft
from dspark.router.samples import Sample, tpot_met, ttft_met
from dspark.types import LatencyBudget, ReplicaView

TYPICAL_PROMPT_TOKENS: Final = 256  # of the request that is predicted; only ratios are used
FIXPOINT_ROUNDS: Final = 20


@dataclass(frozen=True, slots=True)
class Load:
    """Mean load of a replica over a while."""

    rows: float  # requests, running or waiting
    queued_tokens: float


@dataclass(frozen=True, slots=True)
class Drafting:
    """What a round yields without a limit: verified drafted tokens, and committed tokens."""

    drafted_per_round: float
    tokens_per_round: float

    @staticmethod
    def unlimited(view: ReplicaView) -> Drafting | None:
        """From a view under its present limit; None when that is 0, or nothing is drafted."""
        limit = view.speculation_limit
        if limit <= 0 or view.drafted_per_round <= 0:
            return None
        return Drafting(view.drafted_per_round / limit, 1.0 + (view.tokens_per_round - 1.0) / _gain(limit))

    def limited(self, view: ReplicaView, limit: float) -> ReplicaView:
        """The view as it would be under a limit."""
        return dataclasses.replace(
            view,
            speculation_limit=limit,
            drafted_per_round=self.drafted_per_round * limit,
            tokens_per_round=1.0 + (self.tokens_per_round - 1.0) * _gain(limit),
        )


def loaded(view: ReplicaView, load: Load, factor: float) -> ReplicaView:
    """The view under ``factor`` times the arrivals.

    Requests in the system are arrivals times the time each stays (Little's law), and that grows with the load itself: the
    fixed point of the two. What does not fit the places waits.
    """
    places = max(view.max_running, 1)
    now_s = predicted_tpot(view, math.ceil(load.rows))
    rows = load.rows * factor
    for _ in range(FIXPOINT_ROUNDS):
        rows = load.rows * factor * predicted_tpot(view, math.ceil(rows)) / now_s
    rows = math.ceil(rows - 1e-9)
    return dataclasses.replace(
        view,
        running=min(rows, places),
        queued=max(rows - places, 0),
        queued_tokens=math.ceil(load.queued_tokens * factor),
        waiting=(),
        free_blocks=view.num_blocks,
    )


def latencies(view: ReplicaView) -> tuple[float, float]:
    """Predicted (TTFT, TPOT) of a typical request on a replica."""
    rows = view.running + view.queued
    return predicted_ttft(view, TYPICAL_PROMPT_TOKENS, 0, NOTHING_SENT), predicted_tpot(view, max(rows, 1))


def share_met(samples: Sequence[Sample], default: LatencyBudget, now: ReplicaView, then: ReplicaView) -> float:
    """Share of the requests that would have kept their budgets on ``then`` instead of ``now``; 1 if there are none."""
    if not samples:
        return 1.0
    (ttft_now, tpot_now), (ttft_then, tpot_then) = latencies(now), latencies(then)
    by_ttft, by_tpot = ttft_then / ttft_now, tpot_then / tpot_now
    return sum(is_met(sample, default, by_ttft, by_tpot) for sample in samples) / len(samples)


def is_met(sample: Sample, default: LatencyBudget, by_ttft: float = 1.0, by_tpot: float = 1.0) -> bool:
    """Whether a request keeps its budget, or the default one where it has none, with its times multiplied."""
    budget = LatencyBudget(
        default.ttft_ms if sample.budget.ttft_ms is None else sample.budget.ttft_ms,
        default.tpot_ms if sample.budget.tpot_ms is None else sample.budget.tpot_ms,
    )
    ttft_s = None if sample.ttft_s is None else sample.ttft_s * by_ttft
    tpot_s = None if sample.tpot_s is None else sample.tpot_s * by_tpot
    return ttft_met(budget, ttft_s) is not False and tpot_met(budget, tpot_s) is not False


def mean_view(views: Sequence[ReplicaView]) -> ReplicaView:
    """One replica that stands for all: their mean rates, with the cost table of one that has any."""
    base = next((view for view in views if view.step_costs), views[0])
    return dataclasses.replace(
        base,
        tokens_per_round=_mean(view.tokens_per_round for view in views),
        drafted_per_round=_mean(view.drafted_per_round for view in views),
    )


def _gain(limit: float) -> float:
    """Share of the accepted tokens that is left under a limit: the likeliest drafted tokens are verified first."""
    return 1.0 - (1.0 - limit) ** 2


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)
