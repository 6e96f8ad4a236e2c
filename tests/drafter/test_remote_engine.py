"""An engine that drafts with workers elsewhere: lossless with random weights, and never starved of context."""

from __future__ import annotations

import pytest
from helpers.draft_modules import random_module
from helpers.draft_workers import LAW_WIDTH, draft_workers
from helpers.engines import FLAT, STEEP, Spy, assert_same_drafts, greedy, make_engine, run, tiny_target

from dspark.sampling import SamplingParams
from dspark.types import Request
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.targets import Target

PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(4 + 9 * i)] for i in range(5)}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def grafted(target: Target) -> Engine:
    pool = BlockPool(128)
    return make_engine(target, LocalDrafter(random_module(target), pool, law_width=LAW_WIDTH), pool, speculation="static:3")


def test_random_weights_never_change_the_text(target: Target) -> None:
    with draft_workers(random_module(target), "w0", "w1") as workers:
        for params in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 4, "top_p": 0.9}):
            sampling = SamplingParams(**({"max_tokens": 24, "ignore_eos": True} | params))
            requests = [Request(name, tuple(prompt), sampling) for name, prompt in PROMPTS.items()]
            plain = {n: r.tokens for n, r in run(make_engine(target, speculation="off"), requests).items()}
            for speculation, costs in (("static:4", None), ("adaptive", FLAT), ("adaptive", STEEP)):
                engine = workers.engine(target, speculation=speculation, costs=costs)
                assert {n: r.tokens for n, r in run(engine, requests).items()} == plain
                assert engine.counters.drafted > 0
                if costs is None:  # every draft that came was verified: all rounds but the first and the last of each request
                    assert engine.counters.drafted_rounds == engine.counters.rounds - 2 * len(requests)


def test_drafts_are_those_of_a_grafted_drafter_whatever_happened_before(target: Target) -> None:
    """Cold, after a prefix hit, in chunks, and after a preemption."""
    request = greedy("r4", PROMPTS["r4"], 30)
    cold = grafted(target)
    reference = Spy(cold)
    run(cold, [request])
    with draft_workers(random_module(target), "w0") as workers:
        far = workers.engine(target, speculation="static:3")
        spy = Spy(far)
        run(far, [request])
        assert_same_drafts(reference, spy, "r4")
    with draft_workers(random_module(target), "w0") as workers:
        warm = workers.engine(target, speculation="static:3", max_batch_tokens=16)
        run(warm, [greedy("other", PROMPTS["r4"], 3)])
        after_hit = Spy(warm)
        assert run(warm, [request])["r4"].outcomes[0].num_cached_tokens == 32
        assert_same_drafts(reference, after_hit, "r4")
        squeezed = workers.engine(target, num_blocks=8, speculation="static:3")
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
