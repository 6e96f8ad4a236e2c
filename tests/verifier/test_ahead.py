"""Plain decoding one step ahead of the host: the same tokens and outcomes, whatever ends, comes or goes while a step is under way."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from helpers.engines import FLAT, Result, greedy, make_engine, run, tiny_target
from helpers.toy_tokenizers import byte_level

from dspark.kernels.graphs import plain_calls
from dspark.sampling import SamplingParams
from dspark.types import Finish, LatencyBudget, Request, StepOutcome, VerifyPlan
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.costs import CostTable, Curve, LiveCosts
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.forward import BestTokens
from dspark.workers.verifier.runner import GraphOptions
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.step_buffers import HostStep
from dspark.workers.verifier.targets import Target

GRAPHS = GraphOptions(plain_calls, max_tokens=24, max_rows=32, max_model_len=256)
PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(3 + 9 * i)] for i in range(6)}
DEAR = CostTable(Curve((1, 2, 64), (1.0, 2.0, 64.0)), Curve((1,), (9.0,)))  # drafts never pay


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def ahead(target: Target, drafter: Any = None, **options: Any) -> Engine:
    """An engine on a clock of its own, which every look at it moves on by 10 ms."""
    ticks = itertools.count()
    return make_engine(target, drafter, graphs=GRAPHS, overlapped=True, clock=lambda: 0.01 * next(ticks), **options)


def requests(**params: Any) -> list[Request]:
    sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 20, "ignore_eos": True} | params))
    return [Request(name, tuple(prompt), sampling) for name, prompt in PROMPTS.items()]


def same(results: dict[str, Result], wanted: dict[str, Result]) -> bool:
    return all((results[name].tokens, results[name].finish) == (one.tokens, one.finish) for name, one in wanted.items())


def test_lengths_end_one_after_the_other(target: Target) -> None:
    mixed = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_tokens=5 + 4 * i)) for i, r in enumerate(requests())]
    engine = ahead(target)
    assert same(run(engine, mixed), run(make_engine(target), mixed))
    assert engine.ahead.launched >= 20


def test_a_stop_token_is_seen_one_step_late_and_costs_nothing(target: Target) -> None:
    texts = run(make_engine(target), requests())
    stops = tuple(sorted({text.tokens[4 + i] for i, text in enumerate(texts.values())}))
    wanted = run(make_engine(target), requests(stop_token_ids=stops))
    assert any(one.finish is Finish.STOP for one in wanted.values())
    engine = ahead(target)
    results = run(engine, requests(stop_token_ids=stops))
    assert same(results, wanted)
    assert engine.ahead.launched
    again = run(engine, [dataclasses.replace(r, id=f"{r.id}-2") for r in requests()])  # the prefix cache holds no wrong block
    assert {name: again[f"{name}-2"].tokens for name in texts} == {name: text.tokens for name, text in texts.items()}


def test_stop_strings(target: Target) -> None:
    tokenizer = byte_level()
    wanted = run(make_engine(target, tokenizer=tokenizer), requests(stop=("e", "1")))
    assert same(run(ahead(target, tokenizer=tokenizer), requests(stop=("e", "1"))), wanted)


def test_requests_come_and_go_under_a_step(target: Target) -> None:
    alone = {name: run(make_engine(target), [greedy(name, prompt, 30)])[name].tokens for name, prompt in PROMPTS.items()}
    engine = ahead(target, num_blocks=24, max_num_seqs=4)
    tokens: dict[str, list[int]] = {name: [] for name in PROMPTS}
    waiting = [greedy(name, prompt, 30) for name, prompt in PROMPTS.items()]
    was_aborted = False
    for step in range(400):
        if step % 5 == 0 and waiting:
            engine.add(waiting.pop(0))
        if step >= 13 and not was_aborted and len(tokens["r1"]) > 2 and engine.flights.is_plain:
            was_aborted = True
            engine.abort("r1")
            tokens["r1"] = []
            engine.add(greedy("r1", PROMPTS["r1"], 30))  # the same name again while the old one's step is under way
        for outcome in engine.step():
            tokens[outcome.request_id] += outcome.tokens
        engine.pool.check()
        if not engine.has_work and not waiting:
            break
    assert tokens == alone
    assert was_aborted
    assert engine.ahead.launched
    assert engine.pool.num_free == engine.pool.num_blocks


def test_short_prompts_join_the_steps_of_those_who_run(target: Target) -> None:
    """A graph has room for them: nothing is planned any more, and with a prefix hit they join with what is left of their prompts."""
    short = {f"s{i}": [3 + (5 * i + j) % 150 for j in range(4 + i)] for i in range(9)}
    short["s7"] = [*PROMPTS["r1"], 9, 8]  # begins as r1, which has been there: its first block is found
    long = [greedy("r1", [*PROMPTS["r1"], *range(20, 30)], 60)]
    coming = [greedy(name, prompt, 3 + 4 * i) for i, (name, prompt) in enumerate(short.items())]
    wanted = run(make_engine(target), [*long, *coming])
    engine = ahead(target, max_num_seqs=4)
    plans: list[VerifyPlan] = []
    lengths: list[int] = []
    engine.on_step = lambda plan, times: plans.append(plan)
    launch = engine.runner.launch

    def spy(step: HostStep) -> BestTokens:
        lengths.extend(step.lengths)
        return launch(step)

    engine.runner.launch = spy  # type: ignore[method-assign]
    assert same(run(engine, [*long, *coming]), wanted)
    assert len(plans) <= 2
    assert sum(length > 1 for length in lengths) >= 6
    assert {name: one.tokens for name, one in run(engine, [dataclasses.replace(r, id=f"{r.id}-2") for r in coming]).items()} == {
        f"{name}-2": one.tokens for name, one in wanted.items() if name != "r1"
    }, "the prefix cache holds what was computed beside others"


@pytest.mark.parametrize("mixed", [False, True])
def test_prompts_of_new_requests_are_computed_apart(target: Target, mixed: bool) -> None:
    """Unless one of them does not go on as the others do; the tokens are the same either way."""
    coming = [r for i, one in enumerate(range(12, 42, 5)) for r in requests(max_tokens=one)[i : i + 1]]
    wanted = run(make_engine(target), coming)
    engine = ahead(target, max_num_seqs=3)
    plans: list[VerifyPlan] = []
    engine.on_step = lambda plan, times: plans.append(plan)
    if mixed:
        coming[4] = dataclasses.replace(coming[4], sampling=dataclasses.replace(coming[4].sampling, prompt_logprobs=1))
    assert same(run(engine, coming), wanted)
    alone = [plan for plan in plans[1:] if all(row.num_known > 1 for row in plan.rows)]
    beside = [plan for plan in plans if len({row.num_known > 1 for row in plan.rows}) == 2]
    assert len(alone) >= 1
    assert bool(beside) == mixed
    assert engine.ahead.launched > 20


@pytest.mark.parametrize("length", [8, 90])
def test_only_a_prompt_that_fits_is_let_in_at_the_price_of_joining(target: Target, length: int) -> None:
    """A prompt that a graph has no room for holds those who run up: whoever waits with it is weighed against that."""
    prices: list[bool] = []
    engine = ahead(target, max_num_seqs=2)
    gate = engine.ahead._gate
    lets_in = gate.lets_in

    def spy(waiting: list[Sequence], num_running: int, num_places: int, joins: bool = False) -> bool:
        if waiting and num_places > 0:
            prices.append(joins)
        return lets_in(waiting, num_running, num_places, joins)

    gate.lets_in = spy  # type: ignore[method-assign,assignment]
    coming = [greedy(f"p{i}", [3 + (5 * i + j) % 150 for j in range(length)], 6 + 5 * i) for i in range(4)]
    assert same(run(engine, coming), run(make_engine(target), coming))
    assert prices
    assert all(joins == (length < engine.runner.max_launched - 1) for joins in prices)


def test_a_full_pool_ends_it(target: Target) -> None:
    wanted = run(make_engine(target), requests(max_tokens=60))
    engine = ahead(target, num_blocks=16)
    assert same(run(engine, requests(max_tokens=60)), wanted)
    assert engine.scheduler.counters.preemptions
    assert engine.ahead.launched


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"temperature": 1.0, "seed": 1, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.8, "acceptance": "coupled"},
    {"temperature": 0.7, "min_p": 0.05, "top_p": 0.9},
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 50, "min_tokens": 6, "ignore_eos": False},
]


def test_sampled_requests_are_drawn_on_the_device(target: Target) -> None:
    """All kinds at once, with ends one after the other and short prompts that join; noise is keyed, so the text is the host's."""
    mixed = [
        Request(f"{name}-{i}", tuple(prompt), SamplingParams(**({"max_tokens": 9 + 4 * i, "ignore_eos": True} | params)), noise_seed=50 + i)
        for i, params in enumerate(SAMPLED)
        for name, prompt in PROMPTS.items()
    ]
    engine = ahead(target, max_num_seqs=9)
    planned = _count_plans(engine)
    assert same(run(engine, mixed), run(make_engine(target), mixed))
    assert engine.ahead.launched > 2 * len(planned)
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_prompt_that_is_to_be_scored_does_not_join(target: Target) -> None:
    """A step that is launched ahead has the logits of last tokens alone."""
    long = greedy("long", PROMPTS["r2"], 60)
    scored = Request("scored", tuple(PROMPTS["r1"]), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=1))
    wanted = run(make_engine(target), [long, scored])
    engine = ahead(target)
    engine.add(long)
    while engine.ahead.launched < 5:
        engine.step()
    engine.add(scored)
    outcomes: list[StepOutcome] = []
    while engine.has_work:
        outcomes += [outcome for outcome in engine.step() if outcome.request_id == "scored"]
    assert [token for outcome in outcomes for token in outcome.tokens] == wanted["scored"].tokens
    found, expected = outcomes[0].prompt_logprobs, wanted["scored"].outcomes[0].prompt_logprobs
    assert found is not None
    assert expected is not None
    assert [one and one.token_id for one in found] == [one and one.token_id for one in expected]
    assert len(found) == len(PROMPTS["r1"])


def _count_plans(engine: Engine) -> list[VerifyPlan]:
    plans: list[VerifyPlan] = []
    engine.on_step = lambda plan, times: plans.append(plan)
    return plans


@pytest.mark.parametrize(
    "params", [{"presence_penalty": 0.5}, {"logprobs": 1}, {"min_tokens": 15}, {"temperature": 0.8, "seed": 1, "logprobs": 0}]
)
def test_edits_and_scores_run_ahead_as_well(target: Target, params: dict[str, Any]) -> None:
    wanted = run(make_engine(target), requests(**params))
    engine = ahead(target)
    results = run(engine, requests(**params))
    assert same(results, wanted)
    assert all(outcome.logprobs is not None or "logprobs" not in params for outcome in results["r2"].outcomes)
    assert engine.ahead.launched > 10


@pytest.mark.parametrize(("tpot_ms", "launches"), [(1e4, True), (1.0, False)])
def test_budgets_that_plain_steps_keep_by_far_need_no_plans(target: Target, tpot_ms: float, launches: bool) -> None:
    """Steps that take a second or two, by the table, keep ten seconds a token; a millisecond is planned for."""
    budgeted = [dataclasses.replace(r, latency_budget=LatencyBudget(tpot_ms=tpot_ms)) for r in requests(max_tokens=40)]
    wanted = run(make_engine(target), budgeted)
    engine = ahead(target, NgramDrafter(), costs=DEAR, speculation="off", max_num_seqs=3)
    assert same(run(engine, budgeted), wanted)
    assert (engine.ahead.launched > 10) is launches
    engine.aside.close()


def test_a_budget_without_a_table_is_planned_for(target: Target) -> None:
    engine = ahead(target)
    budgeted = [dataclasses.replace(r, latency_budget=LatencyBudget(tpot_ms=1e6)) for r in requests()]
    assert same(run(engine, budgeted), run(make_engine(target), budgeted))
    assert engine.ahead.launched == 0


def test_paused_speculation_runs_ahead_and_comes_back(target: Target) -> None:
    """Drafts that never pay are looked at now and then; between looks steps are plain and launched ahead."""
    wanted = run(make_engine(target), requests(max_tokens=60))
    engine = ahead(target, NgramDrafter(), costs=DEAR)
    assert same(run(engine, requests(max_tokens=60)), wanted)
    assert engine.ahead.launched
    assert engine.counters.drafts_asked
    engine.aside.close()


def test_static_speculation_is_not_run_ahead(target: Target) -> None:
    engine = ahead(target, NgramDrafter(), costs=FLAT, speculation="static:3")
    assert same(run(engine, requests()), run(make_engine(target), requests()))
    assert engine.ahead.launched == 0
    engine.aside.close()


def test_plain_steps_teach_their_own_cost() -> None:
    costs = LiveCosts(CostTable(Curve((1, 64), (1.0, 4.0))), 64)
    assert costs.plain_seconds(64, 0) == 4.0
    for _ in range(400):
        costs.observe_plain(64, 0, 2.0)
    assert costs.plain_seconds(64, 0) == pytest.approx(2.0, rel=0.05)
    assert costs.table.step_seconds(64, 0) == 4.0, "the table of steps that are not launched ahead stays"


def test_the_hosts_work_counts_where_it_cannot_hide() -> None:
    costs = LiveCosts(CostTable(Curve((1, 64), (1.0, 4.0))), 64)
    assert costs.host_seconds(10, drafted=True) == 0.0
    for _ in range(200):
        costs.observe_host(10, 2e-3, drafted=True)
    assert costs.host_seconds(10, drafted=True) == costs.host_seconds(10, drafted=False) == pytest.approx(2e-3)
    for _ in range(200):
        costs.observe_host(10, 1e-3, drafted=False)
    assert costs.host_seconds(20, drafted=False) == pytest.approx(2e-3)
    assert costs.host_seconds(10, drafted=True) == pytest.approx(2e-3)
    costs.observe_host(10, 100.0, drafted=True)
    assert costs.host_seconds(10, drafted=True) < 3e-3, "one disturbance is not believed"
