"""Speculation changes neither text nor law: (a) greedy text of the embedded model, with every drafter; (b) exactly, by
enumeration of two rounds; (c) by tests of fit over sampled tokens.

Each checker is also shown rules, schedules and drafters that are wrong, and must refuse them.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from helpers import exact_laws
from helpers.draft_modules import random_module
from helpers.drafters import OracleDrafter
from helpers.engines import FLAT, make_engine, run, teacher_forced_logits, tiny_target
from helpers.exact_laws import (
    ACCEPT_ARGMAX,
    BLOCK,
    BLOCK_BEYOND_ITS_END,
    BLOCK_TOKEN_BY_TOKEN,
    BLOCK_WITHOUT_JOINT,
    RATIO,
    RESIDUAL_AFTER_TRIM,
    TARGET_AFTER_REJECTION,
    BlockRule,
    Drafting,
    DraftLawOf,
    Enumeration,
    Law,
    NumVerified,
    Rule,
    Tokens,
    World,
    fit,
    markov_table,
    reference_law,
)
from torch import Tensor

from dspark.deploy.default_model import default_cache, prepare
from dspark.kernels.draft_draw import draw
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import Drafter, DraftLaw, Request
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.draft_policy import DraftPolicy
from dspark.workers.verifier.draft_worth import DraftWorth
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.survival import make_estimator
from dspark.workers.verifier.targets import as_target, load_model, load_tokenizer

VOCAB = 5


# --- (b) two rounds, enumerated -----------------------------------------------------------------------------------------


def random_law(*key: object, scale: float = 1.5, top: int = VOCAB, vocab_size: int = VOCAB) -> Tensor:
    """A law that is a function of its key, fp64; only its ``top`` likeliest ids, renormalised."""
    noise = torch.randn(vocab_size, generator=torch.Generator().manual_seed(hash(key) % 2**31), dtype=torch.float64)
    law = torch.softmax(noise * scale, dim=-1)
    kept = torch.zeros_like(law).scatter(0, law.topk(min(top, vocab_size)).indices, 1.0) * law
    return kept / kept.sum()


def target_of(seed: int, top: int = VOCAB, vocab_size: int = VOCAB) -> Law:
    cache: dict[Tokens, Tensor] = {}

    def law(tokens: Tokens) -> Tensor:
        if tokens not in cache:
            cache[tokens] = random_law(seed, tokens, top=top, vocab_size=vocab_size)
        return cache[tokens]

    return law


def drafter_of(seed: int, top: int = VOCAB, scale: float = 1.5, vocab_size: int = VOCAB) -> DraftLawOf:
    cache: dict[tuple[int, Tokens, Tokens], Tensor] = {}

    def law(index: int, start: Tokens, drafted: Tokens) -> Tensor:
        key = (index, start, drafted)
        if key not in cache:
            cache[key] = random_law(seed, *key, top=top, scale=scale, vocab_size=vocab_size)
        return cache[key]

    return law


def fixed(first: int, second: int) -> NumVerified:
    return lambda index, start, block: (first, second)[index]


def by_context(index: int, start: Tokens, block: Tokens) -> int:
    """Lengths that depend on everything a schedule may look at: the text, and a draft's predecessors but not itself."""
    if hash((start, 1)) % 3 == 0:
        return 0
    return 1 if hash((start, block[:1], 2)) % 2 else len(block)


def error(rule: Rule | BlockRule, target: Law, draft: DraftLawOf, num_verified: NumVerified, block_size: int = 2) -> float:
    rounds = Enumeration(VOCAB, block_size, target, draft, num_verified, rule)
    return rounds.worst_error(rounds.run(2), 5)


BOTH = pytest.mark.parametrize("rule", [RATIO, BLOCK], ids=["token", "block"])


@BOTH
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lengths", [(2, 2), (0, 2), (1, 2), (2, 0), (1, 1), None], ids=str)
def test_two_rounds_give_the_targets_law(seed: int, lengths: tuple[int, int] | None, rule: Rule | BlockRule) -> None:
    num_verified = by_context if lengths is None else fixed(*lengths)
    assert error(rule, target_of(seed), drafter_of(seed + 100), num_verified) < 1e-12


@BOTH
@pytest.mark.parametrize(("target_top", "draft_top"), [(5, 3), (3, 5), (2, 2), (5, 1), (1, 5)])
def test_truncated_laws_give_the_targets_law(target_top: int, draft_top: int, rule: Rule | BlockRule) -> None:
    assert error(rule, target_of(7, target_top), drafter_of(8, draft_top), by_context) < 1e-12


@BOTH
def test_equal_laws_and_certain_laws_give_the_targets_law(rule: Rule | BlockRule) -> None:
    target = target_of(3)
    assert error(rule, target, lambda index, start, drafted: target(start + drafted), fixed(2, 1)) < 1e-12
    assert error(rule, target, drafter_of(4, scale=40.0), by_context) < 1e-12


@pytest.mark.parametrize("draft_top", [3, 2, 1])
def test_longer_blocks_that_end_anywhere_give_the_targets_law(draft_top: int) -> None:
    """Four drafts of which a prefix is verified that ends by what was drafted before, never by the next draft."""

    def until(index: int, start: Tokens, block: Tokens) -> int:
        return next((count for count in range(4) if hash((start, block[:count], 3)) % 4 == 0), 4)

    target, draft = target_of(5, vocab_size=3), drafter_of(6, draft_top, vocab_size=3)
    for num_verified in (until, lambda index, start, block: 4):
        rounds = Enumeration(3, 4, target, draft, num_verified, BLOCK)
        assert rounds.worst_error(rounds.run(1), 5) < 1e-12


def expected_accepted(rule: Rule | BlockRule, seed: int, lengths: NumVerified) -> float:
    rounds = Enumeration(VOCAB, 3, target_of(seed), drafter_of(seed + 100), lengths, rule)
    return sum(prob * (len(tokens) - 1) for tokens, prob in rounds.run(1).items())


@pytest.mark.parametrize("seed", range(4))
def test_a_block_accepts_more_than_its_tokens_one_by_one(seed: int) -> None:
    for lengths in (lambda index, start, block: 3, by_context):
        assert expected_accepted(BLOCK, seed, lengths) > expected_accepted(RATIO, seed, lengths) + 1e-3
    first: NumVerified = lambda index, start, block: 1  # noqa: E731
    assert expected_accepted(BLOCK, seed, first) == pytest.approx(expected_accepted(RATIO, seed, first))


@pytest.mark.parametrize("rule", [RESIDUAL_AFTER_TRIM, ACCEPT_ARGMAX, TARGET_AFTER_REJECTION, BLOCK_BEYOND_ITS_END])
def test_the_enumeration_refuses_wrong_rules(rule: Rule | BlockRule) -> None:
    assert error(rule, target_of(0), drafter_of(100), fixed(1, 1)) > 1e-3


@pytest.mark.parametrize("rule", [BLOCK_WITHOUT_JOINT, BLOCK_TOKEN_BY_TOKEN])
def test_the_enumeration_refuses_rules_that_forget_the_joint_ratio(rule: BlockRule) -> None:
    assert error(rule, target_of(0), drafter_of(100), fixed(2, 2)) > 1e-3
    assert error(rule, target_of(0), drafter_of(100), fixed(1, 1)) < 1e-12, "one draft has no ratio before it"


def test_the_enumeration_refuses_the_papers_biased_schedule() -> None:
    """SPS = 1, 0.5, 0.45; confidence 0.8, then 0.9 after A and 0 after B: the best length over fresh confidences looks at x_1.

    The early stop refuses the first draft before it has seen it, and is exact.
    """
    target: Law = lambda tokens: torch.tensor([0.7, 0.3], dtype=torch.float64)  # noqa: E731
    draft: DraftLawOf = lambda index, start, drafted: torch.tensor([0.5, 0.5], dtype=torch.float64)  # noqa: E731
    speed = (1.0, 0.5, 0.45)

    def gains(block: Tokens) -> list[float]:
        survival = [0.8, 0.8 * (0.9 if block[0] == 0 else 0.0)]
        return [(1 + sum(survival[:count])) * speed[count] for count in range(3)]

    def greediest(index: int, start: Tokens, block: Tokens) -> int:
        return max(range(3), key=gains(block).__getitem__)

    def early_stop(index: int, start: Tokens, block: Tokens) -> int:
        gain = gains(block)
        return next((count for count in range(2) if gain[count + 1] <= gain[count]), 2)

    biased = Enumeration(2, 2, target, draft, greediest, RATIO)
    first = sum(prob for tokens, prob in biased.run(1).items() if tokens[0] == 0)
    assert first == pytest.approx(0.85)
    assert biased.worst_error(biased.run(2), 2) > 0.05
    stopped = Enumeration(2, 2, target, draft, early_stop, RATIO)
    assert stopped.worst_error(stopped.run(2), 4) < 1e-12


# --- (b) the coupled rule's text is one function of model, prompt, parameters and seed ------------------------------------


def draftings(vocab_size: int, table: Tensor) -> list[Drafting]:
    near = table + markov_table(vocab_size, 55, 0.7)
    return [
        Drafting(table, width=vocab_size, block_size=3),
        Drafting(near, width=vocab_size, block_size=3, trim=lambda rng: rng.randrange(4)),
        Drafting(near, width=2, block_size=5, trim=lambda rng: rng.randrange(6)),
        Drafting(markov_table(vocab_size, 56), width=3, block_size=1, trim=lambda rng: 1),
        Drafting(-table, width=1, block_size=3),
        Drafting(None, trim=lambda rng: rng.randrange(3)),
    ]


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
def test_coupled_text_is_the_same_for_every_draft(sampling: SamplingParams) -> None:
    table = markov_table(VOCAB, 9)
    world = World(table, stop_ids=(3,))
    prompts = [(i % VOCAB, i // VOCAB % VOCAB, i % 2) for i in range(50)]
    seeds = [i * 2**40 - 2**44 + i for i in range(50)]
    plain = [text.output for text in world.generate(sampling, prompts, seeds, 20, None)]
    alone = [world.generate(sampling, [prompt], [seed], 20, None)[0].output for prompt, seed in zip(prompts[:3], seeds[:3], strict=True)]
    assert plain[:3] == alone
    for drafting in draftings(VOCAB, table):
        texts = world.generate(sampling, prompts, seeds, 20, drafting)
        assert [text.output for text in texts] == plain
        assert sum(text.verified for text in texts) > 0
    perfect = world.generate(sampling, prompts, seeds, 20, draftings(VOCAB, table)[0])
    if sampling == SamplingParams(seed=1):
        assert all(text.accepted == text.verified for text in perfect), "the target's own law under its own noise is always right"


def test_coupled_texts_differ_between_seeds_and_ratio_texts_between_drafts() -> None:
    table = markov_table(VOCAB, 9)
    world = World(table)
    coupled = world.generate(SamplingParams(seed=1), [(0, 1)] * 2, [5, 6], 30, None)
    assert coupled[0].output != coupled[1].output
    ratio = SamplingParams(acceptance=AcceptanceRule.RATIO)
    plain = world.generate(ratio, [(0, 1)] * 20, list(range(20)), 20, None)
    drafted = world.generate(ratio, [(0, 1)] * 20, list(range(20)), 20, draftings(VOCAB, table)[1])
    assert [text.output for text in plain] != [text.output for text in drafted]


def test_both_rules_are_one_at_temperature_0() -> None:
    table = markov_table(VOCAB, 9)
    prompts = [(i % VOCAB, i // VOCAB) for i in range(25)]
    texts = [
        [text.output for text in World(table).generate(SamplingParams(temperature=0.0, acceptance=rule), prompts, [3] * 25, 20, drafting)]
        for rule in AcceptanceRule
        for drafting in (None, *draftings(VOCAB, table))
    ]
    assert all(text == texts[0] for text in texts)


# --- (c) sampled tokens fit the law --------------------------------------------------------------------------------------

SIZE = 32
NUM_TEXTS, NUM_TOKENS = 350, 60  # 21,000 tokens a case
PARAMS = {
    "plain": SamplingParams(),
    "temperature-top_p": SamplingParams(temperature=0.8, top_p=0.85),
    "penalties": SamplingParams(
        temperature=1.2, presence_penalty=0.6, frequency_penalty=0.2, repetition_penalty=1.2, top_p=0.95, min_tokens=20, max_tokens=None
    ),
}
DRAFTINGS = {
    "none": None,
    "near-trimmed": Drafting(markov_table(SIZE, 1) + markov_table(SIZE, 2, 0.8), width=8, block_size=4, trim=lambda rng: rng.randrange(5)),
    "far": Drafting(markov_table(SIZE, 3, 0.7), width=SIZE, block_size=2, trim=lambda rng: rng.randrange(1, 3)),
    "far-longer": Drafting(markov_table(SIZE, 3, 0.7), width=SIZE, block_size=6, trim=lambda rng: 6),
    "one-hot": Drafting(None, trim=lambda rng: rng.randrange(1, 4)),
}


def sampled(sampling: SamplingParams, drafting: Drafting | None, rule: AcceptanceRule) -> tuple[list[float], float]:
    """(p-values, acceptance) of 21,000 tokens."""
    rng = random.Random(4)
    world = World(markov_table(SIZE, 1), stop_ids=(5,))
    prompts = [tuple(rng.randrange(SIZE) for _ in range(3)) for _ in range(NUM_TEXTS)]
    params = dataclasses.replace(sampling, acceptance=rule)
    texts = world.generate(params, prompts, [rng.randrange(2**62) for _ in prompts], NUM_TOKENS, drafting)
    verified = sum(text.verified for text in texts)
    return world.fit(params, texts, drafting), sum(text.accepted for text in texts) / max(1, verified)


@pytest.mark.parametrize(
    ("params", "drafts", "rule"),
    [
        ("plain", "none", AcceptanceRule.RATIO),
        ("plain", "near-trimmed", AcceptanceRule.RATIO),
        ("plain", "far", AcceptanceRule.RATIO),
        ("plain", "far-longer", AcceptanceRule.RATIO),
        ("plain", "one-hot", AcceptanceRule.RATIO),
        ("plain", "near-trimmed", AcceptanceRule.COUPLED),
        ("temperature-top_p", "near-trimmed", AcceptanceRule.RATIO),
        ("temperature-top_p", "one-hot", AcceptanceRule.RATIO),
        ("temperature-top_p", "near-trimmed", AcceptanceRule.COUPLED),
        ("penalties", "near-trimmed", AcceptanceRule.RATIO),
        ("penalties", "near-trimmed", AcceptanceRule.COUPLED),
    ],
)
def test_sampled_tokens_fit_the_law(params: str, drafts: str, rule: AcceptanceRule) -> None:
    p_values, acceptance = sampled(PARAMS[params], DRAFTINGS[drafts], rule)
    assert min(p_values) > 1e-4
    if drafts in ("near-trimmed", "far", "far-longer"):
        assert acceptance > 0.15, "a test of drafts must accept some"


def test_the_fit_refuses_a_drafter_that_ships_another_law() -> None:
    def flattened(law: DraftLaw) -> DraftLaw:
        return DraftLaw(law.ids, torch.full_like(law.probs, 1 / law.probs.shape[1]))

    near = DRAFTINGS["near-trimmed"]
    assert near is not None
    liar = Drafting(near.table, near.width, near.block_size, near.trim, flattened)
    p_values, _ = sampled(PARAMS["plain"], liar, AcceptanceRule.RATIO)
    assert min(p_values) < 1e-6


def test_the_fit_refuses_a_drafter_that_draws_with_the_targets_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the ratio rule the draft's noise must be its own: what replaces a rejected draft would depend on it."""

    def entangled(ids: Tensor, probs: Tensor, seeds: Tensor, positions: Tensor, base_lens: Tensor, coupled: Tensor) -> Tensor:
        return draw(ids, probs, seeds, positions, base_lens, torch.ones_like(coupled))

    monkeypatch.setattr(exact_laws, "draw", entangled)
    p_values, _ = sampled(PARAMS["plain"], DRAFTINGS["far-longer"], AcceptanceRule.RATIO)
    assert min(p_values) < 1e-5


def test_the_fit_refuses_a_small_shift_of_temperature() -> None:
    world = World(markov_table(SIZE, 1))
    texts = world.generate(SamplingParams(temperature=1.05), [(1, 2)] * NUM_TEXTS, list(range(NUM_TEXTS)), NUM_TOKENS, None)
    assert min(world.fit(SamplingParams(), texts)) < 1e-6


# --- (c) the same through the whole engine, with a real model's forward --------------------------------------------------

TRIMMING = CostTable(Curve((1, 32, 256), (1.0, 1.03, 1.3)), Curve((1,), (0.0,)))  # admits survivals over about 0.03
ENGINE_PARAMS = {
    "temperature": 1.1,
    "top_p": 0.95,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.2,
}


@pytest.mark.parametrize("rule", list(AcceptanceRule))
def test_the_engines_tokens_fit_the_law(rule: AcceptanceRule, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 tokens of a tiny Llama with a grafted random drafter and an adaptive schedule, which would give such a drafter up."""
    monkeypatch.setattr(DraftPolicy, "depth", lambda self, _: self.block_size)
    monkeypatch.setattr(DraftWorth, "allows_drafts", lambda *_, **__: True)
    target, prompt, num_texts, num_tokens = tiny_target(), (7, 11, 13), 2500, 8
    pool = BlockPool(256)
    drafter = LocalDrafter(random_module(target), pool, law_width=16)
    engine = make_engine(target, drafter, pool, costs=TRIMMING, max_num_seqs=32, max_batch_tokens=256, max_queued=num_texts)
    sampling = SamplingParams(acceptance=rule, max_tokens=num_tokens, ignore_eos=True, **ENGINE_PARAMS)
    requests = [Request(str(i), prompt, sampling, noise_seed=9_000_001 + i) for i in range(num_texts)]
    outputs = [result.tokens for result in run(engine, requests).values()]
    counters = engine.counters
    assert counters.accepted > 200, "a test of drafts must accept some"
    assert counters.drafted < 0.9 * drafter.block_size * counters.drafted_rounds, "a test of schedules must trim some"
    logits = teacher_forced_logits(target, prompt, outputs).tolist()
    tokens, laws, groups = [], [], []
    for rows, output in zip(logits, outputs, strict=True):
        for j, token in enumerate(output):
            tokens.append(token)
            laws.append(reference_law(rows[j], sampling, prompt, output[:j]))
            groups.append(j % 4)
    by_id, by_rank = fit(tokens, torch.tensor(laws, dtype=torch.float64), groups)
    assert by_id > 1e-4
    assert by_rank > 1e-4


# --- (a) greedy text of the embedded model, real prompts, every drafter -------------------------------------------------

NUM_PROMPTS = 30
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def smollm() -> tuple[Engine, list[Request]]:
    """An fp32 engine of the embedded model and 30 real prompts of the project's own sets."""
    folder = str(prepare(default_cache(), print))
    target = as_target(load_model(folder, torch.float32, torch.device("cpu")), folder)
    tokenizer = load_tokenizer(folder)
    prompts = Path(__file__).parent.parent / "bench" / "prompts"
    requests = []
    for name in ("chat", "code", "math"):
        texts = [json.loads(line)["turns"][0] for line in (prompts / f"{name}.jsonl").read_text().splitlines()]
        for i, text in enumerate(sorted(texts, key=len)[: NUM_PROMPTS // 3]):
            ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
            requests.append(Request(f"{name}{i}", tuple(ids), SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)))
    return make_engine(target, num_blocks=600, max_batch_tokens=512, costs=FLAT), requests


def test_greedy_text_is_the_same_with_every_drafter(smollm: tuple[Engine, list[Request]]) -> None:
    engine, requests = smollm
    plain = {name: result.tokens for name, result in run(engine, requests).items()}
    truth = {r.id: [*r.prompt_token_ids, *plain[r.id]] for r in requests}
    drafters: dict[str, Drafter] = {"n-gram": NgramDrafter(3)}
    for fault in ("none", "random", "adversarial", "drop", "stale"):
        drafters[fault] = OracleDrafter(truth, 3, fault, vocab_size=engine.target.vocab_size)
    for name, drafter in drafters.items():
        engine.drafter, engine.drafts.policy = drafter, DraftPolicy(drafter.block_size)
        engine.drafts.survival = make_estimator("constant", drafter.block_size, drafter.signals)  # forgets the drafter before
        engine.drafts.worth = DraftWorth()
        engine.set_costs(FLAT)
        begin = engine.counters.drafted
        out = run(engine, requests)
        assert {n: r.tokens for n, r in out.items()} == plain, name
        assert engine.counters.drafted > begin, f"{name} drafted nothing"
        if name == "none":
            assert all(o.accepted == o.drafted for r in out.values() for o in r.outcomes), "the perfect drafter is always right"
