"""When steps that run ahead of the host are interrupted to let waiting requests in.

Letting requests in holds up all that run, for a time that is in part the same however many come: the shortest pause of late. A request
that waits leaves its place idle. So requests wait for others until the time that places were idle equals that part of the time that those
who run are held up: neither waiting longer nor letting in sooner can then have been much better.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from dspark.workers.verifier.sequence import Sequence as Request

MAX_HELD_S = 0.1
FIRST_PAUSE_S = 0.004  # how long those who run are held up, until it was measured
KEPT_PAUSES = 64
JOIN_S = 0.0005  # what it costs to prepare a step for more than those who run


class Gate:
    """Asked once a step that could be launched ahead."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pauses: deque[float] = deque(maxlen=KEPT_PAUSES)  # seconds
        self._pause_s = FIRST_PAUSE_S
        self._held = 0  # places that waiting requests could have had since the last question
        self._idle_s = 0.0  # place x seconds for which requests have been held back
        self._since_s = 0.0  # when the first of them was
        self._asked_s = 0.0

    def lets_in(self, waiting: Sequence[Request], num_running: int, num_places: int, joins: bool = False) -> bool:
        """Whether the next step is to let some of ``waiting`` in, for whom there are ``num_places`` places.

        ``joins``: they would be computed beside those who run, who would hardly be held up.
        """
        if not waiting or num_places <= 0:
            self._held = 0
            return False
        now_s = self._clock()
        if not self._held:
            self._since_s, self._idle_s = now_s, 0.0
        else:
            self._idle_s += self._held * (now_s - self._asked_s)
        self._asked_s, self._held = now_s, min(len(waiting), num_places)
        pause_s = JOIN_S if joins else self._pause_s
        is_worth_it = self._idle_s + self._held * pause_s >= num_running * pause_s
        if is_worth_it or now_s - self._since_s > MAX_HELD_S or any(map(_is_urgent, waiting[:num_places])):
            self._held = 0
            return True
        return False

    def took(self, seconds: float) -> None:
        """Letting requests in has held up the others for so long."""
        self._pauses.append(seconds)
        self._pause_s = min(self._pauses)


def _is_urgent(sequence: Request) -> bool:
    """A budget for the first token, or one that ran before and lost its place."""
    return sequence.request.latency_budget.ttft_ms is not None or sequence.admitted
