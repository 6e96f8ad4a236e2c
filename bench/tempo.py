"""Time as it would pass on a machine that never changes its speed, told from work that is always the same.

A virtual machine is as fast as its neighbours let it be: ours changes by a quarter, for a tenth of a second or for minutes, and two
turns of one benchmark differ by a tenth. So a piece of the work that decoding is made of, products of a few rows with weights that fit
no cache, is timed again and again between the engine's steps. Seconds in which it took longer count for less, in proportion, and its
own not at all.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

LOOK_EVERY_S = 0.15
LOOKS = 2  # a look is the shorter of so many
FIRST_LOOK_S = 3.0  # in which the speed is looked for that all times are told at
WEIGHTS, ROWS, WIDTH = 40, 8, (1536, 576)  # 71 MB in bf16


class Tempo:
    """Looks at the machine between steps, and translates moments of one clock into steady seconds."""

    def __init__(self, look: Callable[[], float] | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._look_once = products() if look is None else look
        self._clock = clock
        self._looks: list[float] = []  # seconds that each took, since the last ``begin``
        self._begins: list[float] = []
        self._ends: list[float] = []
        self._passed: list[float] = []  # steady seconds from the first look to the end of each
        self.slowest = 0.0  # look of all, in units of the reference
        begin, found = clock(), []
        with ThreadPoolExecutor(1) as apart:  # a thread that ends: idle teams of compute threads would slow the engines down
            while clock() - begin < FIRST_LOOK_S:
                found.append(apart.submit(self._look).result())
        self.reference_s = min(found)

    @contextmanager
    def watching(self, engine: Any) -> Iterator[None]:
        """Look at the machine between the engine's steps for the length of a block, and forget what was seen before."""
        for seen in (self._looks, self._begins, self._ends, self._passed):
            seen.clear()
        step = engine.step

        def watched() -> object:
            if not self._ends or self._clock() - self._ends[-1] > LOOK_EVERY_S:
                begin = self._clock()
                self.note(begin, self._look(), self._clock())
                if engine.landed_s:  # it did not wait for the look
                    engine.landed_s += self._ends[-1] - begin
            return step()

        engine.step = watched
        try:
            yield
        finally:
            del engine.step  # what hid the class's own

    def note(self, begin_s: float, look_s: float, end_s: float) -> None:
        """A look from ``begin_s`` to ``end_s`` found the work to take ``look_s``."""
        passed = 0.0
        if self._looks:
            between = 2 * self.reference_s / (self._looks[-1] + look_s)
            passed = self._passed[-1] + (begin_s - self._ends[-1]) * between
        self._looks.append(look_s)
        self._begins.append(begin_s)
        self._ends.append(end_s)
        self._passed.append(passed)
        self.slowest = max(self.slowest, look_s / self.reference_s)

    def at(self, moment_s: float) -> float:
        """Steady seconds from the first look to a moment of the clock; below 0 before it. RuntimeError without a look."""
        if not self._looks:
            raise RuntimeError("nothing was watched")
        last = bisect_right(self._ends, moment_s) - 1
        if last < 0:
            return min(0.0, moment_s - self._begins[0]) * self.reference_s / self._looks[0]
        after = last + 1
        if after == len(self._looks):
            return self._passed[last] + (moment_s - self._ends[last]) * self.reference_s / self._looks[last]
        whole = self._begins[after] - self._ends[last]
        share = min(1.0, (moment_s - self._ends[last]) / whole) if whole > 0 else 1.0
        return self._passed[last] + share * (self._passed[after] - self._passed[last])

    def summary(self) -> str:
        """What the times mean, in one line."""
        return (
            f"times at the speed at which the same work takes {1e3 * self.reference_s:.1f} ms; it took up to {self.slowest:.2f} x as long"
        )

    def _look(self) -> float:
        return min(self._look_once() for _ in range(LOOKS))


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

    return look
