"""EAGLE-3 chains over data on the device: what graphs hold, and what a target's forward keeps for them.

An entry needs the token of its position and the feature of the position before. The forward knows both, except the feature before a
row's first token, which an earlier step left: so features are kept for every position, under the target's block ids. Entries of drafts
that fall, and what the chains write behind their contexts, are overwritten by the step that computes those positions.

::

    before   [T]        the slot of the position before each token, -1: there is none (and nobody sees that entry)
    chain    step k writes the entry of position p + k, p the anchor's, and attends to positions 1 .. p + k
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.kernels.draft_draw import draw, log_odds, truncate_law
from dspark.kernels.draft_rows import BlockStart, Paging
from dspark.kernels.kv_store import store_kv
from dspark.kernels.paged_attention import AttentionShape
from dspark.kernels.ragged_attention import RaggedBatch, ragged_attention
from dspark.types import FedStep
from dspark.workers.drafter.block_draw import BlockDraft, DrawRows, base_law, joined, target_ids
from dspark.workers.drafter.dspark_blocks import HEAD_TOP_K
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.feature_store import FeatureStore
from dspark.workers.drafter.paged_context import DraftPools


class EntryFeed:
    """Writes the entries of a target's step where the step writes its own KV."""

    def __init__(self, module: Eagle3Module, pools: DraftPools, features: FeatureStore) -> None:
        self._module, self._pools, self._features = module, pools, features

    def __call__(self, taps: Tensor, ids: Tensor, positions: Tensor, step: FedStep) -> None:
        self._features.write_slots(self._module.project(taps), step.slots)
        before = self._features.at(step.slots_before(positions))
        k, v = self._module.context_kv(ids, before, positions)
        store_kv(k, v, *self._pools.layer(0), step.slots)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Entries and features of slots go to other slots, as the target's KV does."""
        self._pools.move(sources, targets)
        self._features.move(sources, targets)


class _Chains:
    """The contexts of R chains, one entry longer with every step, as a ``ChainContext``."""

    def __init__(self, pools: DraftPools, starts: Tensor, start: BlockStart, paging: Paging) -> None:
        self._pools, self._starts, self._start, self._paging = pools, starts, start, paging
        self._slots, self._positions = (part.t().contiguous() for part in (start.slots, start.places))
        self._step = 0

    @property
    def positions(self) -> Tensor:
        """[R]: where the entries of the coming step are."""
        return self._positions[self._step]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take in the entries' k and v [R, Hkv, D]; attention of q [R, H, D] over context and chain."""
        store_kv(k, v, *self._pools.layer(0), self._slots[self._step])
        batch = RaggedBatch(
            positions=self.positions,
            starts=self._starts,
            contexts=(self._start.contexts - (self._paging.num_inputs - 1 - self._step)).clamp(min=0),
            table_starts=self._paging.table_starts,
            tables=self._paging.tables,
            block_size=self._pools.block_size,
        )
        self._step += 1
        shape = AttentionShape(self._pools.config.attention_scale, first=1)
        return ragged_attention(q.contiguous(), *self._pools.layer(0), batch, shape)


class Eagle3Blocks:
    """``module`` over ``pools`` and the features of all positions, for at most ``max_rows`` requests at a time."""

    def __init__(self, module: Eagle3Module, pools: DraftPools, features: FeatureStore, max_rows: int) -> None:
        self.module, self.pools, self._features = module, pools, features
        self._starts = torch.arange(max_rows + 1, dtype=torch.int32, device=pools.device)

    def draft(self, width: int, rows: DrawRows, start: BlockStart, paging: Paging) -> BlockDraft:
        """The chain of every row."""
        module, num_rows = self.module, start.anchors.shape[0]
        context = _Chains(self.pools, self._starts[: num_rows + 1], start, paging)
        features, previous = self._before(start, paging), start.anchors
        tokens, laws, margins = [], [], []
        for k in range(module.config.block_size):
            features = module.step(previous, features, context.positions, context)
            base, candidates = base_law(module, module.hidden(features).unsqueeze(1), max(HEAD_TOP_K, width))
            logits = base[:, 0].to(torch.float32)
            margins.append(log_odds(logits))
            local, probs = truncate_law(logits, rows.temperature, width)
            ids = target_ids(module, local if candidates is None else candidates[:, 0].gather(1, local))
            previous = draw(ids, probs, rows.seeds, rows.base_lens + k, rows.base_lens, rows.coupled)
            tokens.append(previous)
            laws.append((ids, probs))
        return joined(tokens, laws, margins)

    def _before(self, start: BlockStart, paging: Paging) -> Tensor:
        """Features [R, d] of the positions before the anchors; of padding those of any."""
        positions, size = (start.positions - 1).clamp(min=0), paging.block_size
        blocks = paging.tables.index_select(0, paging.table_starts + positions // size)
        return self._features.at(blocks * size + positions % size)
