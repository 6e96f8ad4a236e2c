"""Requests as their clients saw them: what scaling decides by, and what budgets are counted from."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.types import LatencyBudget


@dataclass(frozen=True, slots=True)
class Sample:
    """One request at one moment. A time is None while it is not known; ``ended`` is False for one that still waits.

    ``arrived_s`` is on the clock of whoever decides; ``replica_id``: the verifier that ran it, empty before there is one.
    """

    replica_id: str
    arrived_s: float
    budget: LatencyBudget
    ttft_s: float | None
    tpot_s: float | None = None
    ended: bool = True


def ttft_met(budget: LatencyBudget, ttft_s: float | None) -> bool | None:
    """Whether the first token came in time; None where there is no such budget or no such time."""
    return None if budget.ttft_ms is None or ttft_s is None else 1e3 * ttft_s <= budget.ttft_ms


def tpot_met(budget: LatencyBudget, tpot_s: float | None) -> bool | None:
    """Whether tokens came fast enough; None where there is no such budget, or fewer than two tokens."""
    return None if budget.tpot_ms is None or tpot_s is None else 1e3 * tpot_s <= budget.tpot_ms
