"""What changes from step to step, in one buffer that never moves: filled on the host, sent to the device with one copy.

::

    source        [T] int64   where a token's id is: in ``own`` of the step before, or behind it in ``ids``
    ids, positions [T] int64  wanted [T] int64: the tokens whose logits are asked for, then zeros
    ancestors     [T] int64   0: causal         slots [T] int32: -1 for padding
    starts        [R + 1] int32, contexts [R], table_starts [R]: rows in order, then empty ones; the last is the padding
    tables        [N] int32   the blocks of all rows, as many as there are

A step of T tokens lies in the first words of the buffer in an order that T and R alone decide, so that graphs of all sizes share it and
a copy takes what a step has. Attention launches programs for all R rows, so layouts of steps that verify drafts have few rows.
``own`` lies before it: the best token of every wanted row, which a step leaves for the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.draft_rows import StepRows, place_drafts
from dspark.kernels.paged_attention import AttentionRow
from dspark.kernels.ragged_attention import RaggedBatch, row_ancestors
from dspark.types import DeviceDrafts
from dspark.workers.verifier.edits import LogitEdits

Asked = tuple[bytes | None, tuple[LogitEdits | None, ...] | None]  # of a step's requests: as ``asked`` and ``edits`` of a ``HostStep``
ROW_TOKENS = 4  # that a row has on average at least where a layout has room for few rows
HOST_COPIES = 3  # host buffers in turn: one is filled while the copy of the one before may still run
INT64_FIELDS = ("ids", "source", "positions", "wanted", "ancestors")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields of a step with ``num_tokens`` tokens and ``num_rows`` rows (the padding's included) lie, in 32-bit words."""

    num_tokens: int
    num_rows: int
    spans: dict[str, tuple[int, int]]
    tables: int  # where they begin


def aligned(num_words: int) -> int:
    """Room for so many words, so that what follows begins at 16 bytes: kernels are compiled anew for pointers that do not."""
    return -(-num_words // 4) * 4


@lru_cache(maxsize=256)
def layout(num_tokens: int, num_rows: int) -> Layout:
    sizes = dict.fromkeys(INT64_FIELDS, 2 * num_tokens)
    sizes |= {"slots": num_tokens, "starts": num_rows + 1, "contexts": num_rows, "table_starts": num_rows}
    spans: dict[str, tuple[int, int]] = {}
    begin = 0
    for name, size in sizes.items():
        spans[name] = (begin, begin + size)
        begin += aligned(size)
    return Layout(num_tokens, num_rows, spans, begin)


@dataclass(frozen=True, slots=True)
class StepViews:
    """The fields on the device."""

    ids: Tensor  # [T] resolved: what ``source`` points at, once ``gather_ids`` has run
    source: Tensor
    positions: Tensor
    wanted: Tensor
    slots: Tensor
    batch: RaggedBatch


class StepBuffers:
    """The device buffer, and host buffers that are filled in turn. ``max_blocks``: blocks that the rows of a step name at most."""

    def __init__(self, device: torch.device, max_tokens: int, max_rows: int, max_blocks: int) -> None:
        self.max_tokens = max_tokens
        self.max_rows = max_rows + 1
        words = layout(max_tokens, self.max_rows).tables + max_blocks
        self._own_words = aligned(2 * max_tokens)
        self._device = torch.zeros(self._own_words + words + words % 2, dtype=torch.int32, device=device)
        is_cuda = device.type == "cuda"
        self._pinned = [torch.zeros(words, dtype=torch.int32, pin_memory=is_cuda) for _ in range(HOST_COPIES)]
        self._words: list[NDArray[np.int32]] = [pinned.numpy() for pinned in self._pinned]
        # Layout, rows and tokens of a row, where a buffer holds drafts alone: the next step that is alike only differs in its tables.
        self._filled: list[tuple[Layout, int, int] | None] = [None] * HOST_COPIES
        self._turn = 0
        self._rows: dict[tuple[int, int], StepRows] = {}  # the fields that drafts go to, by the layout of a step
        self._own_tokens = self._device[: 2 * max_tokens].view(torch.int64)
        self.matched = torch.zeros(max_tokens, dtype=torch.bool, device=device)  # whether the token behind a wanted one is its best

    @property
    def own(self) -> Tensor:
        """[max_tokens] int64: the best token of every wanted row of the last step."""
        return self._own_tokens

    def row_choices(self, num_tokens: int, longest: int) -> tuple[int, ...]:
        """Rows of the layouts of a step, the padding's included, rising: few where rows may have ``longest`` tokens, then one a token."""
        most = min(num_tokens + 1, self.max_rows)
        few = max(num_tokens // ROW_TOKENS, 1) + 1
        return (few, most) if longest >= ROW_TOKENS and few < most else (most,)

    def views(self, num_tokens: int, num_rows: int, block_size: int, longest: int, with_trees: bool) -> StepViews:
        """The device's fields of steps of this layout. ``longest``: tokens that a row usually has at most."""
        plan = layout(num_tokens, num_rows)
        whole = self._device[self._own_words :]
        fields = {name: whole[slice(*span)] for name, span in plan.spans.items()}
        fields |= {name: fields[name].view(torch.int64) for name in INT64_FIELDS}
        batch = RaggedBatch(
            positions=fields["positions"],
            starts=fields["starts"],
            contexts=fields["contexts"],
            table_starts=fields["table_starts"],
            tables=whole[plan.tables :],
            block_size=block_size,
            longest=longest,
            ancestors=fields["ancestors"] if with_trees else None,
            is_given=True,
        )
        return StepViews(fields["ids"], fields["source"], fields["positions"], fields["wanted"], fields["slots"], batch)

    def wanted_positions(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The fields ``positions`` and ``wanted`` of steps of so many tokens, which lie in the same place in all their layouts."""
        plan, whole = layout(num_tokens, self.max_rows), self._device[self._own_words :]
        positions, wanted = (whole[slice(*plan.spans[name])].view(torch.int64) for name in ("positions", "wanted"))
        return positions, wanted

    def gather_ids(self, views: StepViews) -> Tensor:
        """Token ids [T] of a step: the best tokens of the step before it, or those that the host gave."""
        known = self._device[: self._own_words + 2 * views.ids.shape[0]].view(torch.int64)
        return known.index_select(0, views.source)

    def fill(self, num_tokens: int, num_rows: int, step: HostStep) -> None:
        """Send a step to the device, laid out with so many tokens and rows, padding included; nothing waits for it."""
        plan = layout(num_tokens, num_rows)
        self._turn = (self._turn + 1) % HOST_COPIES
        words = self._words[self._turn]
        rows, begin = len(step.lengths), plan.spans["table_starts"][0]
        drafts = None if step.row_tokens is None else (plan, rows, step.row_tokens)
        if drafts is None or drafts != self._filled[self._turn]:
            self._fill_fields(words, plan, step)
        self._filled[self._turn] = drafts
        counts = np.fromiter(map(len, step.tables), np.int32, rows)
        ends = np.cumsum(counts)
        words[begin : begin + rows] = ends - counts
        words[begin + rows : begin + plan.num_rows] = 0
        end = plan.tables + int(ends[-1]) if rows else plan.tables
        words[plan.tables : end] = np.frombuffer(b"".join(step.tables), dtype=np.int32)  # type: ignore[arg-type]
        self._device[self._own_words : self._own_words + end].copy_(self._pinned[self._turn][:end], non_blocking=True)

    def _fill_fields(self, words: NDArray[np.int32], plan: Layout, step: HostStep) -> None:
        """All fields of a step but its tables."""
        real, rows = len(step.positions), len(step.lengths)
        fields = {name: words[slice(*span)] for name, span in plan.spans.items()}
        fields |= {name: fields[name].view(np.int64) for name in INT64_FIELDS}
        own = self._own_words // 2  # where ``ids`` begin behind ``own``
        if step.source is None:
            fields["ids"][:real] = step.ids
            fields["ids"][real:] = 0
            fields["source"][:] = np.arange(own, own + plan.num_tokens)
        else:
            fields["ids"][:] = 0
            if len(step.ids):
                fields["ids"][:real] = step.ids
            fields["source"][:real] = np.where(step.source < 0, np.arange(own, own + real), step.source)
            fields["source"][real:] = own + plan.num_tokens - 1
        for name, values in (("positions", step.positions), ("wanted", step.wanted)):
            fields[name][: len(values)] = values
            fields[name][len(values) :] = 0
        fields["ancestors"][:] = 0
        if step.ancestors is not None:
            fields["ancestors"][:real] = step.ancestors
        fields["slots"][:real] = step.slots
        fields["slots"][real:] = -1
        starts = fields["starts"]
        starts[0] = 0
        np.cumsum(step.lengths, out=starts[1 : rows + 1])
        starts[rows + 1 : -1] = real
        starts[-1] = plan.num_tokens
        fields["contexts"][:rows] = step.contexts
        fields["contexts"][rows:] = 0

    def overwrite(self, num_tokens: int, num_rows: int, drafts: DeviceDrafts, num_drafting: int, row_tokens: int) -> None:
        """Put anchors and drafts into a step that was filled: ``num_drafting`` rows of ``row_tokens`` tokens each, behind one another."""
        key = num_tokens, num_rows
        if key not in self._rows:
            plan = layout(num_tokens, num_rows)
            fields = {name: self._device[self._own_words :][slice(*span)] for name, span in plan.spans.items()}
            ids, positions = (fields[name].view(torch.int64) for name in ("ids", "positions"))
            self._rows[key] = StepRows(ids, positions, fields["slots"], fields["contexts"])
        place_drafts(self._rows[key], (drafts.anchors, drafts.tokens, drafts.places, drafts.slots), num_drafting, row_tokens)


@dataclass(frozen=True, slots=True)
class HostStep:
    """One step on the host: token by token, and row by row. ``tables`` are int32 arrays.

    ``source`` are rows of ``own`` that hold the ids; below 0, or None for all: ``ids`` has them. ``row_tokens``: the step is drafts of so
    many tokens a row, and all but its tables is known to the device alone. ``asked``: what the rows ask of sampling, joined
    (``dspark/asked.py``); None: all take the best token. ``edits``: what they do to their logits; None: nothing.
    """

    ids: Sequence[int] | NDArray[np.int64]
    positions: Sequence[int] | NDArray[np.int64]
    slots: Sequence[int] | NDArray[np.int64]
    wanted: Sequence[int] | NDArray[np.int64]
    lengths: Sequence[int] | NDArray[np.int64]
    contexts: Sequence[int] | NDArray[np.int64]
    tables: Sequence[Sequence[int]]
    source: NDArray[np.int64] | None = None
    ancestors: Sequence[int] | None = None
    row_tokens: int | None = None
    asked: bytes | None = None
    edits: tuple[LogitEdits | None, ...] | None = None

    @staticmethod
    def of_drafts(tables: Sequence[Sequence[int]], row_tokens: int, asked: Asked) -> HostStep:
        """Rows of ``row_tokens`` tokens that only the device knows."""
        zeros, places, lengths = _unknown(len(tables), row_tokens)
        contexts = zeros[: len(tables)]
        return HostStep(zeros, zeros, zeros, places, lengths, contexts, tables, row_tokens=row_tokens, asked=asked[0], edits=asked[1])

    @staticmethod
    def of(
        ids: Sequence[int], positions: Sequence[int], slots: Sequence[int], wanted: Sequence[int], rows: Sequence[AttentionRow]
    ) -> HostStep:
        """From the rows of a step."""
        has_trees = any(row.visible is not None for row in rows)
        return HostStep(
            ids=ids,
            positions=positions,
            slots=slots,
            wanted=wanted,
            lengths=[row.length for row in rows],
            contexts=[row.context for row in rows],
            tables=[row.table for row in rows],
            ancestors=[word for row in rows for word in row_ancestors(row)] if has_trees else None,
        )


NOTHING = HostStep((), (), (), (), (), (), ())


@lru_cache(maxsize=1024)
def _unknown(num_rows: int, row_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Zeros for what the device knows better, the places of all tokens, and the lengths of the rows; nobody may write to them."""
    size = num_rows * row_tokens
    return np.zeros(size, np.int64), np.arange(size), np.full(num_rows, row_tokens, np.int64)
