"""Two cohorts take turns where that makes a cycle shorter, and nobody is forgotten."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from helpers.drafters import KnownTexts
from helpers.engines import greedy, make_engine, run, tiny_target

from dspark.types import DraftTree
from dspark.workers.blocks import BlockPool
from dspark.workers.verifier.cohorts import DECIDE_EVERY, Cohorts, pays
from dspark.workers.verifier.costs import CostTable, Curve

IDS = [f"r{i}" for i in range(7)]


def linear(fixed_s: float, each_s: float) -> Any:
    return lambda count: fixed_s + each_s * count


def nothing(count: int) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("verify", "draft", "expected"),
    [
        (linear(0, 1), linear(0, 1), True),  # both in proportion: half of the time is hidden
        (linear(0, 1), linear(0, 0.01), False),  # drafting is nearly free already
        (linear(4, 0.01), linear(4, 0.01), False),  # two half steps cost twice a whole one
        (linear(4, 0.5), linear(0.1, 0.2), False),
        (linear(1, 1), linear(9, 0.1), False),  # a round is as long for half of them: it would be waited for twice
        (linear(1, 1), linear(3, 0.1), True),
    ],
)
def test_halves_pay_where_the_sum_says_so(verify: Any, draft: Any, expected: bool) -> None:
    assert pays(8, verify, draft) is expected
    assert not pays(1, verify, draft)
    assert not pays(0, verify, draft)


def test_both_cohorts_take_turns() -> None:
    cohorts = Cohorts()
    steps = [cohorts.choose(IDS, linear(0, 1), linear(0, 1)) for _ in range(6)]
    assert cohorts.is_split
    for one, other in itertools.pairwise(steps):
        assert one | other == set(IDS)
        assert not one & other
    assert sorted(map(len, steps[:2])) == [3, 4]


def test_all_take_part_where_it_does_not_pay_or_one_is_alone() -> None:
    cohorts = Cohorts()
    assert cohorts.choose(IDS, linear(0, 1), nothing) == set(IDS)
    cohorts = Cohorts()
    cohorts.choose(IDS, linear(0, 1), linear(0, 1))
    assert cohorts.choose(IDS[:1], linear(0, 1), linear(0, 1)) == {"r0"}
    assert cohorts.choose([], linear(0, 1), linear(0, 1)) == set()


def test_it_is_decided_anew_now_and_then() -> None:
    cohorts = Cohorts()
    cohorts.choose(IDS, linear(0, 1), nothing)
    sizes = [len(cohorts.choose(IDS, linear(0, 1), linear(0, 1))) for _ in range(DECIDE_EVERY)]
    assert sizes[:-1] == [7] * (DECIDE_EVERY - 1)
    assert sizes[-1] < 7


def test_everybody_moves_whoever_comes_and_goes() -> None:
    """Random arrivals and ends: no step is empty, and nobody sits out more than one step, two where cohorts were split anew."""
    chance, cohorts = random.Random(0), Cohorts()
    running: list[str] = []
    waited: dict[str, int] = {}
    for step in range(3000):
        if chance.random() < 0.3:
            running.append(f"s{step}")
        for name in [name for name in running if chance.random() < 0.05]:
            running.remove(name)
        chosen = cohorts.choose(running, linear(0, 1), linear(0, 1))
        assert chosen <= set(running)
        assert chosen or not running
        waited = {name: 0 if name in chosen else waited.get(name, 0) + 1 for name in running}
        assert max(waited.values(), default=0) <= 2


class FarTexts(KnownTexts):
    """Says that its rounds take as long as verification, and notes for whom it is asked."""

    def __init__(self, texts: Sequence[Sequence[int]], pool: BlockPool) -> None:
        super().__init__(texts, pool)
        self.asked: list[set[str]] = []

    def round_seconds(self, num_requests: int) -> float:
        return float(num_requests)

    def end(self) -> None:
        self.asked.append(set())

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        self.asked.append(set(want))
        return super().collect(want, wait_s)


def test_an_engine_alternates_and_its_text_stays_the_same() -> None:
    target = tiny_target()
    requests = [greedy(f"r{i}", [3 + (7 * i + j) % 150 for j in range(4 + 5 * i)], 40) for i in range(6)]
    plain = {name: result.tokens for name, result in run(make_engine(target, speculation="off"), requests).items()}
    texts = [[*request.prompt_token_ids, *plain[request.id]] for request in requests]
    pool = BlockPool(128)
    drafter = FarTexts(texts, pool)
    in_proportion = CostTable(Curve((1, 64), (0.2, 12.8)), Curve((1,), (0.1,)))
    engine = make_engine(target, drafter, pool, costs=in_proportion, speculation="static:4")
    steps: list[set[str]] = []
    engine.on_step = lambda plan, times: steps.append({row.request_id for row in plan.rows})
    assert {name: result.tokens for name, result in run(engine, requests).items()} == plain
    assert engine.counters.accepted > 100
    alternating = [(one, other) for one, other in itertools.pairwise(drafter.asked) if one and other and not one & other]
    assert len(alternating) > 5
    assert sum(len(step) == 3 for step in steps) > 5, "halves"
