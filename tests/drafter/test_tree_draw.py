"""Draft trees: equal to the builder written down naively, best first, and each node from the law that is shipped for it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers.draft_modules import Tables, make_turn, tiny_module
from helpers.exact_laws import chi_square_p
from helpers.naive_tree import Path, Wish, naive_tree
from torch import Tensor

from dspark.kernels.draft_draw import child_salt, draw, race_order, truncate_law
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import DraftTree
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.module_config import HeadType
from dspark.workers.drafter.tree_draw import MIN_CHANCE
from dspark.workers.verifier.planner import rank
from dspark.workers.verifier.survival import make_estimator

TOKENS = [int(t) for t in torch.randint(0, 32, (40,), generator=torch.Generator().manual_seed(1))]
TAPS = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
HEAT = 1.3
RULES = {
    "greedy": SamplingParams(temperature=0.0),
    "coupled": SamplingParams(temperature=HEAT, acceptance=AcceptanceRule.COUPLED),
    "ratio": SamplingParams(temperature=HEAT, acceptance=AcceptanceRule.RATIO),
}


def drafter_of(module: DSparkModule, num_requests: int = 1, **options: Any) -> LocalDrafter:
    tables = Tables(64)
    tables.blocks = {f"r{i}": list(range(10 * i, 10 * i + 10)) for i in range(num_requests)}
    return LocalDrafter(module, tables, **options)


def feed(drafter: LocalDrafter, name: str, wish: Wish, sampling: SamplingParams | None = None) -> None:
    """The first turn of a request: all tokens, features of the positions before the anchor."""
    features = drafter.project(TAPS[: wish.base_len - 1])
    rules = sampling or RULES[wish.rule]
    tokens = TOKENS[: wish.base_len]
    drafter.propose([make_turn(name, wish.base_len, tokens, features, 0, wish.num_levels, rules, wish.seed, wish.num_nodes)])


def expected(module: DSparkModule, wish: Wish, width: int, top_k: int | None = None) -> DraftTree:
    """The naive tree over the module's laws, each path computed by the form that training uses."""
    drafter = drafter_of(module)
    feed(drafter, "r0", wish)
    state = drafter._states["r0"]
    with torch.no_grad():
        hidden = drafter._hidden(["r0"], [state])
        base = module.base_logits(hidden)[0]

    def previous(path: Path) -> Tensor:
        return torch.tensor([[state.anchor, *path]])

    @torch.no_grad()
    def kept_logits(path: Path) -> tuple[Tensor, Tensor]:
        k = len(path)
        logits = base[k].clone()
        kept = base[k].topk(top_k or len(logits)).indices
        if module.markov_head is not None:
            logits += module.markov_head.block_bias(previous(path), hidden[:, : k + 1])[0, k]
        return logits[kept], kept

    def law(path: Path) -> tuple[Tensor, Tensor]:
        logits, kept = kept_logits(path)
        heat = torch.tensor([HEAT if wish.rule != "greedy" else 1.0])
        local, probs = truncate_law(logits[None], heat, width)
        return kept[local[0]], probs[0]

    @torch.no_grad()
    def confidence(path: Path) -> float:
        logits = module.confidence_logits(hidden[:, : len(path) + 1], previous(path))
        return best(path) if logits is None else float(torch.sigmoid(logits[0, -1]))

    def best(path: Path) -> float:
        """The probability of the law's best token at temperature 1, before it is truncated."""
        return float(torch.softmax(kept_logits(path)[0], dim=0).max())

    tree = naive_tree(wish, law, confidence)
    paths: list[Path] = []
    margins = []
    for node, parent in enumerate(tree.parents):
        above = () if parent < 0 else paths[parent]
        paths.append((*above, tree.tokens[node]))
        chance = best(above) if parent not in tree.parents[:node] else max(tree.confidence[node], MIN_CHANCE)
        margins.append(math.log(chance / (1.0 - chance)))
    return dataclasses.replace(tree, margin=tuple(margins))


def same(tree: DraftTree, wanted: DraftTree) -> None:
    assert (tree.base_len, tree.tokens, tree.parents) == (wanted.base_len, wanted.tokens, wanted.parents)
    assert tree.confidence == pytest.approx(wanted.confidence, abs=1e-5)
    assert tree.margin == pytest.approx(wanted.margin, abs=2e-3)
    assert (tree.law is None) == (wanted.law is None)
    if tree.law is not None and wanted.law is not None:
        for i in range(len(tree.tokens)):
            ours, theirs = (dict(zip(law.ids[i].tolist(), law.probs[i].tolist(), strict=True)) for law in (tree.law, wanted.law))
            assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head", HeadType)
def test_trees_equal_the_naive_ones(head: HeadType, rule: str) -> None:
    shapes = set()
    for seed, (num_nodes, num_levels) in enumerate([(1, 4), (2, 4), (6, 4), (13, 4), (9, 2), (7, 1)]):
        module = tiny_module(seed, head_type=head, confidence_with_markov=head is not HeadType.NONE)
        wish = Wish(rule, num_nodes, num_levels, seed=1000 + seed, base_len=12 + seed)
        drafter = drafter_of(module, law_width=20)
        feed(drafter, "r0", wish)
        tree = drafter.collect({"r0": num_nodes}, 0.0)["r0"]
        same(tree, expected(module, wish, 20))
        assert len(tree.tokens) == num_nodes
        shapes.add(tree.parents)
    assert any(not all(parent == i - 1 for i, parent in enumerate(parents)) for parents in shapes)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_equals_each_alone_chains_and_rules_mixed(rule: str) -> None:
    module = tiny_module(3, head_type=HeadType.RNN)
    wishes = {f"r{i}": Wish(rule, (3, 8, 0, 5)[i], (4, 3, 3, 2)[i], seed=i, base_len=10 + 5 * i) for i in range(4)}
    together = drafter_of(module, 4, law_width=9)
    others = list(RULES.values())
    samplings = {name: others[i] if i < 2 else RULES[rule] for i, name in enumerate(wishes)}
    for name, wish in wishes.items():
        feed(together, name, wish, samplings[name])
    trees = together.collect({name: wish.num_nodes or wish.num_levels for name, wish in wishes.items()}, 0.0)
    assert trees["r2"].is_chain
    assert not trees["r1"].is_chain
    for name, wish in wishes.items():
        alone = drafter_of(module, 4, law_width=9)
        feed(alone, name, wish, samplings[name])
        same(trees[name], alone.collect({name: wish.num_nodes or wish.num_levels}, 0.0)[name])


def test_a_narrow_head_and_a_narrow_law() -> None:
    module = tiny_module(4)
    wish = Wish("ratio", 8, 4, seed=5, base_len=20)
    drafter = drafter_of(module, law_width=6, head_top_k=11)
    feed(drafter, "r0", wish)
    tree = drafter.collect({"r0": 8}, 0.0)["r0"]
    same(tree, expected(module, wish, 6, top_k=11))


def test_a_law_of_two_ids_has_two_candidates() -> None:
    module = tiny_module(4)
    for rule in RULES:
        drafter = drafter_of(module, law_width=2)
        feed(drafter, "r0", Wish(rule, 12, 2, seed=5, base_len=20))
        tree = drafter.collect({"r0": 12}, 0.0)["r0"]
        assert sorted(tree.parents) == [-1, -1, 0, 0, 1, 1] or len(tree.parents) == 6
        assert all(tree.parents.count(parent) == 2 for parent in set(tree.parents))


def test_without_a_confidence_head_the_laws_rank() -> None:
    module = tiny_module(6, has_confidence=False)
    drafter = drafter_of(module)
    wish = Wish("greedy", 6, 4, seed=1, base_len=20)
    feed(drafter, "r0", wish)
    tree = drafter.collect({"r0": 6}, 0.0)["r0"]
    same(tree, expected(module, wish, 64))


@pytest.mark.parametrize("rule", RULES)
def test_the_list_is_what_the_planner_needs(rule: str) -> None:
    """Survival never rises, so the planner's ranking keeps trees whole; the first m nodes are the tree of m."""
    module = tiny_module(8)
    wish = Wish(rule, 14, 4, seed=9, base_len=25)
    drafter = drafter_of(module)
    feed(drafter, "r0", wish)
    tree = drafter.collect({"r0": 14}, 0.0)["r0"]
    survival = make_estimator("head", drafter.block_size, drafter.signals).survival([tree])
    product: list[float] = []
    for parent, confidence in zip(tree.parents, tree.confidence, strict=True):
        product.append(confidence if parent < 0 else product[parent] * confidence)
    assert survival[0] == pytest.approx(product, rel=1e-3)
    assert rank(survival).place.tolist() == list(range(14))
    for count in range(1, 14):
        part = tree.first(count)
        assert all(parent < i for i, parent in enumerate(part.parents))
        smaller = drafter_of(module)
        feed(smaller, "r0", Wish(rule, count, 4, seed=9, base_len=25))
        same(smaller.collect({"r0": count}, 0.0)["r0"], part)


def test_the_first_draw_is_the_chains_own_and_nodes_draw_apart() -> None:
    ids = torch.arange(12).view(1, 1, 12)
    probs = torch.softmax(torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(3)), -1)
    seeds, base_lens = torch.tensor([7]), torch.tensor([40])
    for is_coupled in (True, False):
        coupled = torch.tensor([is_coupled])
        keys = race_order(ids, probs, seeds, base_lens + 2, coupled, base_lens[:, None])
        assert int(keys.argmax()) == int(draw(ids[0], probs[0], seeds, base_lens + 2, base_lens, coupled))
        nodes = child_salt(base_lens[:, None].expand(1, 5), torch.arange(5))
        apart = race_order(ids.expand(1, 5, 12), probs.expand(1, 5, 12), seeds, base_lens + 2, coupled, nodes)
        assert (len({tuple(row) for row in apart[0].tolist()}) == 1) == is_coupled, "coupled nodes share the target's noise"


def test_candidates_are_draws_without_replacement() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 20000
    salts = child_salt(torch.full((1, count), 9), torch.arange(count))
    keys = race_order(
        torch.arange(4).expand(1, count, 4), probs.expand(1, count, 4), torch.tensor([3]), torch.tensor([5]), torch.tensor([False]), salts
    )
    order = keys[0].argsort(-1, descending=True)
    pairs = torch.bincount(order[:, 0] * 4 + order[:, 1], minlength=16).to(torch.float64)
    wanted = torch.tensor([[0.0 if i == j else float(probs[i] * probs[j] / (1 - probs[i])) for j in range(4)] for i in range(4)])
    expected_counts = wanted.flatten().to(torch.float64) * count
    seen = expected_counts > 0
    assert not pairs[~seen].any()
    assert chi_square_p(float(((pairs - expected_counts)[seen] ** 2 / expected_counts[seen]).sum()), int(seen.sum()) - 1) > 1e-4
