"""Turns of a benchmark that the machine disturbed, found by work that is always the same, and measured again.

A virtual machine is as fast as its neighbours let it be: ours has two speeds 28 % apart, each for tens of seconds. So a piece of the work
that decoding is made of, products of a few rows with weights that fit no cache, is timed before and after each turn. What a turn
itself brought is never looked at, so nothing is chosen by its outcome.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

SLACK = 1.12  # of the shortest time seen: more is a disturbance
FIRST_LOOK_S = 3.0  # in which the shortest time is looked for
LOOKS = 15  # a tenth of a second; their median counts
PAUSE_S = 0.25  # between two looks of a wait
MOST_TURNS = 4  # of which the least disturbed one counts, if none was steady
WEIGHTS, ROWS, WIDTH = 40, 8, (1536, 576)  # 71 MB in bf16

T = TypeVar("T")


class Steadiness:
    """Waits up to ``wait_s`` seconds before a turn until the machine is as fast as it was at its fastest, and repeats disturbed turns."""

    def __init__(
        self,
        wait_s: float,
        look: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._wait_s = wait_s
        self._look_once = look or products()
        self._clock, self._sleep = clock, sleep
        self._shortest_s = math.inf
        self.num_again = 0  # turns that were measured again
        self.num_disturbed = 0  # turns that count although they were disturbed
        self.waited_s = 0.0
        begin = clock()
        while clock() - begin < FIRST_LOOK_S:
            self._look()

    def steady(self, turn: Callable[[], T]) -> T:
        """What ``turn`` returns, from a run that was not disturbed if there is one."""
        found: list[tuple[float, T]] = []
        while len(found) < MOST_TURNS:
            before = self._wait()
            result = turn()
            found.append((max(before, self._look()), result))
            if self._is_steady(found[-1][0]):
                break
        self.num_again += len(found) - 1
        slowest_s, best = min(found, key=lambda one: one[0])
        self.num_disturbed += not self._is_steady(slowest_s)
        return best

    def summary(self) -> str:
        """What it took, in one line."""
        disturbed = f"{self.num_disturbed} counted though disturbed"
        return f"steadiness: {self.num_again} turns measured again, {disturbed}, {self.waited_s:.0f} s waited"

    def _wait(self) -> float:
        """Wait for a steady machine, but not for ever; how long the last look took."""
        begin = self._clock()
        seconds = self._look()
        while not self._is_steady(seconds) and self._clock() - begin < self._wait_s:
            self._sleep(PAUSE_S)
            seconds = self._look()
        self.waited_s += self._clock() - begin
        return seconds

    def _look(self) -> float:
        seconds = median(self._look_once() for _ in range(LOOKS))
        self._shortest_s = min(self._shortest_s, seconds)
        return seconds

    def _is_steady(self, seconds: float) -> bool:
        return seconds <= SLACK * self._shortest_s


def products() -> Callable[[], float]:
    """Seconds of products of few rows with many weights on the CPU."""
    import torch
    from torch.nn.functional import linear

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*WIDTH, generator=generator).bfloat16() for _ in range(WEIGHTS)]
    rows = torch.randn(ROWS, WIDTH[1], generator=generator).bfloat16()

    def look() -> float:
        begin = time.perf_counter()
        for weight in weights:
            linear(rows, weight)
        return time.perf_counter() - begin

    look()
    return look
