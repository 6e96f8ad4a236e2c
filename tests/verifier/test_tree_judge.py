"""The judge of trees: the walk follows its rule, rows belong to paths, and nothing depends on the batch or on the pass."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from helpers.exact_laws import chi_square_p, reference_law
from helpers.random_trees import distinct_tokens, law_without_siblings, paths_of, random_parents, tree_of
from torch import Tensor

from dspark.kernels.keyed_random import ACCEPT, TOKEN, gumbel, uniform
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import DraftLaw, DraftTree
from dspark.workers.verifier import judge as judge_module
from dspark.workers.verifier.judge import JudgeItem, Verdict, judge
from dspark.workers.verifier.ratio import shrink
from dspark.workers.verifier.tree import children, depths, visible

VOCAB = 40
PROMPT, OUTPUT = (1, 2), (4,)
GREEDY = SamplingParams(temperature=0.0)
RATIO = SamplingParams(acceptance=AcceptanceRule.RATIO)
COUPLED = SamplingParams(acceptance=AcceptanceRule.COUPLED)
FORK = (-1, -1, 0, 0, 1)  # two candidates, two after the first, one after the second


def logits_of(seed: int, num_rows: int, width: int = VOCAB) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * 2


def one(logits: Tensor, sampling: SamplingParams, draft: DraftTree, seed: int = 5) -> Verdict:
    (verdict,) = judge(logits, [JudgeItem("r", sampling, seed, PROMPT, OUTPUT, draft, 0, (0,))])
    return verdict


# --- shapes ------------------------------------------------------------------------------------------------------------


def test_depths_children_and_sight_of_a_fork() -> None:
    assert depths(FORK) == [0, 0, 1, 1, 1]
    assert children(FORK) == [[0, 1], [2, 3], [4], [], [], []]
    assert visible(FORK).int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 1, 0, 0, 1],
    ]
    with_known = visible(FORK, 2).int()
    assert with_known[:2].tolist() == [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    assert with_known[2:, :2].all()
    assert with_known[2:, 2:].tolist() == visible(FORK).int().tolist()
    assert torch.equal(visible(range(-1, 4)), torch.ones(5, 5, dtype=torch.bool).tril())


# --- greedy and coupled ------------------------------------------------------------------------------------------------


def walk(parents: Sequence[int], drafted: Sequence[int], tokens: Sequence[int]) -> tuple[list[int], int]:
    """Where each row's own ``tokens`` lead: (path, the token after it)."""
    node, path = -1, []
    while True:
        found = [c for c, parent in enumerate(parents) if parent == node and drafted[c] == tokens[node + 1]]
        if not found:
            return path, tokens[node + 1]
        node = found[0]
        path.append(node)


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED, dataclasses.replace(GREEDY, logit_bias={3: 0.5})], ids=["greedy", "coupled", "bias"])
def test_the_walk_follows_the_rows_own_tokens(sampling: SamplingParams) -> None:
    rng = random.Random(3)
    lengths = set()
    for seed in range(60):
        parents = random_parents(rng, 9)
        logits = logits_of(seed, 10)
        biased = logits.clone()
        for token, bias in sampling.logit_bias.items():
            biased[:, token] += bias
        if not sampling.is_greedy:
            positions = torch.tensor([3, *(4 + depth for depth in depths(parents))])[:, None]
            biased = logits + gumbel(torch.tensor(seed), positions, TOKEN, torch.arange(VOCAB))
        own = biased.argmax(-1).tolist()
        drafted = distinct_tokens(rng, parents, [[own[row], *range(VOCAB)][: rng.choice((1, 1, 3)) + 8] for row in range(10)])
        for node in range(9):  # often enough the right token is there
            if rng.random() < 0.5 and own[parents[node] + 1] not in drafted:
                drafted[node] = own[parents[node] + 1]
        path, after = walk(parents, drafted, own)
        assert one(logits, sampling, tree_of(parents, drafted), seed) == Verdict(
            (*(drafted[n] for n in path), after), len(path), None, tuple(path)
        )
        lengths.add(len(path))
    assert {0, 1, 2} <= lengths


def test_a_second_candidate_saves_the_round() -> None:
    logits = logits_of(1, 6)
    best = logits.argmax(-1).tolist()
    tree = tree_of(FORK, [(best[0] + 1) % VOCAB, best[0], 1, 2, best[2]])
    assert one(logits, GREEDY, tree) == Verdict((best[0], best[2], best[5]), 2, None, (1, 4))
    assert one(logits, GREEDY, tree.first(4)) == Verdict((best[0], best[2]), 1, None, (1,))


# --- ratio -------------------------------------------------------------------------------------------------------------


def ratio_outcome(logits: Tensor, tree: DraftTree, seed: int) -> tuple[list[int], Tensor]:
    """(path, the own token's law not normalised), written out for one request."""
    target = torch.softmax(logits.to(torch.float64), -1)
    node, path = -1, []
    while True:
        left = target[node + 1].clone()
        position = 3 + len(path)
        for turn, child in enumerate(c for c, parent in enumerate(tree.parents) if parent == node):
            draft = torch.zeros(logits.shape[1], dtype=torch.float64)
            if tree.law is None:
                draft[tree.tokens[child]] = 1.0
            else:
                draft.index_add_(0, tree.law.ids[child], tree.law.probs[child].to(torch.float64))
            chance = float(uniform(torch.tensor(seed), torch.tensor(position), ACCEPT, turn))
            if chance < float(left[tree.tokens[child]] / draft[tree.tokens[child]]):
                node = child
                path.append(child)
                break
            left = (left - draft).clamp(min=0.0)
            left = left / left.sum()
        else:
            return path, left


@pytest.mark.parametrize("is_drawn", [True, False])
def test_ratio_equals_the_rule_written_out(is_drawn: bool) -> None:
    rng = random.Random(2)
    taken: list[tuple[int, ...]] = []
    for seed in range(150):
        logits = logits_of(1000 + seed, 8) * 0.7
        parents = random_parents(rng, 7, width=3)
        laws = torch.softmax(logits * 0.5 + logits_of(2000 + seed, 8) * 0.3, -1)
        likely = [laws[row].topk(6).indices.tolist() for row in range(8)]
        tokens = distinct_tokens(rng, parents, likely)
        tree = tree_of(parents, tokens, law_without_siblings(laws, parents, tokens) if is_drawn else None)
        path, left = ratio_outcome(logits, tree, seed)
        noise = gumbel(torch.tensor(seed), torch.tensor(3 + len(path)), TOKEN, torch.arange(VOCAB))
        own = int((left.log() + noise).argmax())
        assert one(logits, RATIO, tree, seed) == Verdict((*(tokens[n] for n in path), own), len(path), None, tuple(path))
        taken.append(tuple(path))
    assert any(path and path[0] > 0 for path in taken), "a later candidate must stand now and then"
    assert {0, 1} <= {len(path) for path in taken}


def test_rejected_candidates_are_never_drawn_again() -> None:
    logits = torch.zeros(4, 5)
    verdicts = [one(logits, RATIO, tree_of((-1, -1, -1), (0, 1, 2)), seed) for seed in range(600)]
    own = [verdict.tokens[0] for verdict in verdicts if not verdict.accepted]
    assert set(own) == {3, 4}
    assert 170 < len(own) < 310, "each one-hot candidate takes its share of what is left: two in five remain"
    counts = torch.bincount(torch.tensor([verdict.tokens[0] for verdict in verdicts]), minlength=5)
    assert chi_square_p(float(((counts - 120.0) ** 2 / 120.0).sum()), 4) > 1e-4


def test_an_accepted_leaf_is_followed_by_the_full_law() -> None:
    """Its children were trimmed: what comes next may be anything, whatever was drafted there."""
    logits = torch.zeros(3, 4)
    law = DraftLaw(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    own = [verdict.tokens[-1] for seed in range(3000) if (verdict := one(logits, RATIO, tree_of((-1, -1), (0, 1), law), seed)).accepted]
    counts = torch.bincount(torch.tensor(own), minlength=4)
    assert len(own) > 1000
    assert chi_square_p(float(((counts - len(own) / 4) ** 2 / (len(own) / 4)).sum()), 3) > 1e-4


def test_what_a_rejection_leaves() -> None:
    left, total = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0]]), torch.tensor([1.0, 1.0], dtype=torch.float64)
    less, sums = shrink(left, total, torch.tensor([[2, 0], [0, 1]]), torch.tensor([[0.4, 0.0], [0.5, 0.5]]))
    torch.testing.assert_close(less, torch.tensor([[0.2, 0.3, 0.1], [0.5, 0.5, 0.0]]))
    assert sums.tolist() == pytest.approx([0.6, 1.0]), "equal laws leave nothing: then the candidate changes nothing"
    less, sums = shrink(less[:1], sums[:1], torch.tensor([[1, 1]]), torch.tensor([[0.25, 0.25]]))
    torch.testing.assert_close(less, torch.tensor([[0.2, 0.0, 0.1]]))
    assert sums.tolist() == pytest.approx([0.3])


# --- paths, processors, batches ------------------------------------------------------------------------------------------


def test_a_row_sees_the_tokens_of_its_own_path() -> None:
    """7 is best everywhere; behind a drafted 7 the penalty makes it 9, behind the other candidate it does not."""
    logits = torch.zeros(6, VOCAB)
    logits[:, 7], logits[:, 9] = 5.0, 4.5
    once = dataclasses.replace(GREEDY, presence_penalty=1.0)
    assert one(logits, once, tree_of(FORK, [9, 7, 7, 9, 9])) == Verdict((7, 9, 7), 2, None, (1, 4))
    assert one(logits, once, tree_of(FORK, [7, 9, 7, 9, 7])) == Verdict((7, 9, 7), 2, None, (0, 3))
    patient = dataclasses.replace(GREEDY, min_tokens=3, max_tokens=None)  # one token exists; id 0 would stop it
    logits[:, 0] = 9.0
    assert one(logits, patient, tree_of(FORK, [0, 7, 1, 2, 7])) == Verdict((7, 7, 0), 2, None, (1, 4))
    assert one(logits, patient, tree_of(FORK, [0, 7, 1, 2, 0])) == Verdict((7, 7), 1, None, (1,))


@pytest.mark.parametrize("on_every_row", [True, False])
def test_processed_laws_equal_the_reference(on_every_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the coupled rule the verdict is the walk over reference laws of each path, however many rows a pass takes."""
    sampling = dataclasses.replace(
        COUPLED,
        temperature=0.8,
        top_p=0.9,
        presence_penalty=0.8,
        repetition_penalty=1.4,
        min_tokens=4,
        max_tokens=None,
        logit_bias={5: 2.0},
    )
    if on_every_row:
        monkeypatch.setattr("dspark.workers.verifier.tree_judge.takes_all_rows", lambda logits: True)
    rng = random.Random(5)
    accepted = set()
    for seed in range(30):
        parents = random_parents(rng, 7)
        logits = logits_of(seed, 8, 12)
        tokens: list[int] = []
        own: list[int] = []
        for node, parent in [(-1, -1), *enumerate(parents)]:
            if node >= 0:
                tokens.append(own[parent + 1] if rng.random() < 0.6 else rng.randrange(12))
            path = [] if node < 0 else paths_of(parents)[node]
            history = [*OUTPUT, *(tokens[n] for n in path)]
            law = torch.tensor(reference_law(logits[node + 1].tolist(), sampling, PROMPT, history, (0,)))
            noise = gumbel(torch.tensor(seed), torch.tensor(3 + len(path)), TOKEN, torch.arange(12))
            own.append(int((law.log() + noise).argmax()))
        path, after = walk(parents, tokens, own)
        assert one(logits, sampling, tree_of(parents, tokens), seed).tokens == (*(tokens[n] for n in path), after)
        accepted.add(len(path))
    assert {0, 1, 2} <= accepted


def mixed_items(num_items: int, width: int = 300) -> tuple[Tensor, list[JudgeItem]]:
    """Trees and chains of every kind of request, with gaps between their rows."""
    rng = random.Random(7)
    settings = [
        GREEDY,
        RATIO,
        COUPLED,
        dataclasses.replace(RATIO, temperature=0.7, top_p=0.9, logprobs=3),
        dataclasses.replace(COUPLED, temperature=0.7, top_k=5, logprobs=2),
        dataclasses.replace(GREEDY, repetition_penalty=1.3, logprobs=0),
        dataclasses.replace(RATIO, presence_penalty=0.5, min_p=0.02),
        dataclasses.replace(COUPLED, frequency_penalty=0.5, min_tokens=9, max_tokens=None),
    ]
    items: list[JudgeItem] = []
    logits = logits_of(8, num_items * 12, width) * 2
    row = 1
    for i in range(num_items):
        count = rng.randrange(10)
        parents = random_parents(rng, count, width=3) if rng.random() < 0.7 else tuple(range(-1, count - 1))
        laws = torch.softmax(logits[row : row + count + 1] * 0.6, -1)
        tokens = distinct_tokens(rng, parents, [laws[j].topk(4).indices.tolist() for j in range(count + 1)])
        law = law_without_siblings(laws, parents, tokens) if count and rng.random() < 0.7 else None
        prompt = tuple(rng.randrange(width) for _ in range(5))
        output = tuple(rng.randrange(width) for _ in range(rng.randrange(1, 5)))
        draft = tree_of(parents, tokens, law, len(prompt) + len(output)) if count else None
        items.append(JudgeItem(f"r{i}", settings[i % len(settings)], rng.randrange(2**63), prompt, output, draft, row, (0, 3)))
        row += count + 1 + rng.randrange(2)
    return logits, items


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_equals_each_alone_and_leaves_the_logits(dtype: torch.dtype) -> None:
    logits, items = mixed_items(64)
    logits = logits.to(dtype)
    before = logits.clone()
    verdicts = judge(logits, items)
    assert torch.equal(logits, before)
    assert verdicts == [judge(logits, [item])[0] for item in items]
    assert {verdict.accepted for verdict in verdicts} >= {0, 1, 2}
    for item, verdict in zip(items, verdicts, strict=True):
        assert verdict.tokens[:-1] == tuple(item.drafted[node] for node in verdict.nodes)
        assert (verdict.path is None) == (item.draft is None or item.draft.is_chain)
        assert (verdict.logprobs is not None) == (item.sampling.logprobs is not None)
        if verdict.logprobs is not None:
            rows = [item.first_row + node + 1 for node in (-1, *verdict.nodes)]
            wanted = logits[rows].float().log_softmax(-1)
            assert [scored.token_id for scored in verdict.logprobs] == list(verdict.tokens)
            assert [s.logprob for s in verdict.logprobs] == pytest.approx(wanted[range(len(rows)), verdict.tokens].tolist(), abs=1e-5)


@pytest.mark.parametrize("elements", [1, 1500, 10**9])
def test_how_many_rows_a_pass_takes_changes_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, items = mixed_items(40)
    wanted = judge(logits, items)
    monkeypatch.setattr(judge_module, "PASS_ELEMENTS", elements)
    assert judge(logits, items) == wanted
    monkeypatch.setattr("dspark.workers.verifier.tree_judge.takes_all_rows", lambda logits: True)
    assert judge(logits, items) == wanted, "as an accelerator does it"


def test_a_chain_is_judged_alike_as_a_tree() -> None:
    logits, items = mixed_items(64)
    chains = [item for item in items if item.draft is not None and item.draft.is_chain]
    alike = [item for item in chains if item.sampling.is_greedy or item.sampling.rule is AcceptanceRule.COUPLED]
    wanted = judge(logits, alike)
    assert len({verdict.accepted for verdict in wanted}) > 1
    assert [dataclasses.replace(v, path=None) for v in judge(logits, [may_branch(item) for item in alike])] == wanted


def may_branch(item: JudgeItem) -> JudgeItem:
    return dataclasses.replace(item, may_branch=True)


def test_a_drawn_draft_that_may_branch_is_judged_node_by_node() -> None:
    """Its shape may depend on its tokens, so block verification, which lets a later token save an earlier one, is not for it."""
    logits = torch.zeros(3, 4)
    law = DraftLaw(torch.tensor([[0, 1]] * 2), torch.full((2, 2), 0.5))
    for seed in range(200):
        item = JudgeItem("r", RATIO, seed, (1, 2), (4,), DraftTree.chain("r", 3, [0, 1], [0.5] * 2, law), 0, may_branch=True)
        stands = [float(uniform(torch.tensor(seed), torch.tensor(3 + j), ACCEPT)) < 0.5 for j in range(2)]
        assert judge(logits, [item])[0].accepted == [*stands, False].index(False)


@pytest.mark.gpu
def test_cpu_and_gpu_judge_trees_alike() -> None:
    logits, items = mixed_items(64, 3000)
    here, there = judge(logits, items), judge(logits.cuda(), items)
    assert [(v.tokens, v.path) for v in here] == [(v.tokens, v.path) for v in there]
