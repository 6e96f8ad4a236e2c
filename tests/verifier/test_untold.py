"""Plain steps that a drafter hears of later: it then knows the same, and drafts the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.draft_modules import EAGLE3, random_module
from helpers.engines import FLAT, Spy, assert_same_drafts, greedy, make_engine, tiny_target

from dspark.types import Request, Speculation
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.graft import graft
from dspark.workers.verifier import untold
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.targets import Target
from dspark.workers.verifier.untold import MOST_STEPS, Advance, Untold

PROMPT = [3 + 7 * j % 150 for j in range(20)]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def sequence(name: str, num_computed: int = 0) -> Sequence:
    found = Sequence.of(Request(name, (1, 2, 3)), Speculation(), 100)
    found.num_computed = num_computed
    return found


def taps(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1)


def joined(late: Untold, advances: list[Advance], last: torch.Tensor | None) -> dict[str, tuple[int, list[float]]]:
    """Of each request where its features begin and what they are."""
    found, everything = late.join(advances, last)
    assert not late
    if everything is None:
        return {}
    return {one.sequence.id: (one.start, everything[list(one.rows)].flatten().tolist()) for one in found}


def test_steps_are_joined_in_order() -> None:
    a, b, c = sequence("a"), sequence("b", num_computed=6), sequence("c")
    late = Untold()
    assert late.keep([Advance(a, [1], 10), Advance(b, [0], 5)], taps(0.1, 0.2))
    assert late.keep([Advance(a, [0], 11)], taps(0.3, 9.0))
    assert late
    found = joined(late, [Advance(c, [0, 1], 0), Advance(a, [2], 12)], taps(0.4, 0.5, 0.6))
    assert found == {
        "c": (0, [pytest.approx(0.4), pytest.approx(0.5)]),
        "a": (10, [pytest.approx(0.2), pytest.approx(0.3), pytest.approx(0.6)]),
        "b": (5, [pytest.approx(0.1)]),
    }
    assert joined(late, [], None) == {}


def test_a_request_that_lost_its_place_begins_anew() -> None:
    a, b = sequence("a"), sequence("b", num_computed=0)
    late = Untold()
    assert late.keep([Advance(a, [0], 10), Advance(b, [1], 5)], taps(0.1, 0.2))
    assert joined(late, [Advance(a, [0], 3)], taps(0.7)) == {"a": (3, [pytest.approx(0.7)])}
    assert late.keep([Advance(a, [0], 10)], taps(0.1))
    assert late.keep([Advance(a, [0], 4)], taps(0.2))
    a.num_computed = 5
    assert joined(late, [], None) == {"a": (4, [pytest.approx(0.2)])}


def test_prompts_are_told_at_once_and_nothing_waits_for_ever() -> None:
    a, late = sequence("a"), Untold()
    assert not late.keep([Advance(a, [0, 1], 0)], taps(0.1, 0.2))
    assert [late.keep([Advance(a, [0], start)], taps(0.1)) for start in range(MOST_STEPS + 1)] == [True] * MOST_STEPS + [False]


def paused(target: Target, kind: dict[str, Any], num_blocks: int = 128) -> Engine:
    pool = BlockPool(num_blocks)
    return make_engine(target, graft(random_module(target, **kind), pool, 8), pool, speculation="adaptive", costs=FLAT)


def scene(engine: Engine) -> tuple[Spy, int]:
    """Requests that come, end and are aborted while speculation is paused, and another one that finds what they left.

    Returns what was drafted, and how often the drafter was told of something.
    """
    spy, told = Spy(engine), 0
    inner = engine.drafter.propose

    def propose(turns: Any) -> None:
        nonlocal told
        told += 1
        inner(turns)

    engine.drafter.propose = propose  # type: ignore[method-assign]

    def steps(count: int, share: float) -> None:
        engine.drafts.speculation_limit = share
        for _ in range(count):
            engine.step()
            engine.pool.check()

    engine.add(greedy("long", PROMPT[:7], 120))
    engine.add(greedy("short", PROMPT[:5], 14))
    steps(3, 1.0)
    engine.add(greedy("aborted", PROMPT, 60))
    steps(21, 0.0)
    text = tuple(engine.sequences["aborted"].tokens)
    engine.abort("aborted")
    steps(5, 0.0)
    engine.add(greedy("again", text, 30))
    steps(2, 0.0)
    assert engine.sequences["again"].num_cached >= 32
    steps(12, 1.0)
    while engine.has_work:
        steps(1, 1.0)
    return spy, told


@pytest.mark.parametrize("kind", [{}, EAGLE3], ids=["dspark", "eagle3"])
def test_the_drafter_knows_the_same_in_the_end(target: Target, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    late, told_late = scene(paused(target, kind))
    monkeypatch.setattr(untold, "MOST_STEPS", 0)
    at_once, told_at_once = scene(paused(target, kind))
    assert told_late < told_at_once - 15
    assert set(late.trees) == set(at_once.trees)
    for name in ("long", "again"):
        assert_same_drafts(at_once, late, name)


def test_a_full_pool_is_no_time_to_wait(target: Target) -> None:
    """A request that loses its place leaves blocks behind that may be found again."""
    engine = paused(target, {}, num_blocks=3)
    engine.drafts.speculation_limit = 0.0
    engine.add(greedy("one", PROMPT[:5], 40))
    for _ in range(30):
        engine.step()
        engine.pool.check()
    assert engine.pool.num_free < 2
    assert not engine._untold


def test_fixed_lengths_are_told_at_once(target: Target) -> None:
    engine = paused(target, {})
    engine.add(Request("one", tuple(PROMPT), greedy("x", PROMPT, 40).sampling, speculation=Speculation.parse("static:2")))
    for _ in range(6):
        engine.step()
        assert not engine._untold
