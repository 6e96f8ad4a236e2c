"""What plain steps leave for a drafter that will not draft soon: kept, and told it several steps at once.

A drafter that takes features from the target's steps keeps a context of all text, whether it drafts or not. Telling it one token a
request costs it much the same as telling it eight.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.workers.verifier.sequence import Sequence

MOST_STEPS = 8


@dataclass(frozen=True, slots=True)
class Advance:
    """One row's tokens that got KV for good: those at ``rows`` of the step's token axis, at positions ``start`` on."""

    sequence: Sequence
    rows: Seq[int]
    start: int


class Untold:
    """The taps of up to ``MOST_STEPS`` steps of one token a request."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []
        self._num_rows = 0
        self._kept: dict[str, Advance] = {}  # rows of all steps, one behind the other

    def __bool__(self) -> bool:
        return bool(self._kept)

    def keep(self, advances: Seq[Advance], taps: Tensor) -> bool:
        """Keep a step's taps [T, m * d]; False, and nothing is kept, if it is not one of one token a request or has to be told now."""
        if len(self._steps) == MOST_STEPS or not all(len(advance.rows) == 1 for advance in advances):
            return False
        self._steps.append(taps[[advance.rows[0] for advance in advances]])
        for row, advance in enumerate(advances, self._num_rows):
            before = self._kept.get(advance.sequence.id)
            if before is not None and not _follows(advance, before):
                before = None
            rows = [row] if before is None else [*before.rows, row]
            self._kept[advance.sequence.id] = Advance(advance.sequence, rows, advance.start if before is None else before.start)
        self._num_rows += len(advances)
        return True

    def join(self, advances: Seq[Advance], taps: Tensor | None) -> tuple[list[Advance], Tensor | None]:
        """The advances of a step with taps [T, m * d] (None: of no step) behind what was kept, and the taps of both; nothing is kept then.

        What was kept of a request that lost its place since is of no use any more.
        """
        if not self._kept:
            return list(advances), taps
        kept, joined = self._kept, []
        for advance in advances:
            before, rows = kept.pop(advance.sequence.id, None), [self._num_rows + row for row in advance.rows]
            if before is not None and _follows(advance, before):
                joined.append(Advance(advance.sequence, [*before.rows, *rows], before.start))
            else:
                joined.append(Advance(advance.sequence, rows, advance.start))
        joined += [before for before in kept.values() if before.sequence.num_computed == before.start + len(before.rows)]
        everything = torch.cat([*self._steps, taps] if taps is not None else self._steps)
        self._steps, self._num_rows, self._kept = [], 0, {}
        return joined, everything


def _follows(advance: Advance, before: Advance) -> bool:
    return advance.start == before.start + len(before.rows)
