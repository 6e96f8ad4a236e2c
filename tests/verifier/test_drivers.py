"""The two drivers and shadow mode: the same text as the plain loop, whatever is seen when; budgets that are two steps old."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from helpers.drafters import OracleDrafter
from helpers.engines import FLAT, STEEP, greedy, make_engine, run, tiny_target

from dspark.sampling import SamplingParams
from dspark.types import DraftLaw, DraftTree, LatencyBudget, Request
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.aside import Aside
from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.draft_planner import LAG, DraftPlanner
from dspark.workers.verifier.latency import AIM
from dspark.workers.verifier.planner import best_count, rank
from dspark.workers.verifier.targets import Target

STEEP_ROWS = CostTable(Curve((1, 2, 64), (1.0, 1.2, 13.6)), Curve((1,), (0.0,)))
PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(3 + 6 * i)] for i in range(6)}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def requests(params: dict[str, Any], **more: Any) -> list[Request]:
    sampling = SamplingParams(**({"max_tokens": 20, "ignore_eos": True} | params))
    return [Request(name, tuple(prompt), sampling, noise_seed=5, **more) for name, prompt in PROMPTS.items()]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("speculation", ["adaptive", "shadow", "static:2", "off"])
def test_both_drivers_give_the_same_tokens(target: Target, params: dict[str, Any], speculation: str) -> None:
    wanted = {name: result.tokens for name, result in run(make_engine(target, speculation="off"), requests(params)).items()}
    truth = {name: PROMPTS[name] + tokens for name, tokens in wanted.items()}
    for overlapped in (False, True):
        for costs in (FLAT, STEEP):
            drafter = OracleDrafter(truth, 5, "random", vocab_size=160)
            engine = make_engine(target, drafter, speculation=speculation, costs=costs, overlapped=overlapped)
            assert {name: result.tokens for name, result in run(engine, requests(params)).items()} == wanted
            engine.aside.close()


def test_shadow_verifies_all_and_commits_what_adaptive_would(target: Target) -> None:
    """STEEP trims: shadow computes whole drafts, commits no more than the plan, and says what was given away."""
    wanted = {name: result.tokens for name, result in run(make_engine(target, speculation="off"), requests({"temperature": 0.0})).items()}
    truth = {name: PROMPTS[name] + tokens for name, tokens in wanted.items()}
    engine = make_engine(target, OracleDrafter(truth, 5), speculation="shadow", costs=STEEP)
    run(engine, requests({"temperature": 0.0}))
    counters = engine.counters
    assert 0 < counters.accepted < counters.shadow_accepted + counters.accepted
    assert counters.step_tokens > counters.generated + counters.drafted, "more was computed than could be committed"


def test_latency_budgets_change_no_text(target: Target) -> None:
    wanted = {name: result.tokens for name, result in run(make_engine(target, speculation="off"), requests({"temperature": 0.0})).items()}
    for budget in (LatencyBudget(1.0, 1.0), LatencyBudget(1e6, 1e6), LatencyBudget(None, 1000.0)):
        mixed = requests({"temperature": 0.0})[:3] + requests({"temperature": 0.0}, latency_budget=budget)[3:]
        engine = make_engine(target, NgramDrafter(), costs=STEEP, max_num_seqs=4)
        assert {name: result.tokens for name, result in run(engine, mixed).items()} == wanted


def test_a_tight_budget_makes_others_sit_out(target: Target) -> None:
    """Costs say 1 s a step and 0.2 s a row: one request that aims at 1.3 s a token leaves room for one other request at a time."""
    ticks = iter(np.arange(0.0, 1e6, 0.4))
    engine = make_engine(target, costs=STEEP_ROWS, clock=lambda: float(next(ticks)))
    tight = Request("tight", (5, 6, 7), SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True), LatencyBudget(None, 1300.0 / AIM))
    results = run(engine, [tight, *(greedy(f"loose{i}", [9 + i, 8, 7], 16) for i in range(5))])
    assert engine.scheduler.counters.left_out > 0
    assert all(len(result.tokens) == 16 for result in results.values())


class WithLaw(OracleDrafter):
    """Its tokens are said to be drawn, each from a law of one token."""

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        trees = super().collect(want, wait_s)
        laws = {name: DraftLaw(torch.tensor(t.tokens)[:, None], torch.ones(len(t.tokens), 1)) for name, t in trees.items()}
        return {name: dataclasses.replace(tree, law=laws[name]) for name, tree in trees.items()}


def test_an_old_budget_is_used_where_a_schedule_could_bias(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratio requests under the overlapped driver: the number of admitted drafts comes from the ranking two steps back."""
    truth = {name: prompt + [1] * 40 for name, prompt in PROMPTS.items()}
    engine = make_engine(target, WithLaw(truth, 5, "random", vocab_size=160), costs=STEEP, overlapped=True)
    seen: list[Any] = []
    inner = DraftPlanner._count

    def spy(self: DraftPlanner, ranking: Any, num_rows: int, seconds: Any, can_look_ahead: bool) -> int:
        old = self._history[0] if len(self._history) == LAG else None
        count = inner(self, ranking, num_rows, seconds, can_look_ahead)
        if not can_look_ahead and old is not None:
            seen.append((count, best_count(old, num_rows, seconds)))
        return count

    monkeypatch.setattr(DraftPlanner, "_count", spy)
    run(engine, requests({"temperature": 1.0}))
    engine.aside.close()
    assert seen
    assert all(count == expected for count, expected in seen)


def test_history_holds_the_last_rankings_only(target: Target) -> None:
    engine = make_engine(target, NgramDrafter(), costs=FLAT, overlapped=True)
    drafts = engine.drafts
    rankings = [rank(np.full((1, 1), value)) for value in (0.1, 0.2, 0.3)]
    for ranking in rankings:
        drafts._history.append(ranking)
    assert list(drafts._history) == rankings[-LAG:]


def test_aside_runs_in_order_and_gives_failures_back() -> None:
    aside, done = Aside(), []
    gate = threading.Event()
    aside.run(gate.wait)
    for number in range(5):
        aside.run(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == []
    gate.set()
    aside.wait()
    assert done == [0, 1, 2, 3, 4]

    def fail() -> None:
        raise ValueError("here")

    aside.run(fail)
    with pytest.raises(ValueError, match="here"):
        aside.wait()
    aside.run(lambda: done.append(5))
    aside.close()
    assert done[-1] == 5
