"""An engine that drafts with workers elsewhere: lossless with random weights, and never starved of context."""

from __future__ import annotations

from typing import Any, cast

import pytest
from helpers.draft_modules import random_module
from helpers.draft_workers import LAW_WIDTH, draft_workers
from helpers.engines import FLAT, STEEP, Spy, assert_same_drafts, greedy, make_engine, run, tiny_target

from dspark.kernels.graphs import plain_calls
from dspark.sampling import SamplingParams
from dspark.types import Request
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.remote import RemoteDrafter
from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.runner import GraphOptions
from dspark.workers.verifier.targets import Target

GRAPHS = GraphOptions(plain_calls, max_tokens=24, max_rows=32, max_model_len=256, longest=5, with_trees=True)
DRIVERS = [pytest.param({}, id="plain"), pytest.param({"graphs": GRAPHS, "overlapped": True}, id="graphs")]
DEAR = CostTable(Curve((1, 2, 64), (1.0, 2.0, 64.0)), Curve((1,), (9.0,)))  # drafts never pay
PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(4 + 9 * i)] for i in range(5)}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def grafted(target: Target) -> Engine:
    pool = BlockPool(128)
    return make_engine(target, LocalDrafter(random_module(target), pool, law_width=LAW_WIDTH), pool, speculation="static:3")


@pytest.mark.parametrize("driver", DRIVERS)
def test_random_weights_never_change_the_text(target: Target, driver: dict[str, Any]) -> None:
    with draft_workers(random_module(target), "w0", "w1") as workers:
        for params in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 4, "top_p": 0.9}):
            sampling = SamplingParams(**({"max_tokens": 24, "ignore_eos": True} | params))
            requests = [Request(name, tuple(prompt), sampling) for name, prompt in PROMPTS.items()]
            plain = {n: r.tokens for n, r in run(make_engine(target, speculation="off"), requests).items()}
            for speculation, costs in (("static:4", None), ("adaptive", FLAT), ("adaptive", STEEP)):
                engine = workers.engine(target, speculation=speculation, costs=costs, **driver)
                assert {n: r.tokens for n, r in run(engine, requests).items()} == plain
                assert engine.counters.drafted > 0
                if costs is None:  # every draft that came was verified: all rounds but the first and the last of each request
                    assert engine.counters.drafted_rounds == engine.counters.rounds - 2 * len(requests)


@pytest.mark.parametrize("driver", DRIVERS)
def test_drafts_are_those_of_a_grafted_drafter_whatever_happened_before(target: Target, driver: dict[str, Any]) -> None:
    """Cold, after a prefix hit, in chunks, and after a preemption."""
    request = greedy("r4", PROMPTS["r4"], 30)
    cold = grafted(target)
    reference = Spy(cold)
    run(cold, [request])
    with draft_workers(random_module(target), "w0") as workers:
        far = workers.engine(target, speculation="static:3", **driver)
        spy = Spy(far)
        run(far, [request])
        assert_same_drafts(reference, spy, "r4")
    with draft_workers(random_module(target), "w0") as workers:
        warm = workers.engine(target, speculation="static:3", max_batch_tokens=16, **driver)
        run(warm, [greedy("other", PROMPTS["r4"], 3)])
        after_hit = Spy(warm)
        assert run(warm, [request])["r4"].outcomes[0].num_cached_tokens == 32
        assert_same_drafts(reference, after_hit, "r4")
        squeezed = workers.engine(target, num_blocks=8, speculation="static:3", **driver)
        after_preemption = Spy(squeezed)
        run(squeezed, [greedy("r3", PROMPTS["r3"], 40), request])
        assert squeezed.scheduler.counters.preemptions > 0
        assert_same_drafts(reference, after_preemption, "r4")


def test_several_engines_share_a_worker_and_its_prefixes(target: Target) -> None:
    with draft_workers(random_module(target), "w0") as workers:
        first, second = workers.engine(target, speculation="static:3"), workers.engine(target, speculation="static:3")
        run(first, [greedy("r4", PROMPTS["r4"], 10)])
        spy = Spy(second)
        run(second, [greedy("r4", PROMPTS["r4"], 30)])
        reference = Spy(cold := grafted(target))
        run(cold, [greedy("r4", PROMPTS["r4"], 30)])
        assert_same_drafts(reference, spy, "r4")
        counters = workers.hosts["w0"].worker.counters
        assert counters.found_positions == 32


def test_steps_that_draft_nothing_run_ahead_and_a_worker_is_not_left_behind(target: Target) -> None:
    requests = [greedy(name, prompt, 60) for name, prompt in PROMPTS.items()]
    plain = {n: r.tokens for n, r in run(make_engine(target, speculation="off"), requests).items()}
    with draft_workers(random_module(target), "w0") as workers:
        engine = workers.engine(target, costs=DEAR, graphs=GRAPHS, overlapped=True)
        drafter = cast(RemoteDrafter, engine.drafter)
        tokens: dict[str, list[int]] = {name: [] for name in PROMPTS}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for outcome in engine.step():
                tokens[outcome.request_id] += outcome.tokens
            if min(map(len, tokens.values())) == 40 and not engine.counters.drafted:
                assert engine.ahead.launched >= 35
                assert drafter.counters.batches < 20, "a message for some steps, not for each"
                behind = max(request.num_behind for request in drafter._requests.values())
                assert behind < 20, "and not much to catch up with"
                engine.set_costs(FLAT)
        assert tokens == plain
        assert engine.counters.drafted > 0, "drafting went on"
