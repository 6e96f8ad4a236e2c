"""What the leader announces, as one vector of int32 words.

::

    a forward   1, T, padding, R, L, ids [T], positions [T], slots [T], wanted [L], then for each of R rows:
                start, length, context, table length, tree flag, table [...], and with the flag the bits of ``visible`` [length, length]
    a move      2, n, source slots [n], target slots [n]
    blocks      4 to be collected on the leader, 5 to be spread from there: 4 or 5, n, block ids [n]
    a start     3, then for graphs: max_rows, max_blocks, longest, tree flag, G, sizes [G]
    the end     nothing

Nothing here comes from outside the group.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dspark.kernels.paged_attention import AttentionRow
from dspark.workers.verifier.forward import StepInput
from dspark.workers.verifier.graphs import GraphSizes

STEP, MOVE, START, COLLECT, SPREAD = 1, 2, 3, 4, 5
END = torch.empty(0, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Move:
    """KV that moves from slots to other slots."""

    sources: list[int]
    targets: list[int]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks whose KV goes to the leader, or comes from it (``is_spread``)."""

    ids: list[int]
    is_spread: bool


@dataclass(frozen=True, slots=True)
class Start:
    """An empty KV pool, and graphs of these sizes to be captured (None: there are none)."""

    graphs: GraphSizes | None


Announced: TypeAlias = StepInput | Move | Blocks | Start


def encode_blocks(blocks: Blocks) -> Tensor:
    """The announcement that KV of blocks is collected or spread."""
    return torch.tensor([SPREAD if blocks.is_spread else COLLECT, len(blocks.ids), *blocks.ids], dtype=torch.int32)


def encode_start(graphs: GraphSizes | None) -> Tensor:
    """The announcement of a start."""
    words = [START]
    if graphs is not None:
        words += [graphs.max_rows, graphs.max_blocks, graphs.longest, int(graphs.with_trees), len(graphs.tokens), *graphs.tokens]
    return torch.tensor(words, dtype=torch.int32)


def encode_step(step: StepInput, block_size: int) -> Tensor:
    """The announcement of one forward; block tables are cut to the blocks that it reads."""
    words = [STEP, len(step.ids), step.padding, len(step.rows), len(step.wanted)]
    words += [*step.ids, *step.positions, *step.slots, *step.wanted]
    for row in step.rows:
        table = row.table[: -(-row.context // block_size)]
        words += [row.start, row.length, row.context, len(table), int(row.visible is not None), *table]
        if row.visible is not None:
            words += _pack(row.visible)
    return torch.tensor(words, dtype=torch.int32)


def encode_move(sources: list[int], targets: list[int]) -> Tensor:
    """The announcement of a move."""
    return torch.tensor([MOVE, len(sources), *sources, *targets], dtype=torch.int32)


def decode(words: Tensor) -> Announced | None:
    """What was announced; None at the end."""
    reader = _Reader(words.tolist())
    if not reader.words:
        return None
    (kind,) = reader.take(1)
    found = _READERS[kind](reader)
    assert reader.at == len(reader.words), "an announcement has the length that it says"
    return found


class _Reader:
    def __init__(self, words: list[int]) -> None:
        self.words = words
        self.at = 0

    def take(self, count: int) -> list[int]:
        self.at += count
        return self.words[self.at - count : self.at]


def _read_step(reader: _Reader) -> StepInput:
    count, padding, num_rows, num_wanted = reader.take(4)
    ids, positions, slots, wanted = (reader.take(n) for n in (count, count, count, num_wanted))
    return StepInput(ids, positions, slots, [_read_row(reader) for _ in range(num_rows)], wanted, padding)


def _read_move(reader: _Reader) -> Move:
    (count,) = reader.take(1)
    return Move(reader.take(count), reader.take(count))


def _read_start(reader: _Reader) -> Start:
    if reader.at == len(reader.words):
        return Start(None)
    max_rows, max_blocks, longest, with_trees, count = reader.take(5)
    return Start(GraphSizes(tuple(reader.take(count)), max_rows, max_blocks, longest, bool(with_trees)))


def _read_row(reader: _Reader) -> AttentionRow:
    start, length, context, num_blocks, is_tree = reader.take(5)
    table = array("i", reader.take(num_blocks))  # as a pool's
    visible = _unpack(reader.take(_num_words(length)), length) if is_tree else None
    return AttentionRow(start, length, context, table, visible)


_READERS: Final[Mapping[int, Callable[[_Reader], Announced]]] = {
    STEP: _read_step,
    MOVE: _read_move,
    START: _read_start,
    COLLECT: lambda reader: Blocks(reader.take(*reader.take(1)), is_spread=False),
    SPREAD: lambda reader: Blocks(reader.take(*reader.take(1)), is_spread=True),
}


def _num_words(length: int) -> int:
    return -(-length * length // 32)


def _pack(visible: Tensor) -> list[int]:
    """The bits of a mask [n, n], 32 a word."""
    bits = np.packbits(visible.cpu().numpy().reshape(-1))
    padded = np.zeros(4 * _num_words(len(visible)), dtype=np.uint8)
    padded[: len(bits)] = bits
    packed: list[int] = padded.view(np.int32).tolist()
    return packed


def _unpack(words: list[int], length: int) -> Tensor:
    bits = np.unpackbits(np.array(words, dtype=np.int32).view(np.uint8), count=length * length)
    return torch.from_numpy(bits.reshape(length, length).astype(bool))
