"""Who sees whom in training: by enumeration, and by comparing with what serving computes for the same anchors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.draft_modules import EAGLE3, Tables, make_turn, random_module, tiny_module
from helpers.engines import tiny_target
from torch import Tensor

from dspark.sampling import SamplingParams
from dspark.training.batches import Batch
from dspark.training.block_context import block_visibility
from dspark.training.chain_context import chain_visibility
from dspark.training.drafting import draft
from dspark.training.features import FeatureReader
from dspark.workers.build import target_head
from dspark.workers.drafter.eagle3_local import Eagle3Drafter
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.module_config import HeadType, LayerMask
from dspark.workers.drafter.paged_context import DraftPools, PagedContext

LENGTH, SLOTS = 9, 3
MASKS = [
    LayerMask(),
    LayerMask(causal=True),
    LayerMask(2),
    LayerMask(4, causal=True),
    LayerMask(3, from_anchor=True),
    LayerMask(3, from_anchor=True, causal=True),
]


def may_see(kind: LayerMask, anchor: int, query: int, key: int, is_context: bool) -> bool:
    """The definition: query and key are positions; a block's own inputs sit at anchor, anchor + 1, …"""
    if is_context:
        if key >= anchor:
            return False
        if kind.window is None:
            return True
        return key >= anchor - kind.window if kind.from_anchor else key > query - kind.window
    if kind.causal and key > query:
        return False
    return kind.window is None or kind.from_anchor or key > query - kind.window


@pytest.mark.parametrize("kind", MASKS, ids=str)
def test_block_masks_by_enumeration(kind: LayerMask) -> None:
    anchors = torch.tensor([[2, 6], [5, 5], [1, 8]])
    mask = block_visibility(anchors, LENGTH, SLOTS, kind)
    assert mask.shape == (3, 2 * SLOTS, LENGTH + 2 * SLOTS)
    for row, block, slot in itertools.product(range(3), range(2), range(SLOTS)):
        anchor = int(anchors[row, block])
        seen = mask[row, block * SLOTS + slot]
        for key in range(LENGTH):
            assert bool(seen[key]) == may_see(kind, anchor, anchor + slot, key, True)
        for other, place in itertools.product(range(2), range(SLOTS)):
            own = other == block and may_see(kind, anchor, anchor + slot, anchor + place, False)
            assert bool(seen[LENGTH + other * SLOTS + place]) == own


@pytest.mark.parametrize("num_steps", [1, 3])
def test_chain_masks_by_enumeration(num_steps: int) -> None:
    """A chain sees entries 1 .. anchor - 1 of the context (position 0 has none) and all of its own so far."""
    anchors = torch.tensor([[1, 6], [5, 5]])
    mask = chain_visibility(anchors, LENGTH, num_steps)
    assert mask.shape == (2, 2, LENGTH + 2 * num_steps)
    for row, block in itertools.product(range(2), range(2)):
        for key in range(LENGTH):
            assert bool(mask[row, block, key]) == (1 <= key < int(anchors[row, block]))
        for other, step in itertools.product(range(2), range(num_steps)):
            assert bool(mask[row, block, LENGTH + other * num_steps + step]) == (other == block)


def batch_of(tokens: Tensor, anchors: Tensor) -> Batch:
    rows = len(tokens)
    lengths, ones = torch.full((rows,), tokens.shape[1]), torch.ones(rows, dtype=torch.int64)
    return Batch(tokens, lengths, ones, anchors, torch.ones_like(anchors, dtype=torch.bool), torch.zeros(rows), torch.arange(rows))


TOKENS = torch.randint(0, 32, (2, 20), generator=torch.Generator().manual_seed(1))
TAPS = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(2))
ANCHORS = torch.tensor([[1, 7, 12], [3, 3, 15]])
PLACES = (ANCHORS.unsqueeze(-1) + torch.arange(4)).clamp_max(19)
PREVIOUS = TOKENS.unsqueeze(1).expand(-1, 3, -1).gather(2, PLACES).flatten(0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_masks": (LayerMask(5), LayerMask(3, from_anchor=True, causal=True))},
        {"sample_from_anchor": False, "head_type": HeadType.NONE, "markov_rank": 0, "confidence_with_markov": False},
    ],
    ids=["dspark", "windows", "dflash"],
)
def test_training_computes_the_blocks_that_serving_computes(changes: dict[str, Any]) -> None:
    module = tiny_module(**changes)
    found = draft(module, batch_of(TOKENS, ANCHORS), TAPS, PREVIOUS)
    for row, place in itertools.product(range(2), range(3)):
        anchor = int(ANCHORS[row, place])
        pools = DraftPools(module.config, 16, 4, torch.float32, torch.device("cpu"))
        for layer, (k, v) in enumerate(module.context_kv(module.project(TAPS[row]), torch.arange(20))):
            pools.write(layer, torch.arange(20), k, v)
        context = PagedContext(pools, [[0, 1, 2, 3, 4]], [anchor])
        served = module.block_hidden(TOKENS[row, anchor].view(1), torch.tensor([anchor]), context)
        torch.testing.assert_close(found.hidden[row * 3 + place], served[0], atol=1e-5, rtol=1e-5)


def test_training_computes_the_chains_that_serving_drafts() -> None:
    """A greedy chain is drafted; training on a text that continues so must give laws with the same best tokens and margins."""
    target = tiny_target()
    module = random_module(target, **EAGLE3, block_size=4)
    assert isinstance(module, Eagle3Module)
    reader = FeatureReader(target, target_head(target), module.config.target_layer_ids)
    text = torch.randint(3, 150, (1, 14), generator=torch.Generator().manual_seed(4))
    taps, _ = reader.run(text)
    reader.close()
    tables = Tables()
    tables.blocks["r"] = [5, 1, 9, 2]
    drafter = Eagle3Drafter(module, tables, law_width=160)
    sampling = SamplingParams(temperature=1.0)
    drafter.propose([make_turn("r", 14, text[0].tolist(), drafter.project(taps[0, :13]), sampling=sampling)])
    tree = drafter.collect({"r": 4}, 0.0)["r"]
    assert tree.law is not None
    whole = torch.cat((text, torch.tensor([list(tree.tokens)])), dim=1)
    more = torch.cat((taps, torch.randn(1, 4, taps.shape[-1])), dim=1)  # features behind the anchor must not matter
    found = draft(module, batch_of(whole, torch.tensor([[13]])), more, whole[:, 13:17])
    laws = torch.softmax(module.base_logits(found.hidden[0]).float(), dim=-1)
    for k in range(4):
        drafted = torch.zeros(160).index_add_(0, tree.law.ids[k], tree.law.probs[k])
        torch.testing.assert_close(laws[k], drafted, atol=1e-5, rtol=0)
