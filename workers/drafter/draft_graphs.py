"""Drafting a block for R requests as one graph: from anchors and block tables to tokens, confidences and laws.

::

    anchors, positions, seeds, base_lens  [R] int64   x_0 of each request, where it sits, its noise, the round
    temperatures  [R] fp32       coupled [R] int32
    slots         [R * S] int32  where the block's own keys and values are kept while it is drafted; -1: padding
    contexts      [R] int32      positions + S; 0 for padding            table_starts [R], tables [N] int32 as in ``ragged_attention``
    outcome       [3, R, γ] fp64 tokens, confidence, margin: one copy to the host

A block's keys and values go behind its context, to positions that have no target KV yet: the rest of the request's last block, which
nobody shares, and then blocks of the drafter's own. The target's next step writes the true context over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.buckets import graph_sizes
from dspark.kernels.graphs import Capture
from dspark.kernels.kv_store import store_kv
from dspark.kernels.paged_attention import AttentionShape
from dspark.kernels.ragged_attention import RaggedBatch, ragged_attention
from dspark.workers.drafter.block_draw import BlockDraft, DrawRows, draw_block
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.module_config import LayerMask
from dspark.workers.drafter.paged_context import DraftPools

HOST_COPIES = 3
INT64_FIELDS = ("anchors", "positions", "seeds", "base_lens")


@dataclass(frozen=True, slots=True)
class GraphDraft:
    """What a graph leaves, until the next one runs."""

    draft: BlockDraft
    outcome: Tensor


@dataclass(frozen=True, slots=True)
class DraftRow:
    """One request's block: ``table`` covers positions < ``position``, where the anchor sits."""

    anchor: int
    position: int
    seed: int
    temperature: float
    is_coupled: bool
    table: Sequence[int]


class RaggedContext:
    """The contexts of R requests as a ``BlockContext`` whose data lies on the device."""

    def __init__(self, pools: DraftPools, batch: RaggedBatch, slots: Tensor, anchors: Tensor) -> None:
        config = pools.config
        self._pools = pools
        self._slots = slots
        self._batches: dict[LayerMask, RaggedBatch] = {}
        for kind in set(config.layer_masks):
            # Seen from the anchor, a window w reaches positions >= anchor - w.
            positions = anchors.repeat_interleave(config.num_slots) if kind.from_anchor else batch.positions
            self._batches[kind] = dataclasses.replace(batch, positions=positions, sees_all=not kind.causal)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of q [R, S, H, D] over each row's context and block."""
        pools, kind = self._pools, self._pools.config.layer_masks[layer]
        store_kv(k.flatten(0, 1), v.flatten(0, 1), *pools.layer(layer), self._slots)
        window = kind.window + 1 if kind.window is not None and kind.from_anchor else kind.window
        shape = AttentionShape(pools.config.attention_scale, window)
        return ragged_attention(q.flatten(0, 1), *pools.layer(layer), self._batches[kind], shape).view_as(q)


class DraftGraphs:
    """Graphs for every number of rows up to ``max_rows``, for requests that are all greedy and for any.

    ``pools`` must have ``spare_blocks(...)`` blocks more than the target's pool, from block ``first_spare`` on.
    """

    def __init__(
        self, module: DSparkModule, pools: DraftPools, first_spare: int, max_rows: int, max_blocks: int, widths: tuple[int, ...]
    ) -> None:
        self._module, self._pools = module, pools
        self._sizes = graph_sizes(max_rows)
        self._widths = widths
        self._per_row = spare_blocks(module.config.num_slots, pools.block_size)
        spare = np.arange(first_spare, first_spare + max_rows * self._per_row, dtype=np.int32)
        self._spare = [row.tobytes() for row in spare.reshape(max_rows, self._per_row)]
        is_cuda = pools.device.type == "cuda"
        words = self._spans(max_rows)[1] + max_rows * (max_blocks + self._per_row)
        self._device = torch.zeros(words, dtype=torch.int32, device=pools.device)
        self._pinned = [torch.zeros(words, dtype=torch.int32, pin_memory=is_cuda) for _ in range(HOST_COPIES)]
        shape = (3, max_rows, module.config.block_size)
        self._outcomes = [torch.zeros(shape, dtype=torch.float64, pin_memory=is_cuda).flatten() for _ in range(HOST_COPIES)]
        self._turn = 0
        self._replays: dict[tuple[int, int], Callable[[], GraphDraft]] = {}

    @torch.inference_mode()
    def prepare(self, capture: Capture) -> None:
        """Capture all sizes, the largest first."""
        for size in self._sizes[::-1]:
            self._fill(size, [])
            for width in self._widths:
                self._replays[size, width] = capture(self._program(size, width))

    @torch.inference_mode()
    def launch(self, rows: Sequence[DraftRow]) -> tuple[GraphDraft, Outcome]:
        """Draft for the rows; nothing waits for the device. At most three outcomes may be unread."""
        size = next(size for size in self._sizes if size >= len(rows))
        width = self._widths[0] if all(row.temperature == 0.0 for row in rows) else self._widths[-1]
        self._fill(size, rows)
        found = self._replays[size, width]()
        return found, Outcome(found.outcome, self._outcomes[self._turn])

    def _program(self, size: int, width: int) -> Callable[[], GraphDraft]:
        config, pools = self._module.config, self._pools
        slots_a_row = config.num_slots
        spans, tables = self._spans(size)
        fields = {name: self._device[slice(*span)] for name, span in spans.items()}
        fields |= {name: fields[name].view(torch.int64) for name in INT64_FIELDS}
        batch = RaggedBatch(
            positions=torch.empty(0, device=pools.device),
            starts=torch.arange(0, size * slots_a_row + 1, slots_a_row, dtype=torch.int32, device=pools.device),
            contexts=fields["contexts"],
            table_starts=fields["table_starts"],
            tables=self._device[tables:],
            block_size=pools.block_size,
            longest=slots_a_row,
        )
        offsets = torch.arange(slots_a_row, device=pools.device)

        def run() -> GraphDraft:
            anchors, positions = fields["anchors"], fields["positions"]
            own = (positions.unsqueeze(1) + offsets).flatten()
            context = RaggedContext(pools, dataclasses.replace(batch, positions=own), fields["slots"], positions)
            hidden = self._module.block_hidden(anchors, positions, context)
            rows = DrawRows(fields["temperatures"].view(torch.float32), fields["seeds"], fields["base_lens"], fields["coupled"] != 0)
            draft = draw_block(self._module, hidden, anchors, rows, width, None)
            return GraphDraft(draft, torch.stack([draft.tokens.double(), draft.confidence.double(), draft.margin.double()]))

        return run

    def _spans(self, size: int) -> tuple[dict[str, tuple[int, int]], int]:
        """Where the fields of so many rows lie, and where their tables begin, in 32-bit words."""
        sizes = dict.fromkeys(INT64_FIELDS, 2 * size)
        sizes |= {"temperatures": size, "coupled": size, "contexts": size, "table_starts": size}
        sizes["slots"] = size * self._module.config.num_slots
        ends = np.cumsum(list(sizes.values())).tolist()
        return {name: (end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}, ends[-1]

    def _fill(self, size: int, rows: Sequence[DraftRow]) -> None:
        """Send the rows, padded to ``size``, to the device with one copy."""
        self._turn = (self._turn + 1) % HOST_COPIES
        words: NDArray[np.int32] = self._pinned[self._turn].numpy()
        spans, begin = self._spans(size)
        fields = {name: words[slice(*span)] for name, span in spans.items()}
        count, block_size, num_slots = len(rows), self._pools.block_size, self._module.config.num_slots
        positions = np.fromiter((row.position for row in rows), np.int64, count)
        self._put(fields["anchors"], np.fromiter((row.anchor for row in rows), np.int64, count))
        self._put(fields["positions"], positions)
        self._put(fields["seeds"], np.fromiter((row.seed for row in rows), np.int64, count))
        self._put(fields["base_lens"], positions + 1)
        self._put(fields["temperatures"], np.fromiter((row.temperature for row in rows), np.float32, count))
        self._put(fields["coupled"], np.fromiter((row.is_coupled for row in rows), np.int32, count))
        self._put(fields["contexts"], (positions + num_slots).astype(np.int32))
        held = -(-positions // block_size)  # blocks of the context; what the block needs beyond is its own
        counts = held + self._per_row
        starts = np.cumsum(counts) - counts
        self._put(fields["table_starts"], starts.astype(np.int32))
        parts = [part for row, spare, n in zip(rows, self._spare, held.tolist(), strict=False) for part in (row.table[:n], spare)]
        tables = np.frombuffer(b"".join(parts), dtype=np.int32)  # type: ignore[arg-type]
        words[begin : begin + len(tables)] = tables
        places = positions[:, None] + np.arange(num_slots)
        blocks = tables[starts[:, None] + places // block_size] if count else np.empty((0, num_slots), dtype=np.int64)
        slots = fields["slots"]
        slots[: count * num_slots] = (blocks.astype(np.int64) * block_size + places % block_size).ravel()
        slots[count * num_slots :] = -1
        end = begin + len(tables)
        self._device[:end].copy_(self._pinned[self._turn][:end], non_blocking=True)

    @staticmethod
    def _put(words: NDArray[np.int32], values: NDArray[np.int64] | NDArray[np.int32] | NDArray[np.float32]) -> None:
        """Values as they lie in memory, then zeros."""
        raw = values.view(np.int32)
        words[: len(raw)] = raw
        words[len(raw) :] = 0


class Outcome:
    """Tokens, confidences and margins on their way to the host."""

    def __init__(self, outcome: Tensor, host: Tensor) -> None:
        self._host = host[: outcome.numel()].view(outcome.shape)
        self._host.copy_(outcome, non_blocking=True)
        self._done: torch.cuda.Event | None = None
        if outcome.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def read(self) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
        """Wait for them: [R][γ] each, padding rows included."""
        if self._done is not None:
            self._done.synchronize()
        tokens: list[list[int]] = self._host[0].to(torch.int64).tolist()
        return tokens, self._host[1].tolist(), self._host[2].tolist()


def spare_blocks(num_slots: int, block_size: int) -> int:
    """Blocks that one drafted block may need beyond those of its context."""
    return -(-num_slots // block_size)
