"""LocalDrafter: what it drafts depends on the text and the weights, not on how the context reached its pools."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.draft_modules import Tables, make_turn, tiny_module

from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import DraftTree
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.verifier.survival import SIGNALS, make_estimator

RATIO = SamplingParams(temperature=0.8)
COUPLED = SamplingParams(temperature=0.8, seed=11)
GREEDY = SamplingParams(temperature=0.0)
TOKENS = [int(t) for t in torch.randint(0, 32, (40,), generator=torch.Generator().manual_seed(1))]
TAPS = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))


def drafter_with(module: DSparkModule, **blocks: Sequence[int]) -> LocalDrafter:
    tables = Tables()
    tables.blocks = {request_id: list(ids) for request_id, ids in blocks.items()}
    return LocalDrafter(module, tables)


def feed(drafter: LocalDrafter, request_id: str, base_len: int, start: int = 0, known: int = 0, **changes: Any) -> None:
    """One turn: tokens ``known .. base_len``, features of positions ``start .. base_len - 1``."""
    features = drafter.project(TAPS[start : base_len - 1].to(drafter.pools.device))
    drafter.propose([make_turn(request_id, base_len, TOKENS[known:base_len], features, start, **changes)])


def same(one: DraftTree, other: DraftTree) -> None:
    assert (one.base_len, one.tokens) == (other.base_len, other.tokens)
    assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
    assert one.margin == pytest.approx(other.margin, abs=1e-4)
    assert (one.law is None) == (other.law is None)
    if one.law is not None and other.law is not None:
        assert torch.equal(one.law.ids, other.law.ids)
        torch.testing.assert_close(one.law.probs, other.law.probs)


def one_shot(module: DSparkModule, base_len: int, sampling: SamplingParams = GREEDY) -> DraftTree:
    drafter = drafter_with(module, r=range(16))
    feed(drafter, "r", base_len, sampling=sampling)
    return drafter.collect({"r": 4}, 0.0)["r"]


@pytest.mark.parametrize("sampling", [GREEDY, RATIO, COUPLED])
def test_feeding_in_pieces_equals_one_shot(sampling: SamplingParams) -> None:
    module = tiny_module()
    drafter = drafter_with(module, r=range(16))
    for start, stop in ((0, 5), (5, 6), (6, 14)):  # prefill chunks: all tokens are known at once, features come bit by bit
        features = drafter.project(TAPS[start:stop])
        tokens = TOKENS[:15] if start == 0 else []
        drafter.propose([make_turn("r", 15, tokens, features, start, max_draft=0, sampling=sampling)])
        assert drafter.collect({"r": 4}, 0.0) == {}
    for before, base_len in ((15, 16), (16, 18), (18, 21)):
        feed(drafter, "r", base_len, start=before - 1, known=before, sampling=sampling)
        same(drafter.collect({"r": 4}, 0.0)["r"], one_shot(module, base_len, sampling))


def test_block_ids_do_not_matter() -> None:
    module = tiny_module()
    drafter = drafter_with(module, r=[63, 0, 17, 5, 40, 2])
    feed(drafter, "r", 22)
    same(drafter.collect({"r": 4}, 0.0)["r"], one_shot(module, 22))


def test_a_prefix_hit_needs_no_features_of_the_prefix() -> None:
    module = tiny_module()
    drafter = drafter_with(module, first=[9, 8, 7, 6], second=[9, 8, 30, 31])
    feed(drafter, "first", 14, max_draft=0)
    drafter.close(["first"])
    feed(drafter, "second", 14, start=8)
    same(drafter.collect({"second": 4}, 0.0)["second"], one_shot(module, 14))


def test_a_preempted_request_goes_on() -> None:
    """Its blocks are lost to another request, it gets others and its features are computed again, up to where it was."""
    module = tiny_module()
    drafter = drafter_with(module, r=[1, 2, 3, 4])
    feed(drafter, "r", 13)
    before = drafter.collect({"r": 4}, 0.0)["r"]
    drafter._tables.blocks.update(other=[1, 2, 3, 4], r=[10, 11, 12, 13])  # type: ignore[attr-defined]
    features = drafter.project(torch.randn(12, 32))
    drafter.propose([make_turn("other", 13, TOKENS[:13], features)])
    drafter.propose([make_turn("r", 13, [], drafter.project(TAPS[:7]), 0, max_draft=0)])
    drafter.propose([make_turn("r", 13, [], drafter.project(TAPS[7:12]), 7)])
    same(drafter.collect({"r": 4}, 0.0)["r"], before)


def test_requests_of_a_batch_do_not_see_each_other() -> None:
    module = tiny_module()
    drafter = drafter_with(module, a=[1, 2, 3, 4, 5, 6], b=[10], c=[20, 21, 22])
    turns = []
    for request_id, base_len, sampling in (("a", 22, GREEDY), ("b", 1, COUPLED), ("c", 9, RATIO)):
        features = drafter.project(TAPS[: base_len - 1])
        turns.append(make_turn(request_id, base_len, TOKENS[:base_len], features, sampling=sampling))
    drafter.propose(turns)
    trees = drafter.collect({"a": 4, "b": 4, "c": 4}, 0.0)
    same(trees["a"], one_shot(module, 22))
    same(trees["b"], one_shot(module, 1, COUPLED))
    same(trees["c"], one_shot(module, 9, RATIO))


def test_features_of_rejected_drafts_are_not_stored() -> None:
    module = tiny_module()
    drafter = drafter_with(module, r=range(16), other=[3])
    feed(drafter, "other", 5)
    kept = [pool.clone() for pool in drafter.pools._keys]
    features = drafter.project(torch.cat([TAPS[:11], torch.randn(4, 32)]))
    drafter.propose([make_turn("r", 12, TOKENS[:12], features)])
    same(drafter.collect({"r": 4}, 0.0)["r"], one_shot(module, 12))
    for pool, before in zip(drafter.pools._keys, kept, strict=True):
        assert torch.equal(pool[11:], before[11:])


def test_limits() -> None:
    drafter = drafter_with(tiny_module(), r=range(16), s=range(16, 32))
    feed(drafter, "r", 10, max_draft=3, sampling=RATIO)
    feed(drafter, "s", 12, sampling=RATIO)
    trees = drafter.collect({"r": 9, "s": 2, "unknown": 4}, 0.0)
    assert [len(trees["r"].tokens), len(trees["s"].tokens)] == [3, 2]
    for tree in trees.values():
        assert tree.is_chain
        assert tree.law is not None
        assert tree.law.ids.shape == tree.law.probs.shape == (len(tree.tokens), 32)
        torch.testing.assert_close(tree.law.probs.sum(-1), torch.ones(len(tree.tokens)))
        assert all(0 < c < 1 for c in tree.confidence)
        assert len(tree.margin) == len(tree.tokens)
    assert drafter.collect({"r": 0}, 0.0) == {}
    drafter.close(["r", "unknown"])
    assert drafter.collect({"r": 4}, 0.0) == {}


def test_a_shorter_draft_is_the_beginning_of_the_longer() -> None:
    module = tiny_module()
    for sampling in (GREEDY, RATIO, COUPLED):
        long = one_shot(module, 12, sampling)
        drafter = drafter_with(module, r=range(16))
        feed(drafter, "r", 12, sampling=sampling)
        assert drafter.collect({"r": 2}, 0.0)["r"].tokens == long.tokens[:2]


def test_only_ratio_requests_carry_a_law() -> None:
    module = tiny_module()
    assert one_shot(module, 12, RATIO).law is not None
    assert one_shot(module, 12, COUPLED).law is None
    assert one_shot(module, 12, GREEDY).law is None
    assert one_shot(module, 12, SamplingParams(temperature=0.0, acceptance=AcceptanceRule.RATIO)).law is None


def test_law_width() -> None:
    tables = Tables()
    tables.blocks["r"] = list(range(16))
    drafter = LocalDrafter(tiny_module(), tables, law_width=5, head_top_k=12)
    feed(drafter, "r", 12, sampling=RATIO)
    tree = drafter.collect({"r": 4}, 0.0)["r"]
    assert tree.law is not None
    assert tree.law.ids.shape == (4, 5)
    assert all(token in ids for token, ids in zip(tree.tokens, tree.law.ids.tolist(), strict=True))
    with pytest.raises(ValueError, match="head_top_k"):
        LocalDrafter(tiny_module(), tables, head_top_k=-1)


def test_a_missing_turn_stops_drafting_until_the_request_starts_over() -> None:
    drafter = drafter_with(tiny_module(), r=range(16))
    feed(drafter, "r", 10)
    drafter.propose([make_turn("r", 13, TOKENS[12:13], None)])
    assert drafter.collect({"r": 4}, 0.0) == {}
    feed(drafter, "r", 13)
    assert drafter.collect({"r": 4}, 0.0)["r"].base_len == 13


def test_a_turn_that_comes_twice_changes_nothing() -> None:
    module = tiny_module()
    drafter = drafter_with(module, r=range(16))
    feed(drafter, "r", 10)
    for _ in range(3):
        feed(drafter, "r", 12, start=9, known=10)
        same(drafter.collect({"r": 4}, 0.0)["r"], one_shot(module, 12))


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("has_head", [True, False])
def test_survival_of_a_token_is_a_function_of_the_tokens_before_it(name: str, has_head: bool) -> None:
    """Many draws of one block, estimated by an estimator that has learnt: what bounds the ratio rule's schedule (rules 1 and 3)."""
    module = tiny_module(has_confidence=has_head, confidence_with_markov=has_head)
    drafter = drafter_with(module, **{f"r{i}": range(16) for i in range(150)})
    features = drafter.project(TAPS[:11])
    drafter.propose([make_turn(f"r{i}", 12, TOKENS[:12], features, sampling=RATIO, noise_seed=i) for i in range(150)])
    trees = list(drafter.collect({f"r{i}": 4 for i in range(150)}, 0.0).values())
    estimator = make_estimator(name, drafter.block_size, drafter.signals)
    for i, tree in enumerate(trees):
        estimator.observe(tree, 4, range(i % 5))
    estimator.learn()
    by_prefix: dict[tuple[int, ...], float] = {}
    for tree, row in zip(trees, estimator.survival(trees).tolist(), strict=True):
        for k in range(4):
            assert by_prefix.setdefault(tree.tokens[:k], row[k]) == pytest.approx(row[k], rel=1e-4)
    assert len({tree.tokens[0] for tree in trees}) > 3
    assert name == "constant" or len({round(row[1], 4) for row in estimator.survival(trees).tolist()}) > 3


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [GREEDY, RATIO, COUPLED])
def test_a_gpu_drafts_what_the_cpu_drafts(sampling: SamplingParams) -> None:
    expected = one_shot(tiny_module(), 22, sampling)
    module = tiny_module()
    module.to("cuda")
    shared = module._shared
    module._shared = dataclasses.replace(shared, embed=shared.embed.cuda(), lm_head=shared.lm_head.cuda())
    module._lm_head = module._shared.lm_head
    tree = one_shot(module, 22, sampling)
    assert tree.tokens == expected.tokens
    assert tree.confidence == pytest.approx(expected.confidence, abs=1e-4)
    if tree.law is not None and expected.law is not None:
        torch.testing.assert_close(tree.law.probs.cpu(), expected.law.probs, atol=1e-4, rtol=0)
