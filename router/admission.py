"""Whether a request is taken in at all. Serve's own limits are set out of the way: they drop bursts that would fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from dspark.errors import Overloaded
from dspark.router.predict import TYPICAL_OUTPUT_TOKENS, Ask, Prediction
from dspark.types import ReplicaView

MAX_RETRY_AFTER_S: Final = 60.0
BACKGROUND_SHARE: Final = 0.5  # of the waiting room, for requests that are less urgent than usual (priority over 0)


class BudgetOutOfReach(Overloaded):
    """No replica is predicted to keep the request's latency budget, and its class prefers a refusal to a late answer."""


def capacity(views: Iterable[ReplicaView]) -> int:
    """Requests that the replicas can run at once."""
    return sum(view.max_running for view in views if not view.draining)


def admit(wanted: int, in_flight: int, running_limit: int, max_waiting: int, finished_per_s: float, priority: int = 0) -> None:
    """Raise ``Overloaded`` if ``wanted`` more requests would leave over ``max_waiting`` of them waiting.

    ``in_flight`` are this router's requests, ``running_limit`` is what the replicas run at once. Less urgent requests
    (``priority`` over 0) leave a part of the waiting room to the others. The error says when to come back: when the excess
    will have ended at the present rate.
    """
    if priority > 0:
        max_waiting = int(BACKGROUND_SHARE * max_waiting)
    waiting = in_flight + wanted - running_limit
    if waiting <= max_waiting:
        return
    excess = waiting - max_waiting
    retry_after_s = excess / finished_per_s if finished_per_s > 0 else MAX_RETRY_AFTER_S
    raise Overloaded(f"{in_flight} requests are in flight; {running_limit} can run and {max_waiting} may wait", _bounded(retry_after_s))


def refuse_late(ask: Ask, best: Prediction) -> None:
    """Raise ``BudgetOutOfReach`` if the best replica's prediction misses the budget.

    The error says when to come back: when the work in front will have shrunk by what is too much of it.
    """
    if not best.is_late:
        return
    budget = ask.budget
    wait_s = 0.0
    over = []
    if budget.ttft_ms is not None and 1e3 * best.ttft_s > budget.ttft_ms:
        wait_s = best.ttft_s - budget.ttft_ms / 1e3
        over.append(f"{1e3 * best.ttft_s:.0f} ms to the first token (ttft_ms {budget.ttft_ms:g})")
    if budget.tpot_ms is not None and 1e3 * best.tpot_s > budget.tpot_ms:
        excess = 1.0 - budget.tpot_ms / (1e3 * best.tpot_s)  # share of the load that must end; a request lasts a typical output
        wait_s = max(wait_s, excess * TYPICAL_OUTPUT_TOKENS * best.tpot_s)
        over.append(f"{1e3 * best.tpot_s:.1f} ms per token (tpot_ms {budget.tpot_ms:g})")
    raise BudgetOutOfReach(f"no verifier can keep the latency budget now; the best one would take {' and '.join(over)}", _bounded(wait_s))


def _bounded(wait_s: float) -> float:
    return min(max(wait_s, 1.0), MAX_RETRY_AFTER_S)
