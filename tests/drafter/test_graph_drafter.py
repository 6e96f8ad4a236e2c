"""The drafter of a GPU, run on the CPU: fed inside the target's forward, it drafts from fixed tensors what the drafters of a CPU do."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from helpers.draft_modules import EAGLE3, random_module
from helpers.engines import FLAT, STEEP, Spy, greedy, make_engine, run, tiny_target
from helpers.toy_tokenizers import byte_level

from dspark.kernels.graphs import plain_calls
from dspark.sampling import SamplingParams
from dspark.types import Finish, LatencyBudget, Mode, Request, Speculation, VerifyPlan
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.eagle3_local import Eagle3Drafter
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.graph_local import GraphDrafter
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.module_config import HeadType, LayerMask
from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.runner import GraphOptions
from dspark.workers.verifier.targets import Target

PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(4 + 9 * i)] for i in range(5)}
WIDTH = 8
DEAR = CostTable(Curve((1, 2, 64), (1.0, 2.0, 64.0)), Curve((1,), (9.0,)))  # drafts never pay


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def engines(
    target: Target, num_blocks: int = 128, overlapped: bool = True, graph_tokens: int = 40, **options: Any
) -> tuple[Engine, Engine]:
    """One with a drafter of a CPU, one with ``GraphDrafter`` and graphs, over the same module."""
    module = options.pop("module", None) or random_module(target)
    pools = [BlockPool(num_blocks) for _ in range(2)]
    is_block = isinstance(module, DSparkModule)
    local = LocalDrafter(module, pools[0], WIDTH, head_top_k=0) if is_block else Eagle3Drafter(module, pools[0], WIDTH)
    eager = make_engine(target, local, pools[0], overlapped=overlapped, **options)
    drafter = GraphDrafter(module, pools[1], WIDTH, max_rows=32, max_model_len=256)
    graphs = GraphOptions(
        plain_calls, max_tokens=graph_tokens, max_rows=32, max_model_len=256, longest=5, with_trees=True, with_matches=True, law_width=WIDTH
    )
    engine = make_engine(target, drafter, pools[1], graphs=graphs, overlapped=overlapped, **options)
    drafter.prepare(plain_calls, engine.runner.step_tokens, engine.runner.draft_laws)
    return eager, engine


def module_of(target: Target, kind: str) -> DSparkModule | Eagle3Module:
    """A random module: EAGLE-3's, or a block's with a head of that kind."""
    without = {"has_confidence": False, "confidence_with_markov": False, "markov_rank": 0} if kind == "none" else {}
    return random_module(target, **EAGLE3) if kind == "eagle3" else random_module(target, head_type=HeadType(kind), **without)


def requests(**params: Any) -> list[Request]:
    sampling = SamplingParams(**({"max_tokens": 24, "ignore_eos": True} | params))
    return [Request(name, tuple(prompt), sampling, noise_seed=5) for name, prompt in PROMPTS.items()]


def assert_same_trees(expected: Spy, actual: Spy, share: float = 1.0) -> None:
    """A step that is launched ahead drafts for requests that are about to end, too, and as much as for the others.

    ``share`` of them at least: where requests lose their places at different steps, they draft behind other tokens.
    """
    common = expected.trees.keys() & actual.trees.keys()
    assert len(common) > 10
    assert len(common) >= share * len(expected.trees)
    assert len(actual.trees) <= len(expected.trees) + len(PROMPTS)
    for key in common:
        tree = expected.trees[key]
        other = actual.trees[key].first(len(tree.tokens))
        assert (other.tokens, other.parents) == (tree.tokens, tree.parents)
        assert other.confidence == pytest.approx(tree.confidence, abs=1e-4)
        assert other.margin == pytest.approx(tree.margin, abs=1e-3)
        assert (other.law is None) == (tree.law is None)
        if tree.law is not None and other.law is not None:
            torch.testing.assert_close(other.law.probs, tree.law.probs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 3}, {"temperature": 0.8}], ids=["greedy", "coupled", "ratio"]
)
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "eagle3"])
def test_the_same_drafts_and_the_same_text(target: Target, params: dict[str, Any], kind: str) -> None:
    pair = engines(target, module=module_of(target, kind), speculation="static:4")
    spies = [Spy(engine) for engine in pair]
    texts = [{name: result.tokens for name, result in run(engine, requests(**params)).items()} for engine in pair]
    if "seed" not in params and params["temperature"]:  # ratio judges a block as one, and only planned ones are short before an end
        texts = [{name: tokens[:-4] for name, tokens in text.items()} for text in texts]
    assert texts[0] == texts[1]
    assert_same_trees(spies[0], spies[1])
    assert pair[1].ahead.launched > 10


@pytest.mark.parametrize("mask", [LayerMask(causal=True), LayerMask()])
def test_blocks_of_both_kinds(target: Target, mask: LayerMask) -> None:
    pair = engines(target, module=random_module(target, layer_masks=(mask, LayerMask())), speculation="static:3")
    spies = [Spy(engine) for engine in pair]
    for engine in pair:
        run(engine, requests(temperature=0.0))
    assert_same_trees(spies[0], spies[1])


@pytest.mark.parametrize("kind", ["vanilla", "eagle3"])
def test_chunks_prefix_hits_and_preemption_keep_it_fed(target: Target, kind: str) -> None:
    module = module_of(target, kind)
    ticks = itertools.count()
    pair = engines(target, num_blocks=14, module=module, speculation="static:3", max_batch_tokens=16, clock=lambda: 0.01 * next(ticks))
    spies = [Spy(engine) for engine in pair]
    for engine in pair:
        for name in ("other", "again"):
            run(engine, [greedy(name, PROMPTS["r4"], 12)])
        run(engine, requests(temperature=0.0, max_tokens=90))
        assert engine.scheduler.counters.prefix_hits
        assert engine.scheduler.counters.preemptions
    assert_same_trees(spies[0], spies[1], share=0.9)


@pytest.mark.parametrize(("head", "shape"), [("vanilla", "tree:7:4"), ("gated", "tree:9:2"), ("rnn", "tree:30"), ("none", "tree:9")])
def test_trees_move_the_drafters_context_too(target: Target, head: str, shape: str) -> None:
    pair = engines(target, module=module_of(target, head), speculation=shape, overlapped=False)
    spies = [Spy(engine) for engine in pair]
    texts = [{name: result.tokens for name, result in run(engine, requests(temperature=0.0)).items()} for engine in pair]
    assert texts[0] == texts[1]
    assert_same_trees(spies[0], spies[1])
    assert any(not tree.is_chain for tree in spies[1].trees.values())


def test_trees_of_all_sizes_and_rules_beside_chains(target: Target) -> None:
    """More trees than a graph holds, laws that must outlive the graph that left them, and chains in between."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("tree:5", {"temperature": 0.0}),
        ("tree:30:3", {"temperature": 0.8}),
        ("static:3", {"temperature": 0.8}),
        ("tree:20", {"temperature": 0.9, "seed": 3}),
        ("tree:12:2", {"temperature": 1.1}),
        ("tree:9", {"temperature": 0.7}),
    ]
    asked = [
        Request(
            f"{name}-{i}",
            tuple(prompt),
            SamplingParams(max_tokens=14, ignore_eos=True, **params),
            noise_seed=30 + i,
            speculation=Speculation.parse(shape),
        )
        for i, (shape, params) in enumerate(kinds)
        for name, prompt in PROMPTS.items()
    ]
    pair = engines(target, max_num_seqs=30, max_batch_tokens=1024, overlapped=False, graph_tokens=1024)
    spies = [Spy(engine) for engine in pair]
    texts = [{name: result.tokens for name, result in run(engine, asked).items()} for engine in pair]
    assert texts[0] == texts[1]
    assert_same_trees(spies[0], spies[1])


def test_an_eagle_drafts_chains_where_trees_are_asked_for(target: Target) -> None:
    pair = engines(target, module=module_of(target, "eagle3"), speculation="tree:9:3", overlapped=False)
    spies = [Spy(engine) for engine in pair]
    texts = [{name: result.tokens for name, result in run(engine, requests(temperature=0.0)).items()} for engine in pair]
    assert texts[0] == texts[1]
    assert_same_trees(spies[0], spies[1])
    assert {len(tree.tokens) for tree in spies[1].trees.values()} <= {1, 2, 3}


def test_an_eagle_keeps_features_under_the_targets_blocks(target: Target) -> None:
    """What another verifier needs to draft on from these blocks goes with them."""
    _, engine = engines(target, module=module_of(target, "eagle3"), speculation="static:4")
    pools = engine.drafter.block_pools()  # type: ignore[attr-defined]
    assert pools.keys() == {"features", "key 0", "value 0"}
    assert not any(pool.any() for pool in pools.values())
    run(engine, [greedy("r", range(5, 53), 3)])
    written = {name: pool[: engine.pool.num_blocks].flatten(2).any(2) for name, pool in pools.items()}
    assert int(written["features"].sum()) >= 50
    assert torch.equal(written["features"], written["key 0"][: len(written["features"])])


@pytest.mark.parametrize("costs", [FLAT, STEEP])
def test_adaptive_speculation(target: Target, costs: Any) -> None:
    plain = {name: result.tokens for name, result in run(make_engine(target, speculation="off"), requests(temperature=0.0)).items()}
    _, engine = engines(target, costs=costs)
    assert {name: result.tokens for name, result in run(engine, requests(temperature=0.0)).items()} == plain
    assert engine.counters.drafted
    engine.aside.close()


@pytest.mark.parametrize("kind", ["vanilla", "eagle3"])
def test_plain_steps_feed_it(target: Target, kind: str) -> None:
    """Speculation pauses, plain steps are launched ahead, and the drafts that follow are those of a drafter that saw every step."""
    module = module_of(target, kind)
    eager, _ = engines(target, module=module, speculation="static:4", num_blocks=64)
    _, graphed = engines(target, module=module, costs=DEAR, num_blocks=64)
    spies = [Spy(eager), Spy(graphed)]
    for engine in (eager, graphed):
        run(engine, [greedy("r1", PROMPTS["r1"], 200)])
        engine.aside.close()
    assert graphed.ahead.launched
    common = spies[0].trees.keys() & spies[1].trees.keys()
    late = [key for key in common if key[1] > 40]
    assert late
    assert all(spies[0].trees[key].tokens == spies[1].trees[key].tokens for key in late)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 0.8, "logprobs": 0, "min_tokens": 9}])
def test_drafts_are_begun_behind_the_step(target: Target, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests draft on from what the device accepted; the host's own launches are for prompts."""
    _, engine = engines(target, speculation="static:4")
    graphs = engine.drafter._graphs  # type: ignore[attr-defined]
    launched = {"continue_step": 0, "launch": 0}
    for name in launched:
        inner = getattr(graphs, name)

        def spy(rows: Any, *tables: Any, inner: Any = inner, name: str = name) -> Any:
            launched[name] += len(*tables or (rows,))
            return inner(rows, *tables)

        monkeypatch.setattr(graphs, name, spy)
    accepted = run(engine, requests(**params))
    rounds = sum(len(result.outcomes) for result in accepted.values())
    assert launched["continue_step"] > 0.8 * (rounds - len(PROMPTS))
    assert launched["launch"] <= 2 * len(PROMPTS)


def test_requests_of_all_rules_fly_together(target: Target) -> None:
    """The same drafts, laws and texts as where the host judges, with ends at different times and prompts that join."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 3, "top_p": 0.9},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 30},
        {"temperature": 1.3, "top_p": 0.85, "min_p": 0.01},
    ]
    mixed = [
        Request(f"{name}-{i}", tuple(prompt), SamplingParams(max_tokens=16 + 5 * i, ignore_eos=True, **params), noise_seed=9 + i)
        for i, params in enumerate(kinds)
        for name, prompt in PROMPTS.items()
    ]
    pair = engines(target, speculation="static:4", max_num_seqs=6)
    spies = [Spy(engine) for engine in pair]
    results = [run(engine, mixed) for engine in pair]
    for request in mixed:
        tokens = [result[request.id].tokens for result in results]
        assert len(tokens[0]) == len(tokens[1])
        kept = len(tokens[0]) - (0 if request.sampling.is_exact else 4)  # see above
        assert tokens[0][:kept] == tokens[1][:kept], request.id
        accepted = [sum(outcome.accepted for outcome in result[request.id].outcomes[:-3]) for result in results]
        assert accepted[0] == accepted[1]
    assert sum(key in spies[1].trees for key in spies[0].trees) > 0.9 * len(spies[0].trees)
    counters = [engine.counters for engine in pair]
    assert pair[1].ahead.launched > counters[1].steps // 2
    assert counters[1].accepted > 0


EDITS: list[dict[str, Any]] = [
    {"temperature": 0.0, "presence_penalty": 1.2, "frequency_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.4, "logprobs": 3},
    {"temperature": 0.9, "seed": 3, "logit_bias": {7: 4.0, 11: -100.0, 20: 2.5}, "logprobs": 0},
    {"temperature": 1.0, "frequency_penalty": 0.8, "top_p": 0.9, "logprobs": 2},
    {"temperature": 0.0, "min_tokens": 12, "ignore_eos": False, "stop_token_ids": tuple(range(0, 160, 3))},
    {"temperature": 0.7, "repetition_penalty": 0.9, "min_tokens": 5, "seed": 8, "stop_token_ids": (9, 10)},
    {"temperature": 0.0},
]


def edited_requests(kinds: list[dict[str, Any]], max_tokens: int = 16) -> list[Request]:
    return [
        Request(
            f"{name}-{i}",
            tuple(prompt),
            SamplingParams(**({"max_tokens": max_tokens + 5 * i, "ignore_eos": True} | params)),
            noise_seed=9 + i,
        )
        for i, params in enumerate(kinds)
        for name, prompt in PROMPTS.items()
    ]


@pytest.mark.parametrize("speculation", ["off", "static:4"])
def test_edits_and_scores_fly(target: Target, speculation: str) -> None:
    """Text and log-probabilities of the host's judge, with requests that come and go, and counts that follow what was accepted."""
    asked = edited_requests(EDITS)[::2]
    pair = engines(target, speculation=speculation, max_num_seqs=6)
    results = [run(engine, asked) for engine in pair]
    for request in asked:
        expected, found = (result[request.id] for result in results)
        kept = len(expected.tokens) - (0 if request.sampling.is_exact or speculation == "off" else 4)  # see above
        assert found.tokens[:kept] == expected.tokens[:kept], request.id
        if request.sampling.is_exact:
            assert found.finish is expected.finish
        scores = [[one for outcome in result.outcomes for one in outcome.logprobs or ()] for result in (expected, found)]
        assert len(scores[0]) == (0 if request.sampling.logprobs is None else len(expected.tokens))
        for one, other in zip(scores[0][:kept], scores[1][:kept], strict=True):
            assert (other.token_id, other.rank, len(other.top)) == (one.token_id, one.rank, len(one.top))
            assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
            assert [token for token, _ in other.top] == [token for token, _ in one.top]
    assert pair[1].ahead.launched > pair[1].counters.steps // 2
    assert speculation == "off" or pair[1].counters.accepted > 0


@pytest.mark.parametrize("kind", [EDITS[1], {"temperature": 0.7, "repetition_penalty": 0.9, "seed": 8}])
def test_counts_survive_planned_steps_and_lost_places(target: Target, kind: dict[str, Any]) -> None:
    """A neighbour with a budget keeps steps from being launched early for a while, and a small pool takes places away."""
    asked = edited_requests([kind], max_tokens=70)
    busy = Request(
        "busy", (3, 4, 5), SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), latency_budget=LatencyBudget(tpot_ms=1e6)
    )
    pair = engines(target, num_blocks=24, speculation="static:3")
    texts = []
    for engine in pair:
        results = run(engine, asked[:3])
        results |= run(engine, [*asked[3:], busy, *(dataclasses.replace(request, id=f"again-{request.id}") for request in asked[:3])])
        texts.append({name: result.tokens for name, result in results.items()})
    assert texts[0] == texts[1]
    assert pair[1].ahead.launched > 10
    assert pair[1].scheduler.counters.preemptions
    assert not pair[1].runner._judge.edits._places  # type: ignore[union-attr]  # all ended


def test_more_rows_than_are_edited_at_once_are_planned(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scheduler decides the depth of is no deeper than fits: rows of 16 leave five requests two drafts each."""
    asked = edited_requests(EDITS[:1])
    plain = {name: result.tokens for name, result in run(make_engine(target, speculation="off"), asked).items()}
    for name in ("ahead", "device_edits", "device_judge"):
        monkeypatch.setattr(f"dspark.workers.verifier.{name}.EDIT_ROWS", 16)
    monkeypatch.setattr("dspark.workers.verifier.device_judge.EDIT_SIZES", (4, 16))
    _, engine = engines(target, speculation="static:4")
    assert {name: result.tokens for name, result in run(engine, asked).items()} == plain
    assert engine.ahead.launched > 0
    _, engine = engines(target, costs=FLAT)
    results = run(engine, asked)
    engine.aside.close()
    assert {name: result.tokens for name, result in results.items()} == plain
    assert engine.ahead.launched > 5
    assert max(outcome.drafted for result in results.values() for outcome in result.outcomes[4:-3]) == 2


def test_steps_are_launched_behind_drafts_that_the_host_has_not_seen(target: Target) -> None:
    """The same text and the same drafts, with ends at different times, a stop token, and requests that come and go meanwhile."""
    module = random_module(target)
    eager, graphed = engines(target, module=module, speculation="static:3", max_num_seqs=4)
    wanted = [
        Request(name, tuple(prompt), SamplingParams(temperature=0.0, max_tokens=20 + 9 * i, ignore_eos=True))
        for i, (name, prompt) in enumerate(PROMPTS.items())
    ]
    texts = [{name: (result.tokens, result.finish) for name, result in run(engine, wanted).items()} for engine in (eager, graphed)]
    assert texts[0] == texts[1]
    assert graphed.ahead.launched > 10
    assert not graphed.drafts.worth._levels, "a fixed length says nothing of what adaptive drafts would bring"
    stop = texts[0]["r2"][0][11]
    stopped = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, stop_token_ids=(stop,))) for r in wanted]
    texts = [{name: (result.tokens, result.finish) for name, result in run(engine, stopped).items()} for engine in (eager, graphed)]
    assert texts[0] == texts[1]


def test_an_aborted_request_leaves_the_others_alone(target: Target) -> None:
    plain = {name: result.tokens for name, result in run(make_engine(target, speculation="off"), requests(temperature=0.0)).items()}
    _, engine = engines(target, speculation="static:3")
    tokens: dict[str, list[int]] = {name: [] for name in PROMPTS}
    for request in requests(temperature=0.0):
        engine.add(request)
    for step in range(200):
        if step == 5:
            assert engine.flights.under_way
            assert not engine.flights.is_plain
            engine.abort("r1")
            tokens["r1"] = []
            engine.add(next(request for request in requests(temperature=0.0) if request.id == "r1"))
        for outcome in engine.step():
            tokens[outcome.request_id] += outcome.tokens
        engine.pool.check()
        if not engine.has_work:
            break
    assert tokens == plain
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_small_pool_and_seeded_neighbours(target: Target) -> None:
    mixed = [*requests(temperature=0.0, max_tokens=40)[:3], *requests(temperature=0.9, seed=3, max_tokens=40)[3:]]
    plain = {name: result.tokens for name, result in run(make_engine(target, speculation="off"), mixed).items()}
    _, engine = engines(target, num_blocks=16, speculation="static:4")
    assert {name: result.tokens for name, result in run(engine, mixed).items()} == plain


def test_what_lands_is_counted_and_learnt(target: Target) -> None:
    """Steps that are launched ahead fill the same counters, and teach the estimates of survival that later plans use."""
    _, engine = engines(target, costs=FLAT)
    results = run(engine, requests(temperature=0.0, max_tokens=60))
    engine.aside.close()
    counters, outcomes = engine.counters, [outcome for result in results.values() for outcome in result.outcomes]
    assert engine.ahead.launched > 10
    assert counters.generated == sum(len(outcome.tokens) for outcome in outcomes)
    assert counters.rounds == len(outcomes) == sum(counters.windows)
    assert counters.drafted == sum(outcome.drafted for outcome in outcomes)
    assert counters.accepted == sum(k * count for k, count in enumerate(counters.accepted_lengths))
    assert counters.drafted_rounds == sum(counters.accepted_lengths) == sum(outcome.drafted > 0 for outcome in outcomes)
    assert sum(one.accepted for one in counters.by_rule.values()) == counters.accepted
    report = engine.survival.report()
    assert report.rounds > 30
    assert report.positions[0].acceptance == pytest.approx(sum(counters.accepted_lengths[1:]) / counters.drafted_rounds, abs=0.15)


def test_stop_strings_end_what_runs_ahead(target: Target) -> None:
    tokenizer = byte_level()
    wanted = run(make_engine(target, tokenizer=tokenizer, speculation="off"), requests(temperature=0.0, stop=("e", "1"), max_tokens=60))
    assert any(result.finish is Finish.STOP for result in wanted.values())
    _, engine = engines(target, tokenizer=tokenizer, speculation="static:4")
    results = run(engine, requests(temperature=0.0, stop=("e", "1"), max_tokens=60))
    for name, one in results.items():
        assert (one.tokens, one.finish) == (wanted[name].tokens, wanted[name].finish)
    assert engine.ahead.launched


def test_the_end_of_the_context_ends_running_ahead(target: Target) -> None:
    """No step reaches beyond the longest request that the engine has room for, though all of them could end there."""
    long = [greedy(name, [*prompt, *(3 + i % 150 for i in range(200))], 200) for name, prompt in PROMPTS.items()]
    wanted = {name: (one.tokens, one.finish) for name, one in run(make_engine(target, speculation="off"), long).items()}
    _, engine = engines(target, speculation="static:4", max_batch_tokens=256)
    assert {name: (one.tokens, one.finish) for name, one in run(engine, long).items()} == wanted
    assert engine.ahead.launched


@pytest.mark.parametrize("mode", ["static:4", "adaptive"])
def test_prompts_of_new_requests_are_computed_beside_drafts_or_apart(target: Target, mode: str) -> None:
    """Requests come while others run from graphs: their prompts join a step if there is room, or get one of their own; and all go on
    together, with the same tokens and the same drafts as ever."""
    coming = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_tokens=20 + 9 * i))
        for i, r in enumerate(requests(temperature=0.0))
    ]
    wanted = {name: (one.tokens, one.finish) for name, one in run(make_engine(target, speculation="off"), coming).items()}
    ticks = itertools.count()
    eager, engine = engines(target, speculation=mode, costs=FLAT, max_num_seqs=2, clock=lambda: 0.01 * next(ticks))
    spies = [Spy(eager), Spy(engine)]
    run(eager, coming)
    plans: list[VerifyPlan] = []
    engine.on_step = lambda plan, times: plans.append(plan)
    joined: list[str] = []
    launch = engine.ahead.launch_drafts

    def spy(sequences: list[Any], drafts: Any, num_drafts: int, new: list[Any]) -> Any:
        joined.extend(sequence.id for sequence in new)
        return launch(sequences, drafts, num_drafts, new)

    engine.ahead.launch_drafts = spy  # type: ignore[method-assign]
    assert {name: (one.tokens, one.finish) for name, one in run(engine, coming).items()} == wanted
    engine.aside.close()
    alone = [plan for plan in plans[1:] if all(row.num_known > 1 for row in plan.rows)]
    assert len(joined) >= 2
    assert len(alone) >= 1
    assert not [plan for plan in plans if len({row.num_known > 1 for row in plan.rows}) == 2]
    assert engine.ahead.launched > 10
    if mode == "static:4":
        assert_same_trees(*spies)


@pytest.mark.parametrize(("mode", "beside"), [("adaptive", [(6, 3)]), ("static:4", [])])
def test_drafts_make_room_for_prompts_that_wait(target: Target, mode: str, beside: list[tuple[int, int]]) -> None:
    """Six rows of four drafts and a prompt of fifteen tokens are more than the 40 of a graph: the scheduler's drafts give way."""
    waiting = greedy("new", range(3, 18), 10)
    coming = [*(greedy(f"r{i}", [3 + i, 9, 4], 12 + 20 * (i > 0)) for i in range(7)), waiting]
    wanted = {name: one.tokens for name, one in run(make_engine(target, speculation="off"), coming).items()}
    _, engine = engines(target, speculation=mode, costs=FLAT, max_num_seqs=7)
    joined: list[tuple[int, int]] = []
    launch = engine.ahead.launch_drafts

    def spy(sequences: list[Any], drafts: Any, num_drafts: int, new: list[Any]) -> Any:
        joined.extend((len(sequences), num_drafts) for _ in new)
        return launch(sequences, drafts, num_drafts, new)

    engine.ahead.launch_drafts = spy  # type: ignore[method-assign]
    assert {name: one.tokens for name, one in run(engine, coming).items()} == wanted
    engine.aside.close()
    assert joined == beside


@pytest.mark.parametrize("seats", [3, 8])
def test_looks_are_no_deeper_than_a_request_allows(target: Target, seats: int) -> None:
    """Speculation pauses; what looks at acceptance now and then, flying from plain steps to drafted ones and back, keeps the limit."""
    _, engine = engines(target, costs=DEAR, speculation="adaptive:2", clock=lambda: 0.0, max_num_seqs=seats)
    plans: list[VerifyPlan] = []
    engine.on_step = lambda plan, times: plans.append(plan)
    results = run(engine, requests(temperature=0.0, max_tokens=100))
    engine.aside.close()
    assert {n: r.tokens for n, r in results.items()} == {
        n: r.tokens for n, r in run(make_engine(target, speculation="off"), requests(temperature=0.0, max_tokens=100)).items()
    }
    drafted = [outcome.drafted for result in results.values() for outcome in result.outcomes]
    assert max(drafted) == 2
    assert drafted.count(0) > len(drafted) // 2
    assert len(plans) < engine.ahead.launched // 4, "no step is planned to look, or to go back"


def test_requests_with_other_depths_are_verified_to_theirs(target: Target) -> None:
    first, *others = requests(temperature=0.0, max_tokens=40)
    mixed = [dataclasses.replace(first, speculation=Speculation(Mode.STATIC, 2)), *others]
    plain = {name: result.tokens for name, result in run(make_engine(target, speculation="off"), mixed).items()}
    _, engine = engines(target, speculation="static:4")
    results = run(engine, mixed)
    assert {name: result.tokens for name, result in results.items()} == plain
    assert max(outcome.drafted for outcome in results[first.id].outcomes) == 2
    assert max(outcome.drafted for outcome in results[others[0].id].outcomes) == 4


def test_blocks_are_as_short_as_a_step_that_is_launched_ahead_wants_them(target: Target) -> None:
    """Five requests and graphs of 40 tokens leave room for drafts of 4, graphs of 15 for drafts of 2."""
    module, longest = random_module(target), []
    for tokens in (40, 15):
        pool = BlockPool(128)
        drafter = GraphDrafter(module, pool, WIDTH, max_rows=32, max_model_len=256)
        graphs = GraphOptions(plain_calls, max_tokens=tokens, max_rows=32, max_model_len=256, longest=5, with_matches=True, law_width=WIDTH)
        engine = make_engine(target, drafter, pool, graphs=graphs, overlapped=True, costs=FLAT)
        drafter.prepare(plain_calls, engine.runner.step_tokens, engine.runner.draft_laws)
        results = run(engine, requests(temperature=0.0, max_tokens=40))
        engine.aside.close()
        assert engine.ahead.launched > 5
        flown = [outcome.drafted for result in results.values() for outcome in result.outcomes[4:-8]]
        longest.append(max(flown))
    assert longest == [4, 2]


@pytest.mark.parametrize("field", ["positions", "anchors"])
def test_a_device_that_is_of_another_mind_is_not_believed(target: Target, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was verified behind a wrong token would be text that the target never wrote: the engine fails instead."""
    _, engine = engines(target, speculation="static:4")
    take = engine.drafter.continued  # type: ignore[attr-defined]
    monkeypatch.setattr(engine.drafter, "continued", lambda: dataclasses.replace(chains := take(), **{field: getattr(chains, field) + 1}))
    with pytest.raises(RuntimeError, match="behind other tokens"):
        run(engine, requests(temperature=0.0))
