"""Blocks that were fetched are as good as computed ones, to the target and to the drafter; nothing leaks, whatever fails."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.draft_modules import random_module
from helpers.engines import Spy, assert_same_drafts, greedy, make_engine, run, tiny_target
from helpers.exchanges import exchange_of

from dspark.kv_blocks import KVBlocks
from dspark.sampling import SamplingParams
from dspark.types import Drafter, Request
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.targets import Target

PROMPT = [3 + (7 * j) % 150 for j in range(75)]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def engine_of(target: Target, with_drafter: bool = False, num_blocks: int = 32) -> Engine:
    pool = BlockPool(num_blocks)
    drafter: Drafter | None = LocalDrafter(random_module(target), pool, law_width=8) if with_drafter else None
    return make_engine(target, drafter, pool, speculation="static:3" if with_drafter else "off")


def move(giver: Engine, taker: Engine, request: Request) -> int:
    """Fetch what ``taker`` lacks of a request's KV; how many blocks came."""
    give, take = exchange_of(giver), exchange_of(taker)
    assert take.layout.mismatch(give.layout) is None
    hashes = take.prefix(request)
    blocks = give.give(hashes, take.held(hashes).result()).result()
    count = take.take(hashes, blocks).result()
    taker.pool.check()
    giver.pool.check()
    return count


@pytest.mark.parametrize("with_drafter", [False, True], ids=["plain", "drafter"])
def test_a_request_goes_on_elsewhere_without_computing_its_tokens_again(target: Target, with_drafter: bool) -> None:
    """It is stopped in the middle, and goes on with the blocks that were moved: the same text, and the same drafts."""
    giver, taker, alone = (engine_of(target, with_drafter) for _ in range(3))
    spies = [Spy(taker), Spy(alone)]
    request = greedy("r", PROMPT, 60)
    expected = run(alone, [request])["r"].tokens
    giver.add(request)
    done: list[int] = []
    while len(done) < 30:
        done += [token for outcome in giver.step() for token in outcome.tokens]
    giver.abort("r")
    again = dataclasses.replace(request, prompt_token_ids=(*PROMPT, *done), num_prompt_tokens=len(PROMPT))
    assert move(giver, taker, again) == (len(PROMPT) + len(done) - 1) // 16
    assert taker.pool.num_free == 32, "they are in the cache, and nobody's"
    rest = run(taker, [again])["r"]
    assert done + rest.tokens == expected
    assert taker.scheduler.counters.prefix_hits == len(PROMPT), "all of the prompt was found"
    assert taker.counters.step_tokens < 16 + 5 * len(rest.outcomes), "no more than the last, unfinished block was computed again"
    if with_drafter:
        assert_same_drafts(spies[1], spies[0], "r")


def test_only_what_is_missing_is_given_and_kept(target: Target) -> None:
    giver, taker = engine_of(target), engine_of(target)
    run(giver, [greedy("long", PROMPT, 4)])
    run(taker, [greedy("short", PROMPT[:33], 1)])
    assert move(giver, taker, greedy("again", PROMPT)) == 2, "two of four were there"
    assert move(giver, taker, greedy("again", PROMPT)) == 0
    assert move(giver, taker, greedy("other", [5, *PROMPT])) == 0, "another prefix"
    salted = Request("salted", tuple(PROMPT), SamplingParams(temperature=0.0), cache_salt="tenant")
    assert move(giver, taker, salted) == 0


def test_without_room_nothing_is_taken_and_nothing_lost(target: Target) -> None:
    giver, taker = engine_of(target), engine_of(target, num_blocks=6)
    run(giver, [greedy("r", PROMPT, 2)])
    taker.add(greedy("busy", PROMPT[::-1][:40], 40))
    taker.step()
    free = taker.pool.num_free
    assert move(giver, taker, greedy("r", PROMPT)) == 0
    assert taker.pool.num_free == free
    while taker.has_work:
        taker.step()
    assert taker.pool.num_free == 6


def test_blocks_behind_a_gap_are_not_taken(target: Target) -> None:
    giver, taker = engine_of(target), engine_of(target)
    run(giver, [greedy("r", PROMPT, 2)])
    give, take = exchange_of(giver), exchange_of(taker)
    hashes = give.prefix(greedy("r", PROMPT))
    blocks = give.give(hashes, 2).result()
    assert (blocks.first, blocks.count) == (2, 2)
    assert take.take(hashes, blocks).result() == 0
    assert take.take(hashes, KVBlocks(4, 0, {})).result() == 0
    taker.pool.check()
    assert taker.pool.num_cached == 0


def test_what_does_not_fit_is_named(target: Target) -> None:
    engine = engine_of(target)
    mine, drafting = exchange_of(engine).layout, exchange_of(engine_of(target, with_drafter=True)).layout
    assert mine.mismatch(exchange_of(engine, "other").layout) == "identity is 'tiny' here and 'other' there"
    assert "only here none; only there draft key 0 float32" in (mine.mismatch(drafting) or "")


def test_requests_that_the_cache_cannot_serve_ask_for_nothing(target: Target) -> None:
    scored = Request("r", tuple(PROMPT), SamplingParams(temperature=0.0, prompt_logprobs=1))
    assert exchange_of(engine_of(target)).prefix(scored) == []
    uncached = make_engine(target, prefix_cache=False, speculation="off")
    assert exchange_of(uncached).prefix(greedy("r", PROMPT)) == []


def test_hashes_are_those_of_the_scheduler(target: Target) -> None:
    engine = engine_of(target)
    for length in (1, 16, 17, 32, 75):
        engine.add(greedy(f"r{length}", PROMPT[:length]))
        sequence = engine.sequences[f"r{length}"]
        assert list(exchange_of(engine).prefix(sequence.request)) == sequence.hashes(16, (length - 1) // 16)


def test_copies_do_not_change_with_the_pool(target: Target) -> None:
    giver = engine_of(target, num_blocks=8)
    run(giver, [greedy("r", PROMPT, 2)])
    give = exchange_of(giver)
    blocks = give.give(give.prefix(greedy("r", PROMPT)), 0).result()
    before = {name: tensor.clone() for name, tensor in blocks.parts.items()}
    run(giver, [greedy("other", PROMPT[::-1], 20)])
    assert all(torch.equal(tensor, blocks.parts[name]) for name, tensor in before.items())
