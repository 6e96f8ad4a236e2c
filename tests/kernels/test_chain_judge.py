"""Chains judged on the device against the plain reference and the verifier's judge; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import dataclasses
import random as stdlib_random

import pytest
import torch
from helpers.kernel_checks import DEVICE, random
from helpers.triton_interpreter import mend_interpreter
from torch import Tensor

from dspark import asked
from dspark.kernels import chain_judge, sampling
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import DraftLaw, DraftTree
from dspark.workers.verifier.judge import JudgeItem, judge

pytest.importorskip("triton")
mend_interpreter()

LENGTH, WIDTH, VOCAB = 4, 5, 70
GREEDY = SamplingParams(temperature=0.0)
COUPLED = SamplingParams(temperature=0.8, top_k=20, acceptance=AcceptanceRule.COUPLED)
RATIO = SamplingParams(temperature=1.0, acceptance=AcceptanceRule.RATIO)
CUT_RATIO = SamplingParams(temperature=1.1, top_p=0.8, acceptance=AcceptanceRule.RATIO)
CYCLE = [GREEDY, COUPLED, RATIO, CUT_RATIO, RATIO]


@dataclasses.dataclass
class Round:
    """One step's requests, for both judges. ``logits`` hold a poisoned row before each request's."""

    logits: Tensor
    rows: sampling.SamplingRows
    chains: chain_judge.Chains
    items: list[JudgeItem | None]


def make_round(count: int, seed: int) -> Round:
    """Requests of all rules and lengths: laws that overlap the target's, one-hot ones, one that denies its draft, and padding."""
    choose = stdlib_random.Random(seed)
    lengths = [choose.choice([-1, 0, 1, 2, LENGTH, LENGTH]) for _ in range(count)]
    logits, drafts = [], torch.full((count, LENGTH), 10**6, dtype=torch.int64)
    law_ids, law_probs = torch.zeros(count, LENGTH, WIDTH, dtype=torch.int64), torch.full((count, LENGTH, WIDTH), torch.nan)
    items: list[JudgeItem | None] = []
    asked, seeds, positions, first_rows = [], [], [], []
    for r, length in enumerate(lengths):
        params, base_len = CYCLE[r % len(CYCLE)], 3 + r
        logits.append(torch.full((1, VOCAB), torch.nan))
        asked.append(GREEDY)
        seeds.append(0)
        positions.append(0)
        first_rows.append(len(asked))
        items.append(None)
        if length < 0:
            continue
        own = 3 * random(length + 1, VOCAB, seed=seed * 1000 + r).cpu()
        logits.append(own)
        asked += [params] * (length + 1)
        seeds += [77 * r] * (length + 1)
        positions += range(base_len, base_len + length + 1)
        for j in range(length):
            ids = own[j].topk(WIDTH).indices[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(r))]
            law_ids[r, j] = ids
            law_probs[r, j] = torch.softmax(own[j, ids] + 0.7 * random(WIDTH, seed=r * 10 + j).cpu(), 0)
            drafts[r, j] = own[j].argmax() if choose.random() < 0.6 else ids[choose.randrange(WIDTH)]
            if choose.random() < 0.15:
                law_probs[r, j] = (ids == drafts[r, j]).float()
            elif choose.random() < 0.1:
                drafts[r, j] = int(own[j].argmin())
        law = None if params.is_exact else DraftLaw(law_ids[r, :length], law_probs[r, :length])
        tree = DraftTree.chain("r", base_len, drafts[r, :length].tolist(), [0.5] * length, law)
        items[-1] = JudgeItem("r", params, 77 * r, (1, 2), tuple(range(base_len - 2)), tree, first_rows[-1])
    rules = [0 if p.is_greedy else 1 if p.rule is AcceptanceRule.COUPLED else 2 for p in (CYCLE[r % len(CYCLE)] for r in range(count))]
    int32 = {"dtype": torch.int32, "device": DEVICE}
    chains = chain_judge.Chains(
        rules=torch.tensor(rules, **int32),
        first_rows=torch.tensor(first_rows, **int32),
        counts=torch.tensor(lengths, **int32),
        seeds=torch.arange(count, device=DEVICE) * 77,
        base_lens=torch.arange(count, device=DEVICE) + 3,
        drafts=drafts.to(DEVICE),
        law_ids=law_ids.to(DEVICE),
        law_probs=law_probs.to(DEVICE),
    )
    rows = sampling.SamplingRows(
        temperature=torch.tensor([p.temperature for p in asked], dtype=torch.float32, device=DEVICE),
        top_k=torch.tensor([p.top_k for p in asked], **int32),
        top_p=torch.tensor([p.top_p for p in asked], dtype=torch.float64, device=DEVICE),
        min_p=torch.tensor([p.min_p for p in asked], dtype=torch.float64, device=DEVICE),
        seeds=torch.tensor(seeds, device=DEVICE),
        positions=torch.tensor(positions, device=DEVICE),
    )
    table = torch.cat(logits) if logits else torch.empty(0, VOCAB)
    return Round(table.to(DEVICE), rows, chains, items)


@pytest.mark.parametrize("seed", range(4))
def test_verdicts_are_the_verifiers(seed: int) -> None:
    given = make_round(30, seed)
    found = chain_judge.launch(given.logits, given.rows, given.chains)
    verdicts = iter(judge(given.logits, [item for item in given.items if item is not None]))
    for tokens, accepted in (found, chain_judge.reference(given.logits, given.rows, given.chains)):
        assert tokens.shape == (30, LENGTH + 1)
        assert torch.equal(tokens, found[0])
        assert torch.equal(accepted, found[1])
    for item, row, accepted in zip(given.items, found[0].tolist(), found[1].tolist(), strict=True):
        if item is None:
            assert row == [-1] * (LENGTH + 1)
            assert accepted == 0
        else:
            verdict = next(verdicts)
            assert row == [*verdict.tokens, *[-1] * (LENGTH - verdict.accepted)]
            assert accepted == verdict.accepted


def test_rounds_hold_every_outcome() -> None:
    """The rounds above accept all, some and nothing under the ratio rule, or the comparison would say little."""
    outcomes = set()
    for seed in range(4):
        given = make_round(30, seed)
        accepted = chain_judge.reference(given.logits, given.rows, given.chains)[1]
        for rule, count, stand in zip(given.chains.rules.tolist(), given.chains.counts.tolist(), accepted.tolist(), strict=True):
            if count > 1:
                outcomes.add((rule, "all" if stand == count else "some" if stand else "none"))
    assert outcomes == {(rule, outcome) for rule in range(3) for outcome in ("all", "some", "none")}


def test_laws_that_are_one_leave_no_residual() -> None:
    """A draft from the target's own law falls only by rounding; then the target's law itself is drawn from."""
    logits = torch.zeros(2, VOCAB, device=DEVICE)
    logits[:, 5:] = -torch.inf
    one = {"dtype": torch.int32, "device": DEVICE}
    for seed in range(8):
        chains = chain_judge.Chains(
            rules=torch.full((1,), 2, **one),
            first_rows=torch.zeros(1, **one),
            counts=torch.ones(1, **one),
            seeds=torch.full((1,), seed, device=DEVICE),
            base_lens=torch.full((1,), 9, device=DEVICE),
            drafts=torch.full((1, LENGTH), 4, device=DEVICE),
            law_ids=torch.arange(5, device=DEVICE).expand(1, LENGTH, 5).contiguous(),
            law_probs=torch.full((1, LENGTH, 5), 0.2000001, device=DEVICE),
        )
        rows = sampling.SamplingRows(
            temperature=torch.ones(2, device=DEVICE),
            top_k=torch.zeros(2, **one),
            top_p=torch.ones(2, dtype=torch.float64, device=DEVICE),
            min_p=torch.zeros(2, dtype=torch.float64, device=DEVICE),
            seeds=torch.full((2,), seed, device=DEVICE),
            positions=torch.tensor([9, 10], device=DEVICE),
        )
        found = chain_judge.launch(logits, rows, chains)
        wanted = chain_judge.reference(logits, rows, chains)
        assert torch.equal(found[0], wanted[0])
        assert 0 <= int(found[0][0, int(found[1])]) < 5


def test_rules_have_the_same_numbers_everywhere() -> None:
    assert (asked.GREEDY, asked.COUPLED, asked.RATIO) == (chain_judge.GREEDY, chain_judge.COUPLED, chain_judge.RATIO)


def test_no_requests() -> None:
    given = make_round(0, 0)
    tokens, accepted = chain_judge.launch(given.logits, given.rows, given.chains)
    assert tokens.shape == (0, LENGTH + 1)
    assert accepted.shape == (0,)
