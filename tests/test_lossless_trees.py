"""Draft trees change neither text nor law: exactly, by enumeration over random trees, draft laws and trims; by equality under the
coupled rule; and greedy text of the embedded model on real prompts.

Wrong rules, and schedules that look at what they may not, are shown to the checks, which must refuse them.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.draft_modules import random_module
from helpers.engines import FLAT, make_engine, run, teacher_forced_logits, tiny_target
from helpers.exact_laws import DraftLawOf, Law, Tokens, World, even_rank_p, fit, markov_table, reference_law
from helpers.exact_trees import (
    FORGETS_REJECTIONS,
    ONE_HOT,
    ONE_HOT_RESIDUAL,
    OWN_FROM_TARGET,
    RATIO_TREE,
    WITH_REPLACEMENT_LAW,
    Nodes,
    Policy,
    TreeEnumeration,
    TreeRule,
    candidates,
    path_to,
)
from helpers.naive_tree import Wish, naive_tree
from helpers.random_trees import random_parents, tree_of
from torch import Tensor

from dspark.deploy.default_model import default_cache, default_drafter, prepare
from dspark.kernels.draft_draw import truncate_law
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import DraftLaw, DraftTree, Request, Speculation
from dspark.workers.blocks import BlockPool
from dspark.workers.build import target_head
from dspark.workers.drafter.dialects import load_drafter
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.judge import JudgeItem, judge
from dspark.workers.verifier.targets import Target, as_target, load_model, load_tokenizer

VOCAB = 5
TRIMMING = CostTable(Curve((1, 64, 512), (1.0, 1.3, 5.0)))  # trims what is unlikely


def random_law(*key: object, scale: float = 1.5, top: int = VOCAB, vocab: int = VOCAB) -> Tensor:
    """A law that is a function of its key, fp64; only its ``top`` likeliest ids, renormalised."""
    noise = torch.randn(vocab, generator=torch.Generator().manual_seed(hash(key) % 2**31), dtype=torch.float64)
    law = torch.softmax(noise * scale, dim=-1)
    kept = torch.zeros_like(law).scatter(0, law.topk(top).indices, 1.0) * law
    return kept / kept.sum()


def target_of(seed: int, top: int = VOCAB, vocab: int = VOCAB) -> Law:
    cache: dict[Tokens, Tensor] = {}

    def law(tokens: Tokens) -> Tensor:
        if tokens not in cache:
            cache[tokens] = random_law(seed, tokens, top=top, vocab=vocab)
        return cache[tokens]

    return law


def drafter_of(seed: int, top: int = VOCAB, scale: float = 1.5, vocab: int = VOCAB) -> DraftLawOf:
    cache: dict[tuple[int, Tokens, Tokens], Tensor] = {}

    def law(index: int, start: Tokens, drafted: Tokens) -> Tensor:
        key = (index, start, drafted)
        if key not in cache:
            cache[key] = random_law(seed, *key, top=top, scale=scale, vocab=vocab)
        return cache[key]

    return law


# --- trees that grow and stop by what was drawn before ---------------------------------------------------------------------


def by_what_was_drawn(num_nodes: int, seed: int) -> Policy:
    """Shapes and trims that depend on everything a builder and a schedule may look at: the text, and all nodes so far."""

    def policy(index: int, start: Tokens, nodes: Nodes) -> int | None:
        draw = random.Random(hash((seed, index, start, nodes)))
        if len(nodes) == num_nodes or draw.random() < 0.15:
            return None
        return draw.randrange(-1, len(nodes))

    return policy


def fixed_shape(*parents: int) -> Policy:
    return lambda index, start, nodes: parents[len(nodes)] if len(nodes) < len(parents) else None


def best_first(num_nodes: int, seed: int, keep: float) -> Policy:
    """What the drafter and the planner do: the node of largest survival comes next, while it is worth ``keep``.

    A confidence is a function of a node's path; a later candidate is worth a third of the one before.
    """

    def confidence(index: int, start: Tokens, path: Tokens) -> float:
        return random.Random(hash((seed, index, start, path))).uniform(0.3, 0.95)

    def policy(index: int, start: Tokens, nodes: Nodes) -> int | None:
        if len(nodes) == num_nodes:
            return None
        survival: dict[int, float] = {-1: 1.0}
        turns: dict[int, int] = {-1: 0}
        for node, (parent, _) in enumerate(nodes):
            survival[node] = survival[parent] * worth(index, start, nodes[:node], parent, turns[parent])
            turns[parent] += 1
            turns[node] = 0
        offers = {node: survival[node] * worth(index, start, nodes, node, turns[node]) for node in survival}
        best = max(offers, key=lambda node: (offers[node], -node))
        return best if offers[best] > keep else None

    def worth(index: int, start: Tokens, nodes: Nodes, node: int, turn: int) -> float:
        return confidence(index, start, path_to(nodes, node)) / 3.0**turn

    return policy


POLICIES: dict[str, Callable[[int], Policy]] = {
    "any": lambda seed: by_what_was_drawn(4, seed),
    "best-first": lambda seed: best_first(4, seed, 0.1),
    "siblings": lambda seed: fixed_shape(-1, -1, -1),
    "fork": lambda seed: fixed_shape(-1, -1, 0, 1),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", POLICIES)
def test_one_round_of_trees_gives_the_targets_law(name: str, seed: int) -> None:
    rounds = TreeEnumeration(VOCAB, target_of(seed), drafter_of(seed + 100), POLICIES[name](seed))
    assert rounds.worst_error(1, 4) < 1e-12
    assert len({nodes for nodes, _ in rounds.trees(0, ())}) > 20


@pytest.mark.parametrize("seed", range(2))
def test_two_rounds_of_trees_give_the_targets_law(seed: int) -> None:
    rounds = TreeEnumeration(3, target_of(seed, 3, 3), drafter_of(seed + 50, 3, vocab=3), by_what_was_drawn(4, seed))
    assert rounds.worst_error(2, 5) < 1e-12
    rounds = TreeEnumeration(VOCAB, target_of(seed), drafter_of(seed + 50), best_first(2, seed, 0.1))
    assert rounds.worst_error(2, 4) < 1e-12


@pytest.mark.parametrize(("target_top", "draft_top"), [(5, 3), (3, 5), (2, 2), (5, 1), (1, 5)])
def test_truncated_laws_give_the_targets_law(target_top: int, draft_top: int) -> None:
    """Also where a law has fewer ids than the tree has candidates: then there are no more."""
    rounds = TreeEnumeration(VOCAB, target_of(7, target_top), drafter_of(8, draft_top), by_what_was_drawn(4, 3))
    assert rounds.worst_error(1, 4) < 1e-12


def test_equal_laws_certain_laws_and_one_hot_candidates_give_the_targets_law() -> None:
    target, policy = target_of(3), by_what_was_drawn(4, 5)
    equal = TreeEnumeration(VOCAB, target, lambda index, start, drafted: target(start + drafted), policy)
    assert equal.worst_error(1, 4) < 1e-12
    assert TreeEnumeration(VOCAB, target, drafter_of(4, scale=40.0), policy).worst_error(1, 4) < 1e-12
    assert TreeEnumeration(VOCAB, target, drafter_of(5), policy, ONE_HOT).worst_error(1, 4) < 1e-12


@pytest.mark.parametrize("rule", [FORGETS_REJECTIONS, OWN_FROM_TARGET, WITH_REPLACEMENT_LAW, ONE_HOT_RESIDUAL])
def test_the_enumeration_refuses_wrong_rules(rule: TreeRule) -> None:
    assert TreeEnumeration(VOCAB, target_of(0), drafter_of(100), fixed_shape(-1, -1, 0), rule).worst_error(1, 3) > 1e-3
    assert TreeEnumeration(VOCAB, target_of(0), drafter_of(100), fixed_shape(-1, -1, 0), RATIO_TREE).worst_error(1, 3) < 1e-12


def test_the_enumeration_refuses_schedules_that_look_at_a_node_they_decide_on() -> None:
    """A node that stays only for a likely token; a parent that stays only for a promising child (the paper's counterexample)."""
    target, draft = target_of(1), drafter_of(101)

    def likely(index: int, start: Tokens, nodes: Nodes) -> bool:
        parent, token = nodes[-1]
        law = draft(index, start, path_to(nodes, parent))
        return float(law[token]) > 0.2

    assert TreeEnumeration(VOCAB, target, draft, fixed_shape(-1, -1), stays=likely).worst_error(1, 3) > 1e-3

    def promising(index: int, start: Tokens, nodes: Nodes) -> bool:
        return len(candidates(nodes, -1)) < 2 or nodes[-1][1] % 2 == 0

    assert TreeEnumeration(VOCAB, target, draft, fixed_shape(-1, -1, 1), stays=promising).worst_error(1, 3) > 1e-3


# --- the coupled rule's text is one function of model, prompt, parameters and seed ------------------------------------------


def tree_rounds(
    world: World, sampling: SamplingParams, prompts: list[Tokens], num_tokens: int, grow: Callable[[Tokens, int], DraftTree | None]
) -> tuple[list[Tokens], int]:
    """(outputs, drafts accepted) of all prompts, decoded through the judge with the tree that ``grow`` gives for a text and a seed."""
    outputs: list[list[int]] = [[] for _ in prompts]
    accepted = 0
    while running := [i for i, output in enumerate(outputs) if len(output) < num_tokens]:
        items: list[JudgeItem] = []
        rows: list[Tokens] = []
        for i in running:
            text = (*prompts[i], *outputs[i])
            tree = grow(text, i)
            items.append(JudgeItem(str(i), sampling, i, prompts[i], tuple(outputs[i]), tree, len(rows), world.stop_ids))
            whole = [text]
            for parent, token in zip(tree.parents if tree else (), tree.tokens if tree else (), strict=True):
                whole.append((*whole[parent + 1], token))
            rows += [one[-2:] for one in whole]
        index = torch.tensor(rows)
        for i, verdict in zip(running, judge(world.table[index[:, 0], index[:, 1]], items), strict=True):
            outputs[i] += verdict.tokens
            accepted += verdict.accepted
    return [tuple(output[:num_tokens]) for output in outputs], accepted


def random_tree(text: Tokens, name: int) -> DraftTree | None:
    rng = random.Random(hash((text, name)))
    parents = random_parents(rng, rng.randrange(9))
    return tree_of(parents, [rng.randrange(VOCAB) for _ in parents], base_len=len(text)) if parents else None


def best_tree(table: Tensor, rule: str, heat: float, num_nodes: int, width: int) -> Callable[[Tokens, int], DraftTree]:
    """The trees of a drafter whose logits are ``table`` [V, V, V]; it is told how well it fits by a fixed confidence."""

    def grow(text: Tokens, seed: int) -> DraftTree:
        def law(path: Tokens) -> tuple[Tensor, Tensor]:
            before, last = (*text, *path)[-2:]
            ids, probs = truncate_law(table[before, last][None], torch.tensor([heat]), width)
            return ids[0], probs[0]

        return naive_tree(Wish(rule, num_nodes, 4, seed, len(text)), law, lambda path: 0.6)

    return grow


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=1, temperature=0.6, top_p=0.8, top_k=4),
        SamplingParams(seed=1, presence_penalty=0.8, frequency_penalty=0.3, repetition_penalty=1.3, min_tokens=10, logit_bias={1: 2.0}),
        SamplingParams(temperature=0.0, presence_penalty=0.8, frequency_penalty=0.3, min_tokens=10),
        SamplingParams(temperature=0.0),
    ],
    ids=["plain", "truncated", "penalties", "greedy-penalties", "greedy"],
)
def test_coupled_text_is_the_same_for_every_tree(sampling: SamplingParams) -> None:
    world = World(markov_table(VOCAB, 9), stop_ids=(3,))
    prompts: list[Tokens] = [(i % VOCAB, i // VOCAB % VOCAB, i % 2) for i in range(20)]
    plain, _ = tree_rounds(world, sampling, prompts, 12, lambda text, name: None)
    texts, accepted = tree_rounds(world, sampling, prompts, 12, random_tree)
    assert texts == plain
    assert accepted > 30
    rule = "greedy" if sampling.is_greedy else "coupled"
    near = world.table + markov_table(VOCAB, 55, 0.7)
    for num_nodes in (3, 8):
        texts, accepted = tree_rounds(world, sampling, prompts, 12, best_tree(near, rule, sampling.temperature or 1.0, num_nodes, VOCAB))
        assert texts == plain
        assert accepted > 60


# --- sampled tokens fit the law ------------------------------------------------------------------------------------------------

SIZE = 16
NEAR = markov_table(SIZE, 1) + markov_table(SIZE, 2, 0.8)


def ratio_p_values(
    sampling: SamplingParams, num_nodes: int, shipped: Callable[[DraftTree], DraftTree] = lambda tree: tree
) -> tuple[list[float], int]:
    """(p-values, drafts accepted) of 120 texts of 24 tokens; ``shipped`` is what the judge is told of a tree."""
    world = World(markov_table(SIZE, 1), stop_ids=(5,))
    grow = best_tree(NEAR, "ratio", sampling.temperature, num_nodes, 8)
    rng = random.Random(4)
    prompts: list[Tokens] = [tuple(rng.randrange(SIZE) for _ in range(3)) for _ in range(120)]
    texts, accepted = tree_rounds(world, sampling, prompts, 24, lambda text, name: shipped(grow(text, name)))
    tokens, laws, groups, contexts = [], [], [], []
    for prompt, output in zip(prompts, texts, strict=True):
        whole = (*prompt, *output)
        for j, token in enumerate(output):
            contexts.append(whole[j + 1 : j + 3])
            tokens.append(token)
            laws.append(reference_law(world.table[contexts[-1]].tolist(), sampling, prompt, output[:j], world.stop_ids))
            groups.append(whole[j + 2] % 4)
    target = torch.tensor(laws, dtype=torch.float64)
    index = torch.tensor(contexts)
    draft = torch.softmax(NEAR[index[:, 0], index[:, 1]].to(torch.float64) / sampling.temperature, -1)
    return [*fit(tokens, target, groups), even_rank_p(tokens, target, target / (draft + 1e-6))], accepted


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "min_tokens": 9, "max_tokens": None}])
def test_sampled_tokens_fit_the_law(params: dict[str, float]) -> None:
    p_values, accepted = ratio_p_values(SamplingParams(acceptance=AcceptanceRule.RATIO, **params), 6)  # type: ignore[arg-type]
    assert min(p_values) > 1e-4
    assert accepted > 1000


def test_the_fit_refuses_a_drafter_that_ships_other_laws() -> None:
    def flattened(tree: DraftTree) -> DraftTree:
        assert tree.law is not None
        flat = (tree.law.probs > 0).to(torch.float32)
        return dataclasses.replace(tree, law=DraftLaw(tree.law.ids, flat / flat.sum(-1, keepdim=True)))

    p_values, _ = ratio_p_values(SamplingParams(acceptance=AcceptanceRule.RATIO), 6, flattened)
    assert min(p_values) < 1e-6


# --- the same through the whole engine, with a real model's forward ---------------------------------------------------------------


@pytest.mark.parametrize("overlapped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_engines_tokens_fit_the_law(overlapped: bool) -> None:
    """Trees of a grafted random drafter, trimmed by a steep cost table, under the ratio rule."""
    target, prompt, num_texts, num_tokens = tiny_target(), (7, 11, 13), 500, 8
    pool = BlockPool(512)
    drafter = LocalDrafter(random_module(target), pool, law_width=16)
    options = {"max_num_seqs": 32, "max_batch_tokens": 512, "max_queued": num_texts, "overlapped": overlapped}
    engine = make_engine(target, drafter, pool, costs=TRIMMING, speculation="tree:9", **options)
    sampling = SamplingParams(temperature=1.1, top_p=0.95, presence_penalty=0.5, max_tokens=num_tokens, ignore_eos=True)
    requests = [Request(str(i), prompt, sampling, noise_seed=9_000_001 + i) for i in range(num_texts)]
    outputs = [result.tokens for result in run(engine, requests).values()]
    assert engine.counters.accepted > 60, "a test of drafts must accept some"
    assert engine.counters.drafted < 8.5 * engine.counters.drafted_rounds, "a test of schedules must trim some"
    logits = teacher_forced_logits(target, prompt, outputs).tolist()
    laws = [
        reference_law(rows[j], sampling, prompt, output[:j])
        for rows, output in zip(logits, outputs, strict=True)
        for j in range(num_tokens)
    ]
    tokens = [token for output in outputs for token in output]
    by_id, by_rank = fit(tokens, torch.tensor(laws, dtype=torch.float64), [i % 4 for i in range(len(tokens))])
    assert by_id > 1e-4
    assert by_rank > 1e-4


# --- greedy and seeded text of the embedded model, real prompts, its own drafter ---------------------------------------------------


@pytest.fixture(scope="module")
def smollm() -> tuple[Target, LocalDrafter, BlockPool, list[Request]]:
    """The embedded model in fp32 with its drafter, and six real prompts of the project's own sets."""
    folder = str(prepare(default_cache(), print))
    target = as_target(load_model(folder, torch.float32, torch.device("cpu")), folder)
    tokenizer = load_tokenizer(folder)
    pool = BlockPool(200)
    drafter_folder = default_drafter()
    assert drafter_folder is not None
    drafter = LocalDrafter(load_drafter(drafter_folder, target_head(target), torch.float32, target.device), pool)
    requests = []
    for name in ("chat", "code", "math"):
        lines = (Path(__file__).parent.parent / "bench" / "prompts" / f"{name}.jsonl").read_text().splitlines()
        for i, text in enumerate(sorted((json.loads(line)["turns"][0] for line in lines), key=len)[:2]):
            ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
            sampling = SamplingParams(temperature=0.0 if i else 0.8, seed=None if i else 7, max_tokens=16, ignore_eos=True)
            requests.append(Request(f"{name}{i}", tuple(ids), sampling))
    return target, drafter, pool, requests


def test_real_text_is_the_same_with_trees(smollm: tuple[Target, LocalDrafter, BlockPool, list[Request]]) -> None:
    target, drafter, pool, requests = smollm
    engine = make_engine(target, drafter, pool, max_batch_tokens=512, costs=FLAT)

    def texts(*modes: str) -> dict[str, list[int]]:
        asked = [dataclasses.replace(r, speculation=Speculation.parse(modes[i % len(modes)])) for i, r in enumerate(requests)]
        return {name: result.tokens for name, result in run(engine, asked).items()}

    plain = texts("off")
    lengths = {}
    for modes in (("tree:8",), ("tree:16",), ("tree:16", "adaptive", "tree:8", "static:3")):
        before = dataclasses.replace(engine.counters)
        assert texts(*modes) == plain, modes
        rounds = engine.counters.drafted_rounds - before.drafted_rounds
        lengths[modes] = (engine.counters.accepted - before.accepted) / rounds
    assert lengths[("tree:16",)] > 1.2, "trees of the shipped drafter must accept some"
