"""Projected context features of every position that a target's pool holds KV of, under the pool's block ids.

They cost a drafter's hidden size a position, 3 to 6 % of the target's KV, and make a remote drafter as robust as a grafted
one: after a prefix hit, a resumed request or the loss of a draft worker, whatever a worker lacks can be sent again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.types import BlockTables, DraftTurn
from dspark.workers.drafter.local import num_usable
from dspark.workers.drafter.paged_context import block_slots

Span = tuple[str, int, int]  # request id, first position, number of positions


class FeatureStore:
    """[num_blocks * block_size, width] features; requests share the rows of shared blocks."""

    def __init__(self, tables: BlockTables, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._tables = tables
        self._num_slots = tables.num_blocks * tables.block_size
        self._rows = torch.zeros(self._num_slots + 1, width, dtype=dtype, device=device)  # the last one takes what padding writes

    @property
    def bytes_per_position(self) -> int:
        return self._rows.shape[1] * self._rows.element_size()

    @property
    def num_bytes(self) -> int:
        return self._rows.nbytes

    def by_block(self) -> Tensor:
        """[num_blocks, block_size, width], the same memory."""
        return self._rows[: self._num_slots].view(self._tables.num_blocks, self._tables.block_size, -1)

    def write(self, turns: Sequence[DraftTurn]) -> None:
        """Keep the features of committed positions."""
        counts = [num_usable(turn) for turn in turns]
        spans = [(turn.request_id, turn.feature_start, count) for turn, count in zip(turns, counts, strict=True) if count > 0]
        if spans:
            features = torch.cat([turn.features[:count] for turn, count in zip(turns, counts, strict=True) if count > 0])
            self._rows[self._slots(spans)] = features.to(self._rows.dtype)

    def write_slots(self, features: Tensor, slots: Tensor) -> None:
        """Keep features [T, width] in slots [T]; -1 is padding. Nothing waits for the device."""
        places = torch.where(slots < 0, self._num_slots, slots).to(torch.int64)
        self._rows.index_copy_(0, places, features.to(self._rows.dtype))

    def at(self, slots: Tensor) -> Tensor:
        """Features [n, width] of slots [n]; of -1 what padding wrote last."""
        return self._rows.index_select(0, slots.to(torch.int64).remainder(self._num_slots + 1))

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """The features of slots [n] go to other slots."""
        self._rows.index_copy_(0, targets, self._rows.index_select(0, sources))

    def read(self, spans: Sequence[Span]) -> Tensor:
        """Features of all positions of some spans, one after the other."""
        return self._rows[self._slots(spans)]

    def _slots(self, spans: Sequence[Span]) -> Tensor:
        return torch.cat([block_slots(self._tables, *span) for span in spans]).to(self._rows.device)
