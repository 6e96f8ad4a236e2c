"""Whether a request is taken in at all. Serve's own limits are set out of the way: they drop bursts that would fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from dspark.errors import Overloaded
from dspark.types import ReplicaView

MAX_RETRY_AFTER_S: Final = 60.0


def capacity(views: Iterable[ReplicaView]) -> int:
    """Requests that the replicas can run at once."""
    return sum(view.max_running for view in views if not view.draining)


def admit(wanted: int, in_flight: int, running_limit: int, max_waiting: int, finished_per_s: float) -> None:
    """Raise ``Overloaded`` if ``wanted`` more requests would leave over ``max_waiting`` of them waiting.

    ``in_flight`` are this router's requests, ``running_limit`` is what the replicas run at once. The error says when
    to come back: when the excess will have ended at the present rate.
    """
    waiting = in_flight + wanted - running_limit
    if waiting <= max_waiting:
        return
    excess = waiting - max_waiting
    retry_after_s = excess / finished_per_s if finished_per_s > 0 else MAX_RETRY_AFTER_S
    raise Overloaded(
        f"{in_flight} requests are in flight; {running_limit} can run and {max_waiting} may wait",
        min(max(retry_after_s, 1.0), MAX_RETRY_AFTER_S),
    )
