"""The engine on tiny models in fp32: the text never depends on drafts, batches, preemption or the prefix cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.drafters import OracleDrafter
from helpers.engines import FLAT, STEEP, Result, greedy, make_engine, run, tiny_target

from dspark.errors import BadRequest, Overloaded
from dspark.sampling import SamplingParams
from dspark.types import Drafter, Finish, Request, Speculation
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.targets import Target

PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(3 + 6 * i)] for i in range(6)}
MODES: list[tuple[str, Any]] = [("static:1", None), ("static:3", None), ("adaptive", FLAT), ("adaptive", STEEP), ("adaptive", None)]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def plain(target: Target) -> dict[str, Result]:
    return run(make_engine(target, speculation="off"), [greedy(name, prompt) for name, prompt in PROMPTS.items()])


def sequences(results: dict[str, Result]) -> dict[str, list[int]]:
    """All tokens of every request, as an oracle wants them."""
    return {name: PROMPTS[name] + result.tokens for name, result in results.items()}


def tokens(results: dict[str, Result]) -> dict[str, list[int]]:
    return {name: result.tokens for name, result in results.items()}


def test_greedy_equals_plain_transformers(target: Target, plain: dict[str, Result]) -> None:
    target.model.set_attn_implementation("eager")
    for name, prompt in PROMPTS.items():
        known = list(prompt)
        for token in plain[name].tokens:
            with torch.inference_mode():
                logits = target.model(torch.tensor([known]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token
            known.append(token)
    target.model.set_attn_implementation("dspark_paged")


@pytest.mark.parametrize("fault", ["none", "drop", "stale", "adversarial", "random"])
@pytest.mark.parametrize(("speculation", "costs"), MODES)
def test_drafts_never_change_greedy_text(target: Target, plain: dict[str, Result], fault: Any, speculation: str, costs: Any) -> None:
    drafter = OracleDrafter(sequences(plain), 4, fault, vocab_size=160)
    out = run(make_engine(target, drafter, speculation=speculation, costs=costs), [greedy(n, p) for n, p in PROMPTS.items()])
    assert tokens(out) == tokens(plain)
    assert drafter.num_collected > 0


def test_a_perfect_drafter_reaches_gamma_plus_one(target: Target, plain: dict[str, Result]) -> None:
    gamma = 4
    engine = make_engine(target, OracleDrafter(sequences(plain), gamma), speculation=f"static:{gamma}")
    out = run(engine, [greedy(n, p) for n, p in PROMPTS.items()])
    for result in out.values():
        rounds = result.outcomes[1:]  # the prompt's own step yields one token and has no draft
        assert all(o.accepted == o.drafted for o in rounds)
        assert all(len(o.tokens) == gamma + 1 for o in rounds[:-1])
    assert {len(r.outcomes) for r in out.values()} == {1 + math.ceil(23 / 5)}


def test_preemption_and_small_pools_change_nothing(target: Target, plain: dict[str, Result]) -> None:
    for drafter in (None, OracleDrafter(sequences(plain), 4), NgramDrafter()):
        engine = make_engine(target, drafter, num_blocks=9, costs=FLAT)
        out = run(engine, [greedy(n, p) for n, p in PROMPTS.items()])
        assert tokens(out) == tokens(plain)
        assert engine.scheduler.counters.preemptions > 0


SAMPLED = {
    "temperature": {"temperature": 0.8},
    "truncated": {"temperature": 1.2, "top_p": 0.8, "top_k": 20},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"temperature": 0.7, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "biased": {"temperature": 0.9, "logit_bias": {5: 4.0, 9: -100.0}, "min_tokens": 6},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
}


def sampled(name: str, params: dict[str, Any], seed: int = 11) -> Request:
    return Request(name, tuple(PROMPTS[name]), SamplingParams(**({"seed": seed, "max_tokens": 20, "ignore_eos": True} | params)))


@pytest.mark.parametrize("params", SAMPLED.values(), ids=SAMPLED.keys())
def test_a_seed_fixes_the_text(target: Target, params: dict[str, Any]) -> None:
    """Same request and seed: same tokens alone, in a batch of 16, with every drafter and mode, preempted, after a prefix hit."""
    requests = [sampled(name, params) for name in PROMPTS]
    alone = {r.id: run(make_engine(target, speculation="off"), [r])[r.id].tokens for r in requests}
    truth = {name: PROMPTS[name] + alone[name] for name in PROMPTS}
    others = [greedy(f"other{i}", [5 + i, 9, 11, 30 + i] * (1 + i % 5), 30) for i in range(10)]
    drafters: list[Drafter | None] = [None, NgramDrafter()]
    drafters += [OracleDrafter(truth, 5, fault, vocab_size=160) for fault in ("none", "stale", "random")]
    for drafter in drafters:
        for speculation, costs in (("static:2", None), ("adaptive", FLAT), ("adaptive", STEEP)):
            out = run(make_engine(target, drafter, speculation=speculation, costs=costs), requests + others)
            assert {r.id: out[r.id].tokens for r in requests} == alone
    squeezed = make_engine(target, OracleDrafter(truth, 5), num_blocks=9, costs=FLAT)
    out = run(squeezed, requests)
    assert {r.id: out[r.id].tokens for r in requests} == alone
    assert squeezed.scheduler.counters.preemptions > 0
    warm = make_engine(target, NgramDrafter(), costs=FLAT)
    for _ in range(2):
        out = run(warm, requests)
        assert {r.id: out[r.id].tokens for r in requests} == alone
    assert out["r5"].outcomes[0].num_cached_tokens == 32


@pytest.mark.parametrize("params", SAMPLED.values(), ids=SAMPLED.keys())
@pytest.mark.parametrize("rule", ["ratio", "coupled"])
def test_every_parameter_runs_with_every_drafter_under_both_rules(target: Target, params: dict[str, Any], rule: str) -> None:
    for drafter in (None, NgramDrafter(), OracleDrafter({n: PROMPTS[n] + PROMPTS[n] * 9 for n in PROMPTS}, 4)):
        requests = [sampled(name, params | {"acceptance": rule, "seed": None, "logprobs": 2}) for name in PROMPTS]
        out = run(make_engine(target, drafter, speculation="static:3"), requests)
        for result in out.values():
            assert len(result.tokens) == 20
            assert sum(len(o.logprobs or ()) for o in result.outcomes) == 20
            if "logit_bias" in params:
                assert 9 not in result.tokens


def test_a_replayed_request_goes_on_with_the_same_text(target: Target) -> None:
    request = sampled("r3", SAMPLED["temperature"])
    whole = run(make_engine(target), [request])["r3"].tokens
    prompt = request.prompt_token_ids
    replay = Request("r3", prompt + tuple(whole[:7]), request.sampling, num_prompt_tokens=len(prompt))
    assert whole[:7] + run(make_engine(target, NgramDrafter(), costs=FLAT), [replay])["r3"].tokens == whole


def test_prefix_hits_are_salted_and_counted(target: Target) -> None:
    engine = make_engine(target)
    prompt = tuple(range(3, 60))
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    first = run(engine, [Request("a", prompt, params)])["a"]
    second = run(engine, [Request("b", prompt, params)])["b"]
    salted = run(engine, [Request("c", prompt, params, cache_salt="tenant")])["c"]
    assert [r.outcomes[0].num_cached_tokens for r in (first, second, salted)] == [0, 48, 0]
    assert first.tokens == second.tokens == salted.tokens
    off = make_engine(target, prefix_cache=False)
    run(off, [Request("a", prompt, params)])
    assert run(off, [Request("b", prompt, params)])["b"].outcomes[0].num_cached_tokens == 0


def test_several_tokens_a_step_end_at_eos_stop_token_and_length(target: Target, plain: dict[str, Result]) -> None:
    name = "r2"
    text = plain[name].tokens
    oracle = sequences(plain)
    stop = next(t for i, t in enumerate(text) if i >= 5 and t not in text[:i])
    where = text.index(stop)

    def once(**params: Any) -> Result:
        request = Request(name, tuple(PROMPTS[name]), SamplingParams(**({"temperature": 0.0, "max_tokens": 24} | params)))
        return run(make_engine(target, OracleDrafter(oracle, 4), speculation="static:4"), [request])[name]

    stopped = once(stop_token_ids=[stop], ignore_eos=True)
    assert stopped.tokens == text[: where + 1]
    assert (stopped.finish, stopped.outcomes[-1].stop_reason) == (Finish.STOP, stop)
    short = once(max_tokens=7, ignore_eos=True)
    assert (short.tokens, short.finish) == (text[:7], Finish.LENGTH)
    last = stopped.outcomes[-1]
    assert last.accepted <= len(last.tokens)
    target.eos_ids, kept = (stop,), target.eos_ids
    try:
        ended = once()
        assert (ended.tokens, ended.finish) == (text[: where + 1], Finish.STOP)
        at_limit = once(max_tokens=where + 1)
        assert at_limit.finish is Finish.STOP, "an EOS at the length limit is a stop"
        assert len(once(min_tokens=where + 5).tokens) >= where + 5
    finally:
        target.eos_ids = kept


def test_prompt_logprobs_cover_the_prompt_once(target: Target) -> None:
    prompt = tuple(PROMPTS["r5"])
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=2, logprobs=0)
    for options in ({"max_batch_tokens": 16}, {"num_blocks": 12}):
        first = run(make_engine(target, **options), [Request("a", prompt, params)])["a"].outcomes[0]
        found = first.prompt_logprobs
        assert found is not None
        assert [e.token_id for e in found[1:] if e] == list(prompt[1:])
        target.model.set_attn_implementation("eager")
        with torch.inference_mode():
            law = target.model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
        target.model.set_attn_implementation("dspark_paged")
        for i, entry in enumerate(found[1:], start=1):
            assert entry is not None
            assert entry.logprob == pytest.approx(float(law[i - 1, prompt[i]]), abs=1e-4)
            assert len(entry.top) == 2
        assert first.prompt_logprobs is not None
        assert first.logprobs is not None


def test_speculation_per_request(target: Target, plain: dict[str, Result]) -> None:
    oracle = OracleDrafter(sequences(plain), 4)
    engine = make_engine(target, oracle, costs=FLAT)
    requests = [
        Request(n, tuple(p), greedy(n, p).sampling, speculation=Speculation.parse(mode))
        for (n, p), mode in zip(PROMPTS.items(), ["off", "static:1", "static:2", "adaptive", "adaptive:3", "off"], strict=True)
    ]
    out = run(engine, requests)
    assert tokens(out) == tokens(plain)
    most = {name: max(o.drafted for o in result.outcomes) for name, result in out.items()}
    assert most == {"r0": 0, "r1": 1, "r2": 2, "r3": 4, "r4": 3, "r5": 0}


def test_priority_and_limits(target: Target) -> None:
    engine = make_engine(target, max_num_seqs=1, max_queued=2)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    for name, priority in (("low", 5), ("high", -1), ("mid", 0)):
        engine.add(Request(name, (3, 4, 5), params, priority=priority))
    with pytest.raises(Overloaded):
        engine.add(Request("late", (3, 4, 5), params))
    finished = []
    while engine.has_work:
        finished += [o.request_id for o in engine.step() if o.finish]
    assert finished == ["high", "mid", "low"]


def test_without_a_queue_free_places_are_taken_and_no_more(target: Target) -> None:
    engine = make_engine(target, max_num_seqs=2, max_queued=0)
    engine.add(greedy("a", [3, 4]))
    engine.add(greedy("b", [3, 4]))
    with pytest.raises(Overloaded):
        engine.add(greedy("c", [3, 4]))


def test_abort_gives_everything_back(target: Target) -> None:
    engine = make_engine(target, NgramDrafter(), costs=FLAT, max_num_seqs=2)
    for name, prompt in PROMPTS.items():
        engine.add(greedy(name, prompt))
    engine.step()
    engine.step()
    for name in [*PROMPTS, "unknown"]:
        engine.abort(name)
        engine.pool.check()
    assert not engine.has_work
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize(
    ("prompt", "params", "field", "words"),
    [
        ((), {}, "prompt", "empty"),
        (tuple([5] * 300), {}, "prompt", r"300 tokens; at most 255 fit"),
        ((5, 160), {}, "prompt", "outside 0 to 159"),
        ((-1, 5), {}, "prompt", "outside"),
        ((5,), {"logit_bias": {160: 1.0}}, "logit_bias", "160"),
        ((5,), {"stop_token_ids": [4000]}, "stop_token_ids", "4000"),
        ((5,), {"stop": ["x"]}, "stop", "tokenizer"),
        ((5,), {"n": 2}, "n", "one choice"),
    ],
)
def test_bad_requests_name_the_field(target: Target, prompt: Any, params: dict[str, Any], field: str, words: str) -> None:
    engine = make_engine(target)
    with pytest.raises(BadRequest, match=words) as caught:
        engine.add(Request("a", prompt, SamplingParams(**params)))
    assert caught.value.param == field
    assert not engine.has_work
