"""When steps that run ahead of the host are interrupted to let waiting requests in.

Letting anybody in takes a step that is planned on the host, for all running requests: at hundreds of streams that costs several times what
a step costs that was launched before its turn, and there a request ends in nearly every step. So requests wait a few steps for others, the
longer the more requests would be held up and the fewer would be let in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dspark.workers.verifier.sequence import Sequence as Request

ROWS_A_STEP = 16  # running requests for which one request that waits may be held back by one step
MAX_STEPS = 8
MAX_HELD_S = 0.03


class Gate:
    """Asked once a step that could be launched ahead."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._steps = 0  # for which requests have been held back
        self._since_s = 0.0  # when the first of them was

    def lets_in(self, waiting: Sequence[Request], num_running: int, num_places: int) -> bool:
        """Whether the next step is to let some of ``waiting`` in, for whom there are ``num_places`` places."""
        if not waiting or num_places <= 0:
            self._steps = 0
            return False
        now_s = self._clock()
        if not self._steps:
            self._since_s = now_s
        patience = min(num_running // (ROWS_A_STEP * min(len(waiting), num_places)), MAX_STEPS)
        if self._steps >= patience or now_s - self._since_s > MAX_HELD_S or any(_is_urgent(request) for request in waiting[:num_places]):
            self._steps = 0
            return True
        self._steps += 1
        return False


def _is_urgent(sequence: Request) -> bool:
    """A budget for the first token, or one that ran before and lost its place."""
    return sequence.request.latency_budget.ttft_ms is not None or sequence.admitted
