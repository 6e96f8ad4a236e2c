"""The module against a naive transcription of the equations, in every variant, alone and in ragged batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.draft_modules import Tables, tiny_module, weights64
from helpers.dspark_equations import Sizes, hidden_states, laws_and_confidence
from torch import Tensor

from dspark.workers.drafter.block_draw import BlockDraft, DrawRows, draw_block, largest
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.fused import fuse_context, fuse_layers
from dspark.workers.drafter.module_config import HeadType, LayerMask, LayerStyle
from dspark.workers.drafter.paged_context import DraftPools, PagedContext

VOCAB = 32


def sizes_of(module: DSparkModule, **changes: Any) -> Sizes:
    c = module.config
    return Sizes(
        c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.block_size, c.mask_token_id,
        head_type=str(c.head_type), with_markov=c.confidence_with_markov, sample_from_anchor=c.sample_from_anchor,
        gemma=c.style is LayerStyle.GEMMA4, **changes,
    )  # fmt: skip


def random_taps(length: int, seed: int) -> Tensor:
    return torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))


def paged(module: DSparkModule, taps: list[Tensor]) -> PagedContext:
    """Feed whole contexts into pools whose blocks are handed out in a scattered order."""
    tables = Tables(num_blocks=512)
    pools = DraftPools(module.config, tables.num_blocks, tables.block_size, torch.float32, torch.device("cpu"))
    free = torch.randperm(512, generator=torch.Generator().manual_seed(3)).tolist()
    blocks = []
    for tap in taps:
        count = -(-len(tap) // 4)
        blocks.append([free.pop() for _ in range(count)])
        positions = torch.arange(len(tap))
        slots = torch.tensor(blocks[-1], dtype=torch.int64)[positions // 4] * 4 + positions % 4
        for layer, (k, v) in enumerate(module.context_kv(module.project(tap), positions)):
            pools.write(layer, slots, k, v)
    return PagedContext(pools, blocks, [len(tap) for tap in taps])


def draw_rows(num: int, temperature: float = 1.0, coupled: bool = False) -> DrawRows:
    return DrawRows(torch.full((num,), temperature), torch.arange(num), torch.full((num,), 9), torch.full((num,), coupled))


def run(
    module: DSparkModule, taps: list[Tensor], anchors: list[int], width: int = VOCAB, top_k: int | None = None, temperature: float = 1.0
) -> BlockDraft:
    lengths = torch.tensor([len(tap) for tap in taps])
    hidden = module.block_hidden(torch.tensor(anchors), lengths, paged(module, taps))
    return draw_block(module, hidden, torch.tensor(anchors), draw_rows(len(taps), temperature), width, top_k)


def check_row(
    module: DSparkModule, sizes: Sizes, taps: Tensor, anchor: int, draft: BlockDraft, row: int, temperature: float = 1.0, top_k: int = VOCAB
) -> None:
    """Laws and confidences of one row equal the equations', given the tokens that were drawn."""
    weights, shared = weights64(module), module._shared
    hidden = hidden_states(weights, sizes, shared.embed.double(), taps.double(), anchor)
    tokens = draft.tokens[row].tolist()
    base, biased, confidence = laws_and_confidence(weights, sizes, shared.lm_head.double(), hidden, anchor, tokens)
    torch.testing.assert_close(draft.confidence[row], torch.tensor(confidence), atol=2e-5, rtol=0)
    for k in range(len(tokens)):
        support = base[k].topk(top_k).indices
        law = torch.zeros(VOCAB, dtype=torch.float64)
        law[support] = torch.softmax(biased[k][support] / temperature, dim=0)
        got = torch.zeros(VOCAB).index_add_(0, draft.ids[row, k], draft.probs[row, k])
        torch.testing.assert_close(got.double(), law, atol=2e-5, rtol=0)
        best = torch.softmax(biased[k][support], dim=0).max()
        assert float(draft.margin[row, k]) == pytest.approx(float(torch.log(best / (1 - best))), abs=1e-4)


@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("with_markov", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_laws_and_confidence_equal_the_equations(head_type: str, with_markov: bool, temperature: float) -> None:
    module = tiny_module(head_type=HeadType(head_type), confidence_with_markov=with_markov)
    taps = random_taps(7, seed=1)
    draft = run(module, [taps], [5], temperature=temperature)
    check_row(module, sizes_of(module), taps, 5, draft, 0, temperature)


@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
def test_cheap_head_is_the_law_on_the_largest_base_logits(head_type: str) -> None:
    module = tiny_module(head_type=HeadType(head_type))
    taps = random_taps(6, seed=2)
    draft = run(module, [taps], [3], top_k=9)
    assert draft.ids.shape == (1, 4, 9)
    check_row(module, sizes_of(module), taps, 3, draft, 0, top_k=9)


def test_masks_predict_when_the_anchor_does_not() -> None:
    module = tiny_module(sample_from_anchor=False)
    taps = random_taps(5, seed=3)
    check_row(module, sizes_of(module), taps, 2, run(module, [taps], [2]), 0)


def test_gemma_arrangement_of_norms() -> None:
    module = tiny_module(style=LayerStyle.GEMMA4, activation="gelu_pytorch_tanh")
    taps = random_taps(5, seed=4)
    check_row(module, sizes_of(module), taps, 8, run(module, [taps], [8]), 0)


@pytest.mark.parametrize(
    ("mask", "changes"),
    [
        (LayerMask(5), {"window": 5}),
        (LayerMask(2), {"window": 2}),
        (LayerMask(5, from_anchor=True, causal=True), {"window": 5, "window_from_anchor": True, "causal": True}),
        (LayerMask(3, causal=True), {"window": 3, "causal": True}),
        (LayerMask(causal=True), {"causal": True}),
    ],
)
def test_windows_and_causal_blocks(mask: LayerMask, changes: dict[str, Any]) -> None:
    module = tiny_module(layer_masks=(mask, mask))
    taps = random_taps(11, seed=5)
    check_row(module, sizes_of(module, **changes), taps, 8, run(module, [taps], [8]), 0)


@pytest.mark.parametrize("masks", [(LayerMask(), LayerMask()), (LayerMask(6), LayerMask(causal=True))])
def test_a_ragged_batch_equals_each_request_alone(masks: tuple[LayerMask, ...]) -> None:
    module = tiny_module(layer_masks=masks)
    lengths = [9, 0, 1, 150, 4, 8, 60]
    taps = [random_taps(n, seed=n) for n in lengths]
    anchors = list(range(len(lengths)))
    hidden = module.block_hidden(torch.tensor(anchors), torch.tensor(lengths), paged(module, taps))
    for row, (tap, anchor) in enumerate(zip(taps, anchors, strict=True)):
        alone = module.block_hidden(torch.tensor([anchor]), torch.tensor([len(tap)]), paged(module, [tap]))
        torch.testing.assert_close(hidden[row], alone[0], atol=1e-5, rtol=1e-5)


def test_what_lies_beyond_the_context_is_never_seen() -> None:
    """Places of a block that hold no context yet may hold anything."""
    module = tiny_module()
    taps, anchor, length = random_taps(6, seed=6), torch.tensor([4]), torch.tensor([6])
    context = paged(module, [taps])
    clean = module.block_hidden(anchor, length, context)
    pools = context._pools
    used = torch.zeros(pools.num_blocks * 4, dtype=torch.bool)
    blocks = context._groups[0].blocks[0]
    used[[int(blocks[p // 4]) * 4 + p % 4 for p in range(6)]] = True
    for pool in pools._keys + pools._values:
        pool[~used] = 1e4
    torch.testing.assert_close(module.block_hidden(anchor, length, context), clean)


def test_confidence_of_a_token_does_not_depend_on_it() -> None:
    """Many draws of one block: c_1 and the first margin are one number, and those of k + 1 a function of x_1 .. x_k."""
    module = tiny_module(head_type=HeadType.RNN)
    taps = random_taps(6, seed=8)
    draft = run(module, [taps] * 200, [3] * 200)
    by_prefix: dict[tuple[int, ...], tuple[float, float]] = {}
    distinct_next: dict[tuple[int, ...], set[int]] = {}
    for tokens, confidence, margin in zip(draft.tokens.tolist(), draft.confidence.tolist(), draft.margin.tolist(), strict=True):
        for k in range(4):
            prefix = tuple(tokens[:k])
            assert by_prefix.setdefault(prefix, (confidence[k], margin[k])) == pytest.approx((confidence[k], margin[k]), abs=1e-5)
            distinct_next.setdefault(prefix, set()).add(tokens[k])
    assert len(distinct_next[()]) > 3


def test_without_a_head_confidence_is_the_best_tokens_probability() -> None:
    module = tiny_module(has_confidence=False, confidence_with_markov=False)
    draft = run(module, [random_taps(6, seed=8)], [3])
    torch.testing.assert_close(draft.confidence, draft.probs.amax(-1), atol=1e-5, rtol=0)
    assert not module.signals.has_head
    assert tiny_module().signals.has_head


def test_tokens_follow_the_law_that_is_shipped() -> None:
    from scipy.stats import chisquare

    module = tiny_module()
    num = 4000
    taps = random_taps(3, seed=9)
    hidden = module.block_hidden(torch.tensor([3]), torch.tensor([3]), paged(module, [taps])).expand(num, -1, -1)
    for coupled in (False, True):
        draft = draw_block(module, hidden, torch.full((num,), 3), draw_rows(num, 1.3, coupled), 6, 12)
        law = torch.zeros(VOCAB).index_add_(0, draft.ids[0, 0], draft.probs[0, 0])
        counts = torch.bincount(draft.tokens[:, 0], minlength=VOCAB)
        assert int(counts[law == 0].sum()) == 0
        keep = law > 0
        assert chisquare(counts[keep].numpy(), (law[keep] / law.sum() * num).double().numpy(), sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize(("vocab", "count"), [(4096, 64), (4100, 64), (96, 90), (64, 3)])
def test_largest_finds_what_topk_finds(vocab: int, count: int) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    values, ids = largest(logits, count)
    expected = logits.topk(count, dim=-1)
    assert torch.equal(values.sort(dim=-1, descending=True).values, expected.values)
    assert torch.equal(ids.sort(dim=-1).values, expected.indices.sort(dim=-1).values)
    assert torch.equal(logits.gather(1, ids), values)


def test_training_form_of_the_head_equals_the_drawing_form() -> None:
    for head_type in (HeadType.VANILLA, HeadType.GATED, HeadType.RNN):
        head = tiny_module(head_type=head_type).markov_head
        assert head is not None
        previous, hidden = torch.randint(0, VOCAB, (3, 4)), torch.randn(3, 4, 16)
        block = head.block_bias(previous, hidden)
        state = head.start(3)
        for k in range(4):
            state, latent = head.step(state, head.markov_w1(previous[:, k]), hidden[:, k])
            torch.testing.assert_close(block[:, k], head.bias(latent, None))
            some = torch.randint(0, VOCAB, (3, 5))
            torch.testing.assert_close(head.bias(latent, some), block[:, k].gather(1, some), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "attention_bias": True}])
def test_fused_layers_draft_the_same(changes: dict[str, Any]) -> None:
    taps, anchors = [random_taps(9, 1), random_taps(4, 2), random_taps(13, 3)], [3, 20, 7]
    module, fused = tiny_module(5, **changes), tiny_module(5, **changes)
    assert fuse_layers(fused)
    wanted, found = run(module, taps, anchors), run(fused, taps, anchors)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.probs, wanted.probs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.confidence, wanted.confidence, atol=1e-5, rtol=1e-4)
    for (k, v), (fused_k, fused_v) in zip(
        *(each.context_kv(each.project(taps[0]), torch.arange(9)) for each in (module, fused)), strict=True
    ):
        torch.testing.assert_close((fused_k, fused_v), (k, v), atol=1e-5, rtol=1e-4)
    features, positions, slots = module.project(taps[0]), torch.arange(9), torch.arange(9).flip(0) + 3
    slots[4] = -1
    pools, context = DraftPools(module.config, 2, 16, features.dtype, features.device), fuse_context(fused)
    assert context is not None
    context.store(features, fused.rotary(positions, features.dtype), pools, slots)
    for layer, (k, v) in enumerate(module.context_kv(features, positions)):
        for pool, values in zip(pools.layer(layer), (k, v), strict=True):
            torch.testing.assert_close(pool[slots[slots >= 0]], values[slots >= 0], atol=1e-5, rtol=1e-4)
            assert not pool[:3].any()


def test_layers_of_another_kind_are_not_fused() -> None:
    assert not fuse_layers(tiny_module(style=LayerStyle.GEMMA4))
    assert fuse_context(tiny_module()) is None
    assert not fuse_layers(tiny_module(activation="gelu"))
