"""The judge: drafts stand or fall by their rule, own tokens come from the right law, and nothing depends on the batch."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest
import torch
from helpers.exact_laws import chi_square_p
from torch import Tensor

from dspark.kernels.keyed_random import ACCEPT, TOKEN, gumbel, uniform
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import DraftLaw, DraftTree
from dspark.workers.verifier import judge as judge_module
from dspark.workers.verifier.judge import JudgeItem, Verdict, judge, prompt_logprobs
from dspark.workers.verifier.ratio import DraftRows, accept_probability, block_chances, residual_weights

VOCAB = 60
GREEDY = SamplingParams(temperature=0.0)
RATIO = SamplingParams(acceptance=AcceptanceRule.RATIO)
COUPLED = SamplingParams(acceptance=AcceptanceRule.COUPLED)


def logits_of(seed: int, num_rows: int, width: int = VOCAB) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * 2


def chain(tokens: Sequence[int], law: DraftLaw | None = None, base_len: int = 3) -> DraftTree:
    return DraftTree.chain("r", base_len, tokens, [0.5] * len(tokens), law)


def item(sampling: SamplingParams, draft: DraftTree | None = None, first_row: int = 0, seed: int = 5) -> JudgeItem:
    return JudgeItem("r", sampling, seed, (1, 2), (4,), draft, first_row, (0,))


def one(logits: Tensor, sampling: SamplingParams, draft: DraftTree | None = None, seed: int = 5) -> Verdict:
    (verdict,) = judge(logits, [item(sampling, draft, 0, seed)])
    return verdict


def coupled_tokens(logits: Tensor, seed: int, base_len: int = 3) -> list[int]:
    """The issue's definition: argmax of processed logits plus Gumbel noise keyed by seed and position."""
    positions = torch.arange(base_len, base_len + len(logits))[:, None]
    noise = gumbel(torch.tensor(seed), positions, TOKEN, torch.arange(logits.shape[1]))
    tokens: list[int] = (logits + noise).argmax(-1).tolist()
    return tokens


# --- greedy and coupled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_keeps_drafts_while_they_are_the_argmax(dtype: torch.dtype) -> None:
    logits = logits_of(0, 4).to(dtype)
    best = logits.float().argmax(-1).tolist()
    assert one(logits, GREEDY, chain(best[:3])) == Verdict(tuple(best), 3)
    assert one(logits, GREEDY, chain(best[:2])) == Verdict(tuple(best[:3]), 2)
    assert one(logits, GREEDY, chain([best[0], best[1] ^ 1, best[2]])) == Verdict(tuple(best[:2]), 1)
    assert one(logits, GREEDY, chain([best[0] ^ 1, best[1]])) == Verdict((best[0],), 0)
    assert one(logits, GREEDY, chain([])) == Verdict((best[0],), 0)
    assert one(logits, GREEDY) == Verdict((best[0],), 0)


@pytest.mark.parametrize("rule", AcceptanceRule)
def test_both_rules_are_greedy_at_temperature_0(rule: AcceptanceRule) -> None:
    logits = logits_of(1, 4)
    best = logits.argmax(-1).tolist()
    law = DraftLaw(torch.tensor([[best[j], 7] for j in range(3)]), torch.tensor([[0.3, 0.7]] * 3))
    assert one(logits, dataclasses.replace(GREEDY, acceptance=rule), chain(best[:3], law)) == Verdict(tuple(best), 3)


@pytest.mark.parametrize("seed", [0, -1, 12345, 2**63 - 1, -(2**63)])
def test_coupled_tokens_are_the_argmax_with_keyed_noise(seed: int) -> None:
    logits = logits_of(2, 4)
    wanted = coupled_tokens(logits, seed)
    assert one(logits, COUPLED, chain(wanted[:3]), seed) == Verdict(tuple(wanted), 3)
    assert one(logits, COUPLED, chain([wanted[0], (wanted[1] + 1) % VOCAB]), seed) == Verdict(tuple(wanted[:2]), 1)
    assert one(logits, COUPLED, None, seed) == Verdict((wanted[0],), 0)


def test_coupled_noise_goes_with_the_position_not_the_row() -> None:
    logits = logits_of(3, 1).expand(2, -1)
    first = one(logits[:1], COUPLED)
    later = judge(logits[:1], [dataclasses.replace(item(COUPLED), output=(4, 5, 6))])[0]
    wanted = coupled_tokens(logits_of(3, 1), 5, 5)
    assert later.tokens == tuple(wanted)
    draws = {judge(logits[:1], [dataclasses.replace(item(COUPLED), output=(4,) * n)])[0].tokens for n in range(1, 12)}
    assert len(draws) > 1
    assert first.tokens in draws


def test_a_seed_chooses_the_coupled_rule() -> None:
    logits = logits_of(4, 3)
    wanted = coupled_tokens(logits, 5)
    assert one(logits, SamplingParams(seed=5), chain(wanted[:2])).accepted == 2
    assert SamplingParams(seed=5, acceptance=AcceptanceRule.RATIO).rule is AcceptanceRule.RATIO


# --- ratio -------------------------------------------------------------------------------------------------------------


def ratio_outcome(logits: Tensor, tokens: Sequence[int], law: DraftLaw | None, seed: int) -> tuple[int, Tensor]:
    """(accepted, the own token's law not normalised), block verification written out for one request."""
    target = torch.softmax(logits.to(torch.float64), -1)
    drafts = torch.zeros(len(tokens), logits.shape[1], dtype=torch.float64)
    for j, token in enumerate(tokens):
        if law is None:
            drafts[j, token] = 1.0
        else:
            drafts[j].index_add_(0, law.ids[j], law.probs[j].to(torch.float64))
    joint, count = [1.0], 0
    for j, token in enumerate(tokens, start=1):
        p = min(1.0, joint[-1] * float(target[j - 1, token] / drafts[j - 1, token]))
        joint.append(p)
        chance = p
        if j < len(tokens):
            left = float((p * target[j] - drafts[j]).clamp(min=0.0).sum())
            chance = left / (left + 1 - p) if left + 1 - p > 0 else 1.0
        if float(uniform(torch.tensor(seed), torch.tensor(2 + j), ACCEPT, salt=-3)) < chance:
            count = j
    if count < len(tokens):
        return count, (joint[count] * target[count] - drafts[count]).clamp(min=0.0)
    return count, target[count]


def draft_law(seed: int, num_rows: int, width: int) -> DraftLaw:
    top = torch.softmax(logits_of(seed, num_rows), -1).topk(width, dim=-1)
    return DraftLaw(top.indices, top.values / top.values.sum(-1, keepdim=True))


@pytest.mark.parametrize("width", [1, 4, VOCAB, None])
def test_ratio_equals_the_rule_written_out(width: int | None) -> None:
    accepted = []
    for seed in range(150):
        logits = logits_of(1000 + seed, 4) * 0.4
        law = None if width is None else draft_law(2000 + seed, 3, width)
        rng = random.Random(seed)
        tokens = [rng.randrange(VOCAB) if law is None else int(law.ids[j, rng.randrange(law.ids.shape[1])]) for j in range(3)]
        count, weights = ratio_outcome(logits, tokens, law, seed)
        noise = gumbel(torch.tensor(seed), torch.tensor(3 + count), TOKEN, torch.arange(VOCAB))
        own = int((weights.log() + noise).argmax())
        assert one(logits, RATIO, chain(tokens, law), seed) == Verdict((*tokens[:count], own), count)
        accepted.append(count)
    assert {0, 1} <= set(accepted)


def test_a_position_that_is_drafted_again_is_judged_afresh() -> None:
    """A block that falls has looked at the noise of positions that the next rounds draft again."""
    logits = torch.zeros(3, 4)  # 1/4 against 1/2: two drafts stand with probability 1/4, one with 1/2
    law = DraftLaw(torch.tensor([[0, 1]] * 2), torch.full((2, 2), 0.5))
    again = DraftLaw(law.ids[:1], law.probs[:1])
    both = [seed for seed in range(800) if one(logits, RATIO, chain([0, 1], law), seed).accepted == 2]
    later = [dataclasses.replace(item(RATIO, chain([1], again, 4), 0, seed), output=(4, 0)) for seed in both]
    stand = [judge(logits, [each])[0].accepted for each in later]
    assert len(both) > 120
    assert 0.3 < sum(stand) / len(stand) < 0.7


def test_a_draft_from_the_targets_own_law_is_always_accepted() -> None:
    logits = logits_of(5, 4)
    probs = torch.softmax(logits, -1)
    law = DraftLaw(torch.arange(VOCAB).expand(3, -1), probs[:3])
    for seed in range(50):
        tokens = torch.multinomial(probs[:3], 1, generator=torch.Generator().manual_seed(seed)).squeeze(1).tolist()
        assert one(logits, RATIO, chain(tokens, law), seed).accepted == 3


def test_a_trimmed_prefix_is_followed_by_the_full_law() -> None:
    """Two of three drafts were verified and stand: the next token may be anything, the trimmed draft included."""
    logits = torch.zeros(3, 4)
    law = DraftLaw(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    own = [verdict.tokens[-1] for seed in range(4000) if (verdict := one(logits, RATIO, chain([0, 1], law), seed)).accepted == 2]
    counts = torch.bincount(torch.tensor(own), minlength=4)
    assert len(own) > 800
    assert chi_square_p(float(((counts - len(own) / 4) ** 2 / (len(own) / 4)).sum()), 3) > 1e-4


def test_a_rejected_one_hot_draft_is_never_drawn_again() -> None:
    logits = torch.zeros(2, 4)
    verdicts = [one(logits, RATIO, chain([2]), seed) for seed in range(400)]
    rejected = [verdict.tokens[-1] for verdict in verdicts if verdict.accepted == 0]
    assert 200 < len(rejected) < 380
    assert set(rejected) == {0, 1, 3}


def test_a_law_that_denies_its_own_token_leaves_the_target_alone() -> None:
    """Such a draft says nothing: it is refused and the token comes from the full law, the draft's among them."""
    logits = torch.zeros(2, 3)
    law = DraftLaw(torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]))
    verdicts = [one(logits, RATIO, chain([2], law), seed) for seed in range(1500)]
    assert all(verdict.accepted == 0 for verdict in verdicts)
    counts = torch.bincount(torch.tensor([verdict.tokens[0] for verdict in verdicts]), minlength=3)
    assert chi_square_p(float(((counts - 500.0) ** 2 / 500.0).sum()), 2) > 1e-4


def test_unused_places_of_a_law_may_hold_any_id() -> None:
    logits = logits_of(6, 2)
    clean = DraftLaw(torch.tensor([[3, 8]]), torch.tensor([[0.75, 0.25]]))
    padded = DraftLaw(torch.tensor([[3, 8, 3, 0]]), torch.tensor([[0.75, 0.25, 0.0, 0.0]]))
    for seed in range(30):
        assert one(logits, RATIO, chain([3], clean), seed) == one(logits, RATIO, chain([3], padded), seed)


def test_equal_laws_leave_no_residual_and_fall_back_to_the_target() -> None:
    target = torch.tensor([[0.25, 0.75, 0.0]])
    weights = residual_weights(target, torch.tensor([[1, 0]]), torch.tensor([[0.75, 0.25]]))
    assert torch.equal(weights, target)
    assert residual_weights(target, torch.tensor([[0]]), torch.tensor([[0.5]])).tolist() == [[0.0, 0.75, 0.0]]
    assert target.tolist() == [[0.25, 0.75, 0.0]], "the target is not overwritten"


def test_acceptance_is_the_ratio_cut_at_one() -> None:
    chance = accept_probability(torch.tensor([0.2, 0.6, 0.0, 0.3]), torch.tensor([0.4, 0.3, 0.5, 0.0]))
    assert chance.tolist() == pytest.approx([0.5, 1.0, 0.0, 0.0])


def test_joint_ratios_recover_and_end_with_their_round() -> None:
    """Ratios 1/2 and 4 give 1/2 and 1: what the first draft loses the second brings back. Rounds do not touch each other."""
    ratios = torch.tensor([0.5, 4.0, 0.5, 0.5, 2.0, 0.0], dtype=torch.float64)
    support, probs = torch.zeros(6, 1, dtype=torch.float64), torch.ones(6, 1, dtype=torch.float64)
    before, chance = block_chances(ratios, support, probs, [2, 0, 3, 1])
    assert before.tolist() == [1.0, 0.5, 1.0, 0.5, 0.25, 1.0]
    assert chance.tolist() == [0.5, 1.0, 0.5, 0.25, 0.5, 0.0]
    before, chance = block_chances(ratios, support + 0.4, probs, [2, 0, 3, 1])
    assert before.tolist() == [1.0, 0.5, 1.0, 0.5, 0.25, 1.0]
    assert chance.tolist() == pytest.approx([(0.5 - 0.2) / 0.8, 1.0, (0.5 - 0.2) / 0.8, (0.25 - 0.1) / 0.9, 0.5, 0.0])
    assert all(len(part) == 0 for part in block_chances(ratios[:0], support[:0], probs[:0], [0, 0]))


def test_draft_rows_are_padded_to_the_widest_law() -> None:
    wide = DraftLaw(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]]))
    rows = DraftRows.gather([2, 4, 9], [(2, wide), (0, None), (1, None)], torch.device("cpu"))
    assert rows.ids.tolist() == [[1, 2, 3], [4, 5, 6], [9, 0, 0]]
    assert rows.token_probs.tolist() == pytest.approx([0.3, 0.6, 1.0])


# --- processors, batches, passes -----------------------------------------------------------------------------------------


def test_penalties_inside_a_block_stop_a_repeated_draft() -> None:
    """Each row prefers token 7; after it is drafted once, the penalty makes it token 9's turn."""
    logits = torch.zeros(4, VOCAB)
    logits[:, 7], logits[:, 9] = 5.0, 4.5
    assert one(logits, GREEDY, chain([7, 7, 7])) == Verdict((7, 7, 7, 7), 3)
    assert one(logits, dataclasses.replace(GREEDY, presence_penalty=1.0), chain([7, 7, 7])) == Verdict((7, 9), 1)
    assert one(logits, dataclasses.replace(GREEDY, presence_penalty=1.0), chain([7, 9, 7])) == Verdict((7, 9, 7, 7), 3)
    assert one(logits, dataclasses.replace(GREEDY, repetition_penalty=2.0), chain([7, 7])) == Verdict((7, 9), 1)


@pytest.mark.parametrize("elements", [1, 10**6])
def test_min_tokens_inside_a_sampled_block_however_it_is_passed(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "PASS_ELEMENTS", elements)
    logits = torch.zeros(4, VOCAB)
    logits[:, 0], logits[:, 9] = 80.0, 40.0
    for sampling in (COUPLED, RATIO):
        patient = dataclasses.replace(sampling, min_tokens=3, max_tokens=None)
        assert one(logits, patient, chain([9, 9, 0])) == Verdict((9, 9, 0, 0), 3)


def test_min_tokens_inside_a_block_and_bias() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, 0], logits[:, 9] = 5.0, 4.5
    patient = dataclasses.replace(GREEDY, min_tokens=3, max_tokens=None)  # one token exists; id 0 would stop it
    assert one(logits, patient, chain([9, 9, 0])) == Verdict((9, 9, 0, 0), 3)
    assert one(logits, patient, chain([9, 0])) == Verdict((9, 9), 1)
    assert one(logits, dataclasses.replace(GREEDY, logit_bias={0: -1.0}), chain([9])) == Verdict((9, 9), 1)


def mixed_items(num_items: int, width: int) -> tuple[Tensor, list[JudgeItem]]:
    """Requests of every kind in an order that mixes them, drafts that sometimes stand, rows with gaps between items."""
    rng = random.Random(7)
    settings = [
        GREEDY,
        RATIO,
        COUPLED,
        dataclasses.replace(RATIO, temperature=0.7, top_p=0.9),
        dataclasses.replace(COUPLED, temperature=0.7, top_k=5, logprobs=2),
        dataclasses.replace(GREEDY, repetition_penalty=1.3, logprobs=0),
        dataclasses.replace(RATIO, presence_penalty=0.5, min_p=0.02, logprobs=20),
        dataclasses.replace(COUPLED, frequency_penalty=0.5, min_tokens=9, max_tokens=None),
        dataclasses.replace(RATIO, temperature=3.0, top_p=0.99),
    ]
    items: list[JudgeItem] = []
    row = 1
    logits = logits_of(8, num_items * 8, width) * 2
    for i in range(num_items):
        count = rng.randrange(6)
        tokens = [int(logits[row + j].topk(3).indices[rng.choice((0, 0, 0, 1, 2))]) for j in range(count)]
        kind = rng.randrange(3)
        law = None
        if kind and count:
            probs, ids = torch.softmax(logits[row : row + count], -1).topk(3 + kind, dim=-1)
            law = DraftLaw(ids, probs / probs.sum(-1, keepdim=True))
        prompt = tuple(rng.randrange(width) for _ in range(5))
        output = tuple(rng.randrange(width) for _ in range(rng.randrange(1, 5)))
        draft = chain(tokens, law, len(prompt) + len(output)) if kind < 2 or count else None
        items.append(JudgeItem(f"r{i}", settings[i % len(settings)], rng.randrange(2**63), prompt, output, draft, row, (0, 3)))
        row += (len(tokens) if draft else 0) + 1 + rng.randrange(2)
    return logits, items


@pytest.mark.parametrize("width", [VOCAB, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_equals_each_alone_and_leaves_the_logits(width: int, dtype: torch.dtype) -> None:
    logits, items = mixed_items(54, width)
    logits = logits.to(dtype)
    before = logits.clone()
    verdicts = judge(logits, items)
    assert torch.equal(logits, before)
    assert verdicts == [judge(logits, [item])[0] for item in items]
    assert len({verdict.accepted for verdict in verdicts}) > 3
    for it, verdict in zip(items, verdicts, strict=True):
        assert verdict.tokens[:-1] == it.drafted[: verdict.accepted]
        assert (verdict.logprobs is not None) == (it.sampling.logprobs is not None)


@pytest.mark.parametrize("elements", [1, 3000, 10**9])
def test_how_many_rows_a_pass_takes_changes_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, items = mixed_items(54, 500)
    wanted = judge(logits, items)
    monkeypatch.setattr(judge_module, "PASS_ELEMENTS", elements)
    assert judge(logits, items) == wanted


def test_nothing_to_judge() -> None:
    assert judge(torch.empty(0, VOCAB), []) == []


def test_processed_laws_reach_both_rules() -> None:
    """With top_k 1 every rule is the argmax, and a draft of anything else falls."""
    logits = logits_of(9, 2)
    best = logits.argmax(-1).tolist()
    for sampling in (RATIO, COUPLED):
        sharp = dataclasses.replace(sampling, top_k=1)
        assert one(logits, sharp, chain([best[0]])) == Verdict(tuple(best), 1)
        assert one(logits, sharp, chain([(best[0] + 1) % VOCAB])) == Verdict((best[0],), 0)


# --- log-probabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_law_with_ranks_and_alternatives(dtype: torch.dtype) -> None:
    logits = logits_of(10, 4, 3000).to(dtype)
    raw = torch.log_softmax(logits.float(), -1)
    sampling = SamplingParams(temperature=0.0, logprobs=3, presence_penalty=2.0, logit_bias={17: 100.0})
    verdict = one(logits, sampling, chain([17]))
    assert verdict.tokens[0] == 17
    assert verdict.logprobs is not None
    assert len(verdict.logprobs) == len(verdict.tokens) == 2
    for j, (token, scored) in enumerate(zip(verdict.tokens, verdict.logprobs, strict=True)):
        assert scored.token_id == token
        assert scored.logprob == pytest.approx(float(raw[j, token]), abs=1e-5)
        assert scored.rank == 1 + int((logits[j] > logits[j, token]).sum())
        order = sorted(range(3000), key=lambda v: (-float(raw[j, v]), v))[:3]
        assert [value for _, value in scored.top] == pytest.approx([float(raw[j, v]) for v in order], abs=1e-5)
        if dtype is torch.float32:
            assert [v for v, _ in scored.top] == order


def test_logprobs_0_gives_the_chosen_token_alone_and_none_gives_none() -> None:
    logits = logits_of(11, 1)
    verdict = one(logits, dataclasses.replace(GREEDY, logprobs=0))
    assert verdict.logprobs is not None
    assert verdict.logprobs[0].top == ()
    assert verdict.logprobs[0].rank == 1
    assert one(logits, GREEDY).logprobs is None


def test_prompt_logprobs_score_every_row() -> None:
    logits = logits_of(12, 75)
    rng = random.Random(0)
    tokens = [rng.randrange(VOCAB) for _ in range(75)]
    scored = prompt_logprobs(logits, tokens, 2)
    raw = torch.log_softmax(logits, -1)
    assert [s.token_id for s in scored] == tokens
    assert [s.logprob for s in scored] == pytest.approx(raw[torch.arange(75), torch.tensor(tokens)].tolist(), abs=1e-5)
    assert [s.top[0][0] for s in scored] == logits.argmax(-1).tolist()
    assert all(len(s.top) == 2 and 1 <= s.rank <= VOCAB for s in scored)
    assert prompt_logprobs(logits[:0], [], 3) == []
    assert math.exp(prompt_logprobs(torch.zeros(1, 4), [1], 1)[0].top[0][1]) == pytest.approx(0.25)


@pytest.mark.gpu
def test_cpu_and_gpu_judge_alike() -> None:
    logits, items = mixed_items(54, 3000)
    here, there = judge(logits, items), judge(logits.cuda(), items)
    assert [(v.tokens, v.accepted) for v in here] == [(v.tokens, v.accepted) for v in there]
