"""What changes from one drafted batch to the next, in one buffer that never moves: filled on the host, sent to the device with one copy.

::

    anchors, positions, seeds, base_lens  [R] int64   x_0 of each request, where it sits, its noise, the round
    temperatures  [R] fp32       coupled, levels [R] int32
    table_starts  [R], tables [N] int32 as in ``ragged_attention``

Drafts that continue a step of the target take their anchors and positions from what that step left on the device::

    first_rows, drafted  [R] int64   the step's row after the known tokens, and how many drafts were verified behind it
    positions            [R] int64   known tokens before the step: where its own token sits if no draft stands; 0 for padding

What is drafted has keys and values behind the context, at positions that have no target KV yet: the rest of the request's last block,
which nobody shares, and then blocks of the drafter's own. The target's next step writes the true context over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.draft_rows import Paging
from dspark.workers.drafter.block_draw import DrawRows
from dspark.workers.drafter.module_config import ModuleConfig
from dspark.workers.drafter.paged_context import DraftPools

HOST_COPIES = 3
INT64_FIELDS = ("anchors", "positions", "seeds", "base_lens", "first_rows", "drafted")
INT32_FIELDS = ("temperatures", "coupled", "levels", "table_starts")


@dataclass(frozen=True, slots=True)
class DraftRow:
    """What one request drafts: ``table`` covers positions < ``position``, where the anchor sits. ``levels``: of a tree, at most."""

    anchor: int
    position: int
    seed: int
    temperature: float
    is_coupled: bool
    table: Sequence[int]
    levels: int = 0


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """The fields of so many rows on the device."""

    anchors: Tensor
    positions: Tensor
    first_rows: Tensor
    drafted: Tensor
    levels: Tensor
    draw: DrawRows  # ``coupled`` is int32 here
    paging: Paging


class DraftBuffers:
    """Rows of at most ``max_rows`` requests, whose tables have at most ``max_blocks`` blocks.

    ``pools`` must have ``spare_blocks(...)`` blocks more a row than the target's, from block ``first_spare`` on.
    """

    def __init__(self, pools: DraftPools, first_spare: int, max_rows: int, max_blocks: int) -> None:
        device, block_size = pools.device, pools.block_size
        self.block_size, self._num_inputs, self._num_places = block_size, pools.config.num_slots, num_places(pools.config)
        self._per_row = spare_blocks(pools.config, block_size)
        spare = np.arange(first_spare, first_spare + max_rows * self._per_row, dtype=np.int32)
        self._spare = [row.tobytes() for row in spare.reshape(max_rows, self._per_row)]
        words = self._spans(max_rows)[1] + max_rows * (max_blocks + self._per_row)
        self._device = torch.zeros(words, dtype=torch.int32, device=device)
        self._pinned = [torch.zeros(words, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(HOST_COPIES)]
        self._turn = 0

    def rows(self, size: int) -> DeviceRows:
        """The device's fields of so many rows."""
        spans, tables = self._spans(size)
        fields = {name: self._device[slice(*span)] for name, span in spans.items()}
        fields |= {name: fields[name].view(torch.int64) for name in INT64_FIELDS}
        paging = Paging(fields["table_starts"], self._device[tables:], self.block_size, self._num_places, self._num_inputs)
        draw = DrawRows(fields["temperatures"].view(torch.float32), fields["seeds"], fields["base_lens"], fields["coupled"])
        return DeviceRows(fields["anchors"], fields["positions"], fields["first_rows"], fields["drafted"], fields["levels"], draw, paging)

    def send_rows(self, size: int, rows: Sequence[DraftRow]) -> None:
        """Send requests, padded to ``size``, to the device."""
        count = len(rows)
        positions = np.fromiter((row.position for row in rows), np.int64, count)
        self.send(
            size,
            [row.table for row in rows],
            -(-positions // self.block_size),
            positions,
            anchors=np.fromiter((row.anchor for row in rows), np.int64, count),
            seeds=np.fromiter((row.seed for row in rows), np.int64, count),
            base_lens=positions + 1,
            temperatures=np.fromiter((row.temperature for row in rows), np.float32, count),
            coupled=np.fromiter((row.is_coupled for row in rows), np.int32, count),
            levels=np.fromiter((row.levels for row in rows), np.int32, count),
        )

    def send(
        self,
        size: int,
        tables: Sequence[Sequence[int]],
        held: NDArray[np.int64],
        positions: NDArray[np.int64],
        **others: NDArray[np.int64] | NDArray[np.int32] | NDArray[np.float32],
    ) -> None:
        """Send rows, padded to ``size``, with one copy: the first ``held`` blocks of each table, then blocks of our own."""
        self._turn = (self._turn + 1) % HOST_COPIES
        words: NDArray[np.int32] = self._pinned[self._turn].numpy()
        spans, begin = self._spans(size)
        counts = held + self._per_row
        starts = (np.cumsum(counts) - counts).astype(np.int32)
        for name, values in {"positions": positions, "table_starts": starts, **others}.items():
            field = words[slice(*spans[name])]
            raw = values.view(np.int32)
            field[: len(raw)] = raw
            field[len(raw) :] = 0
        parts = [part for table, spare, n in zip(tables, self._spare, held.tolist(), strict=False) for part in (table[:n], spare)]
        blocks = np.frombuffer(b"".join(parts), dtype=np.int32)  # type: ignore[arg-type]
        end = begin + len(blocks)
        words[begin:end] = blocks
        self._device[:end].copy_(self._pinned[self._turn][:end], non_blocking=True)

    def _spans(self, size: int) -> tuple[dict[str, tuple[int, int]], int]:
        """Where the fields of so many rows lie, and where their tables begin, in 32-bit words."""
        sizes = dict.fromkeys(INT64_FIELDS, 2 * size) | dict.fromkeys(INT32_FIELDS, size)
        spans: dict[str, tuple[int, int]] = {}
        begin = 0
        for name, count in sizes.items():
            spans[name] = (begin, begin + count)
            begin += -(-count // 4) * 4  # kernels are compiled anew for pointers that do not begin at 16 bytes
        return spans, begin


def host_buffers(size: int, device: torch.device) -> list[Tensor]:
    """Buffers of so many numbers for ``HostCopy``, to be used in turn."""
    return [torch.zeros(size, dtype=torch.float64, pin_memory=device.type == "cuda") for _ in range(HOST_COPIES)]


def num_places(config: ModuleConfig) -> int:
    """Positions of a row that are named: its inputs, or anchor and drafts where those are more."""
    return max(config.num_slots, config.block_size + 1)


def spare_blocks(config: ModuleConfig, block_size: int) -> int:
    """Blocks of the pool that one draft may need beyond those of its context."""
    return -(-num_places(config) // block_size)
