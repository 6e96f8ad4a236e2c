"""Drafting a block for R requests as one graph: from anchors and block tables to tokens, confidences and laws.

::

    anchors, positions, seeds, base_lens  [R] int64   x_0 of each request, where it sits, its noise, the round
    temperatures  [R] fp32       coupled [R] int32
    table_starts  [R], tables [N] int32 as in ``ragged_attention``
    outcome       [R, 3 * γ + 2] fp64 tokens, confidences, margins, anchor and position: one copy to the host

A block that continues a step of the target takes its anchor and position from what that step left on the device::

    first_rows, drafted  [R] int64   the step's row after the known tokens, and how many drafts were verified behind it
    positions            [R] int64   known tokens before the step: where its own token sits if no draft stands; 0 for padding
    own, matched         [N]         the target's token of every row of the step; whether the token behind a row is that one

Where some of the requests are sampled it leaves their drafts and laws for the judge of the next step.

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

from dspark.asked import COUPLED, records_in
from dspark.kernels.buckets import graph_sizes
from dspark.kernels.draft_rows import BlockStart, Paging, StepEnd, begin, begin_after, pack
from dspark.kernels.graphs import Capture, nothing_collected
from dspark.kernels.kv_store import Projected, rotate_and_store, store_kv
from dspark.kernels.paged_attention import AttentionShape
from dspark.kernels.ragged_attention import RaggedBatch, ragged_attention
from dspark.types import Continuations, DeviceDrafts, DeviceLaws, DraftedChains
from dspark.workers.drafter.block_draw import BlockDraft, DrawRows, draw_block
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.module_config import LayerMask
from dspark.workers.drafter.paged_context import DraftPools

HOST_COPIES = 3
HEAD_TOP_K = 512  # base logits that the sequential head works on, in one launch for the whole block
INT64_FIELDS = ("anchors", "positions", "seeds", "base_lens", "first_rows", "drafted")
GREEDY_WIDTH = 1  # greedy drafts ship no law: one candidate is enough
CONTINUING, CONTINUING_SAMPLED = 0, -1  # the keys of such graphs beside the widths of laws


@dataclass(frozen=True, slots=True)
class GraphDraft:
    """What a graph leaves, until the next one runs."""

    draft: BlockDraft
    outcome: Tensor
    on_device: DeviceDrafts


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
        store_kv(k.flatten(0, 1), v.flatten(0, 1), *self._pools.layer(layer), self._slots)
        return self._attend(layer, q.flatten(0, 1)).view_as(q)

    def attend_projected(self, layer: int, new: Projected) -> Tensor:
        """``attend`` from the merged projection of all blocks: [R * S, H, D]."""
        return self._attend(layer, rotate_and_store(new, *self._pools.layer(layer), self._slots))

    def _attend(self, layer: int, query: Tensor) -> Tensor:
        """Attention of queries [R * S, H, D] whose keys and values are stored."""
        config = self._pools.config
        kind = config.layer_masks[layer]
        window = kind.window + 1 if kind.window is not None and kind.from_anchor else kind.window
        shape = AttentionShape(config.attention_scale, window)
        return ragged_attention(query, *self._pools.layer(layer), self._batches[kind], shape)


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
        self._num_places = num_places(module)
        self._per_row = spare_blocks(self._num_places, pools.block_size)
        spare = np.arange(first_spare, first_spare + max_rows * self._per_row, dtype=np.int32)
        self._spare = [row.tobytes() for row in spare.reshape(max_rows, self._per_row)]
        is_cuda = pools.device.type == "cuda"
        words = self._spans(max_rows)[1] + max_rows * (max_blocks + self._per_row)
        self._device = torch.zeros(words, dtype=torch.int32, device=pools.device)
        self._pinned = [torch.zeros(words, dtype=torch.int32, pin_memory=is_cuda) for _ in range(HOST_COPIES)]
        columns = 3 * module.config.block_size + 2
        self._outcomes = [torch.zeros(max_rows * columns, dtype=torch.float64, pin_memory=is_cuda) for _ in range(HOST_COPIES)]
        num_slots = module.config.num_slots
        self._starts = torch.arange(0, max_rows * num_slots + 1, num_slots, dtype=torch.int32, device=pools.device)
        self._turn = 0
        self._replays: dict[tuple[int, int], Callable[[], GraphDraft]] = {}

    @torch.inference_mode()
    def prepare(self, capture: Capture, step_tokens: tuple[Tensor, Tensor] | None, laws: DeviceLaws | None = None) -> None:
        """Capture all sizes, the largest first. ``step_tokens``: where steps of a target leave ``own`` and ``matched``, if it is here.

        ``laws``: where its judge looks for drafts that are sampled.
        """
        empty = np.empty(0, dtype=np.int64)
        with nothing_collected():
            for size in self._sizes[::-1]:
                self._send(size, [], empty, empty)
                for width in self._widths:
                    self._replays[size, width] = capture(self._program(size, width))
                if step_tokens is not None:
                    self._replays[size, CONTINUING] = capture(self._continuing(size, *step_tokens, None))
                if step_tokens is not None and laws is not None:
                    self._replays[size, CONTINUING_SAMPLED] = capture(self._continuing(size, *step_tokens, laws))

    @torch.inference_mode()
    def launch(self, rows: Sequence[DraftRow]) -> tuple[GraphDraft, Outcome]:
        """Draft for the rows; nothing waits for the device. At most three outcomes may be unread."""
        width = self._widths[0] if all(row.temperature == 0.0 for row in rows) else self._widths[-1]
        size, count = self._size(len(rows)), len(rows)
        positions = np.fromiter((row.position for row in rows), np.int64, count)
        self._send(
            size,
            [row.table for row in rows],
            -(-positions // self._pools.block_size),
            positions,
            anchors=np.fromiter((row.anchor for row in rows), np.int64, count),
            seeds=np.fromiter((row.seed for row in rows), np.int64, count),
            base_lens=positions + 1,
            temperatures=np.fromiter((row.temperature for row in rows), np.float32, count),
            coupled=np.fromiter((row.is_coupled for row in rows), np.int32, count),
        )
        return self._replay(size, width)

    @torch.inference_mode()
    def continue_step(self, rows: Continuations, tables: Sequence[Sequence[int]]) -> tuple[GraphDraft, Outcome]:
        """Draft behind the step that was launched last, before anybody knows what it accepted.

        ``tables`` cover all positions that the step may commit.
        """
        size = self._size(len(tables))
        held = np.fromiter(map(len, tables), np.int64, len(tables))
        if rows.asked is None:
            self._send(size, tables, held, rows.base_lens, first_rows=rows.first_rows, drafted=rows.num_drafts)
            return self._replay(size, CONTINUING)
        asked = records_in(rows.asked)
        self._send(
            size,
            tables,
            held,
            rows.base_lens,
            first_rows=rows.first_rows,
            drafted=rows.num_drafts,
            seeds=asked["seed"].copy(),
            temperatures=asked["temperature"].copy(),
            coupled=(asked["rule"] == COUPLED).astype(np.int32),
        )
        return self._replay(size, CONTINUING_SAMPLED)

    def _size(self, num_rows: int) -> int:
        return next(size for size in self._sizes if size >= num_rows)

    def _replay(self, size: int, key: int) -> tuple[GraphDraft, Outcome]:
        found = self._replays[size, key]()
        return found, Outcome(found.outcome, self._outcomes[self._turn], self._module.config.block_size)

    def _fields(self, size: int) -> tuple[dict[str, Tensor], Paging]:
        """The device's fields of so many rows, and their tables."""
        spans, tables = self._spans(size)
        fields = {name: self._device[slice(*span)] for name, span in spans.items()}
        paging = Paging(
            fields["table_starts"], self._device[tables:], self._pools.block_size, self._num_places, self._module.config.num_slots
        )
        return fields | {name: fields[name].view(torch.int64) for name in INT64_FIELDS}, paging

    def _program(self, size: int, width: int) -> Callable[[], GraphDraft]:
        """Draft from anchors that the host knows."""
        fields, paging = self._fields(size)
        rows = DrawRows(fields["temperatures"].view(torch.float32), fields["seeds"], fields["base_lens"], fields["coupled"])

        def run() -> GraphDraft:
            draw = dataclasses.replace(rows, coupled=rows.coupled != 0)
            return self._draft(width, draw, begin(fields["anchors"], fields["positions"], paging), paging)

        return run

    def _continuing(self, size: int, own: Tensor, matched: Tensor, laws: DeviceLaws | None) -> Callable[[], GraphDraft]:
        """Draft from anchors that the last step of the target left: greedily, or by ``laws``, which are left there with the drafts."""
        fields, paging = self._fields(size)
        zeros = torch.zeros(size, dtype=torch.int64, device=self._pools.device)
        greedy = DrawRows(zeros.float(), zeros, zeros, zeros != 0)
        temperatures, seeds, coupled = fields["temperatures"].view(torch.float32), fields["seeds"], fields["coupled"]
        step = StepEnd(own, matched, fields["first_rows"], fields["drafted"], self._module.config.block_size)

        def run() -> GraphDraft:
            start = begin_after(step, fields["positions"], paging)
            if laws is None:
                return self._draft(GREEDY_WIDTH, greedy, start, paging)
            found = self._draft(self._widths[-1], DrawRows(temperatures, seeds, start.positions + 1, coupled != 0), start, paging)
            for kept, value in ((laws.tokens, found.draft.tokens), (laws.ids, found.draft.ids), (laws.probs, found.draft.probs)):
                kept[:size].copy_(value)
            return found

        return run

    def _draft(self, width: int, rows: DrawRows, start: BlockStart, paging: Paging) -> GraphDraft:
        """The block of every row (position 0 is padding: no anchor is a request's first token)."""
        config, pools = self._module.config, self._pools
        batch = RaggedBatch(
            positions=start.block_places,
            starts=self._starts[: start.contexts.shape[0] + 1],
            contexts=start.contexts,
            table_starts=paging.table_starts,
            tables=paging.tables,
            block_size=pools.block_size,
            longest=config.num_slots,
        )
        context = RaggedContext(pools, batch, start.block_slots, start.positions)
        hidden = self._module.block_hidden(start.anchors, start.positions, context)
        draft = draw_block(self._module, hidden, start.anchors, rows, width, max(HEAD_TOP_K, width))
        outcome = pack(draft.tokens, draft.confidence, draft.margin, start.anchors, start.positions)
        return GraphDraft(draft, outcome, DeviceDrafts(start.anchors, draft.tokens, start.places, start.slots))

    def _spans(self, size: int) -> tuple[dict[str, tuple[int, int]], int]:
        """Where the fields of so many rows lie, and where their tables begin, in 32-bit words."""
        sizes = dict.fromkeys(INT64_FIELDS, 2 * size)
        sizes |= {"temperatures": size, "coupled": size, "table_starts": size}
        spans: dict[str, tuple[int, int]] = {}
        begin = 0
        for name, count in sizes.items():
            spans[name] = (begin, begin + count)
            begin += -(-count // 4) * 4  # kernels are compiled anew for pointers that do not begin at 16 bytes
        return spans, begin

    def _send(
        self,
        size: int,
        tables: Sequence[Sequence[int]],
        held: NDArray[np.int64],
        positions: NDArray[np.int64],
        **others: NDArray[np.int64] | NDArray[np.int32] | NDArray[np.float32],
    ) -> None:
        """Send rows, padded to ``size``, to the device with one copy: the first ``held`` blocks of each table, then blocks of our own."""
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


class Outcome:
    """Tokens, confidences, margins, anchors and positions on their way to the host."""

    def __init__(self, outcome: Tensor, host: Tensor, block_size: int) -> None:
        self._block_size = block_size
        self._host = host[: outcome.numel()].view(outcome.shape)
        self._host.copy_(outcome, non_blocking=True)
        self._done: torch.cuda.Event | None = None
        if outcome.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def read(self, count: int) -> DraftedChains:
        """Wait for them; those of the first ``count`` rows."""
        if self._done is not None:
            self._done.synchronize()
        gamma = self._block_size
        numbers: NDArray[np.float64] = self._host[:count].numpy().copy()  # the buffer is filled again
        whole = numbers.astype(np.int64)
        return DraftedChains(whole[:, :gamma], numbers[:, gamma : 2 * gamma], numbers[:, 2 * gamma : -2], whole[:, -2], whole[:, -1])


def num_places(module: DSparkModule) -> int:
    """Positions of a block: its inputs, or anchor and drafts where those are more."""
    return max(module.config.num_slots, module.config.block_size + 1)


def spare_blocks(num_places: int, block_size: int) -> int:
    """Blocks that one drafted block may need beyond those of its context."""
    return -(-num_places // block_size)
