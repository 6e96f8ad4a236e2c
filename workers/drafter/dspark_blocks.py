"""Blocks of DSpark and DFlash modules over data on the device: what graphs hold."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dspark.kernels.draft_rows import BlockStart, Paging
from dspark.kernels.kv_store import Projected, rotate_and_store, store_kv
from dspark.kernels.paged_attention import AttentionShape
from dspark.kernels.ragged_attention import RaggedBatch, ragged_attention
from dspark.workers.drafter.block_draw import BlockDraft, DrawRows, draw_block
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.module_config import LayerMask
from dspark.workers.drafter.paged_context import DraftPools

HEAD_TOP_K = 512  # base logits that the sequential head works on, in one launch for the whole block


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


class DSparkBlocks:
    """``module`` over ``pools``, for at most ``max_rows`` requests at a time."""

    def __init__(self, module: DSparkModule, pools: DraftPools, max_rows: int) -> None:
        self.module, self.pools = module, pools
        inputs = module.config.num_slots
        self._starts = torch.arange(0, max_rows * inputs + 1, inputs, dtype=torch.int32, device=pools.device)

    def draft(self, width: int, rows: DrawRows, start: BlockStart, paging: Paging) -> BlockDraft:
        """The chain of every row."""
        return draw_block(self.module, self.hidden(start, paging), start.anchors, rows, width, max(HEAD_TOP_K, width))

    def hidden(self, start: BlockStart, paging: Paging) -> Tensor:
        """h_1 .. h_γ [R, γ, d] of every row's block."""
        batch = RaggedBatch(
            positions=start.block_places,
            starts=self._starts[: start.contexts.shape[0] + 1],
            contexts=start.contexts,
            table_starts=paging.table_starts,
            tables=paging.tables,
            block_size=self.pools.block_size,
            longest=self.module.config.num_slots,
        )
        context = RaggedContext(self.pools, batch, start.block_slots, start.positions)
        return self.module.block_hidden(start.anchors, start.positions, context)
