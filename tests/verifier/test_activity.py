"""What a verifier tells of itself: line by priority, drafting of late, whether speculation takes place."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.drafters import OracleDrafter
from helpers.engines import FLAT, greedy, make_engine, run, tiny_target

from dspark.types import Drafter, SpeculationState
from dspark.workers.drafter.none import NoDrafter
from dspark.workers.verifier.activity import ENOUGH, RecentDrafts
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.host import MAX_PRIORITIES, EngineHost

TARGET = tiny_target()
PROMPT = [5, 6, 7]


def truth(count: int) -> list[int]:
    return [*PROMPT, *run(make_engine(TARGET), [greedy("t", PROMPT, count)])["t"].tokens]


def engine(drafter: Drafter | None = None, speculation: str = "adaptive") -> Engine:
    return make_engine(TARGET, drafter, speculation=speculation, costs=FLAT)


def state(chosen: Engine) -> SpeculationState:
    recent = RecentDrafts()
    recent.update(chosen)
    return recent.state(chosen)


def test_states_from_settings_alone() -> None:
    assert state(engine(speculation="off")) is SpeculationState.OFF
    assert state(engine(NoDrafter())) is SpeculationState.INACTIVE, "requested, and nobody drafts"
    assert state(engine(OracleDrafter({}))) is SpeculationState.ACTIVE


def test_drafts_that_never_come_are_noticed_and_so_is_their_return() -> None:
    chosen = engine(OracleDrafter({}))
    recent = RecentDrafts()
    for asked, arrived, expected in (
        (ENOUGH - 1, 0, SpeculationState.ACTIVE),
        (ENOUGH, 0, SpeculationState.INACTIVE),
        (ENOUGH + 5, 0, SpeculationState.INACTIVE),
        (ENOUGH + 6, 1, SpeculationState.ACTIVE),
        (2 * ENOUGH + 5, 1, SpeculationState.ACTIVE),
        (2 * ENOUGH + 6, 1, SpeculationState.INACTIVE),
    ):
        chosen.counters.drafts_asked, chosen.counters.drafts_arrived = asked, arrived
        recent.update(chosen)
        assert recent.state(chosen) is expected, (asked, arrived)


def test_a_limit_of_nothing_pauses() -> None:
    tokens = truth(24)
    chosen = engine(OracleDrafter({"a": tokens, "b": tokens}))
    host = EngineHost(chosen)
    run(chosen, [greedy("a", PROMPT, 24)])
    assert host.view("v", "x").speculation is SpeculationState.ACTIVE
    drafted = chosen.counters.drafted
    assert drafted > 0
    host.tune(0.0)
    run(chosen, [greedy("b", PROMPT, 24)])
    view = host.view("v", "x")
    assert (view.speculation, view.speculation_limit) == (SpeculationState.PAUSED, 0.0)
    assert chosen.counters.drafted == drafted, "nothing is drafted"


def test_drafts_asked_for_and_arrived_are_counted() -> None:
    chosen = engine(OracleDrafter({"a": truth(24)}))
    run(chosen, [greedy("a", PROMPT, 24), greedy("lost", [9, 9, 9], 24)])
    assert 0 < chosen.counters.drafts_arrived < chosen.counters.drafts_asked


def test_recent_rounds_count_more_than_old_ones() -> None:
    chosen = engine(OracleDrafter({}))
    recent = RecentDrafts()
    counters = chosen.counters
    counters.rounds, counters.drafted, counters.accepted = 10_000, 40_000, 30_000
    recent.update(chosen)
    assert (recent.tokens_per_round, recent.drafted_per_round) == (pytest.approx(4.0), pytest.approx(4.0))
    counters.rounds += 500  # without any drafts
    recent.update(chosen)
    assert 1.5 < recent.tokens_per_round < 2.5
    counters.rounds += 5000
    recent.update(chosen)
    assert recent.tokens_per_round == pytest.approx(1.0, abs=0.01)


def test_the_view_shows_the_line_by_priority_and_all_tokens_without_kv() -> None:
    chosen = make_engine(TARGET, max_num_seqs=1, max_batch_tokens=16, costs=FLAT)
    host = EngineHost(chosen)
    for i, (priority, length) in enumerate(((0, 40), (5, 3), (-1, 2), (5, 4))):
        chosen.add(dataclasses.replace(greedy(f"r{i}", range(3, 3 + length), 4), priority=priority))
    assert host.view("v", "x").waiting == ((-1, 1, 2), (0, 1, 40), (5, 2, 7))
    chosen.step()
    chosen.abort("r2")
    chosen.step()  # 16 of 40 tokens are computed
    view = host.view("v", "x")
    assert (view.running, view.queued, view.waiting) == (1, 2, ((5, 2, 7),))
    assert view.queued_tokens == 7 + 23
    assert view.max_step_tokens == 16
    assert view.step_costs[0] == (1, 1.0)


def test_many_priorities_share_the_last_place() -> None:
    chosen = make_engine(TARGET, max_num_seqs=1)
    host = EngineHost(chosen)
    for i in range(MAX_PRIORITIES + 5):
        chosen.add(dataclasses.replace(greedy(f"r{i}", [5, 6], 4), priority=i))
    waiting = host.view("v", "x").waiting
    assert len(waiting) == MAX_PRIORITIES
    assert waiting[-1] == (MAX_PRIORITIES - 1, 6, 12)
