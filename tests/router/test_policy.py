"""Routing decisions, by enumeration where that is possible."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import pytest

from dspark.router.policy import DRAWN, DRAWN_HOLDERS, FULL_SCAN, SEARCH, Standing, choose
from dspark.router.predict import Ask, Prediction, Sent
from dspark.router.prefixes import CHUNK_TOKENS, PrefixIndex, chunk_keys
from dspark.types import LatencyBudget, ReplicaView

COSTS = ((1, 0.040), (8, 0.045), (64, 0.095), (512, 0.600))


def view(name: str = "a", **changes: object) -> ReplicaView:
    base = ReplicaView(name, "x:1", queued=0, running=0, max_running=4, queued_tokens=0, free_blocks=100, num_blocks=100)
    return dataclasses.replace(base, **changes)


def ask(name: str = "r", num_tokens: int = 50, ttft_ms: float | None = None, tpot_ms: float | None = None, **more: object) -> Ask:
    return Ask(name, num_tokens, LatencyBudget(ttft_ms, tpot_ms), **more)  # type: ignore[arg-type]


def ranked(
    views: Sequence[ReplicaView], request: Ask, sent: Mapping[str, Sent] | None = None, prefixes: PrefixIndex | None = None
) -> list[Prediction]:
    standings = {v.id: Standing(v, (sent or {}).get(v.id, Sent())) for v in views}
    return list(choose(request, [v.id for v in views], standings.get, prefixes or PrefixIndex()))


def ids(*args: object, **kwargs: object) -> list[str]:
    return [prediction.replica_id for prediction in ranked(*args, **kwargs)]  # type: ignore[arg-type]


def test_the_idle_replica_wins_and_draining_ones_are_out() -> None:
    views = [view("busy", running=4, queued=3, queued_tokens=90), view("idle"), view("leaving", draining=True)]
    for order in itertools.permutations(views):
        assert ids(order, ask()) == ["idle", "busy"]
    assert ids([view(draining=True)], ask()) == []
    assert ids([], ask()) == []


def holding(name: str, keys: Sequence[bytes]) -> PrefixIndex:
    index = PrefixIndex()
    index.add(keys, name)
    return index


def test_a_prefix_hit_outweighs_a_little_load_but_not_a_queue() -> None:
    far, near = view("far", step_costs=COSTS), view("near", running=2, step_costs=COSTS)
    request = ask(num_tokens=500, keys=tuple(chunk_keys(range(500))))
    held = holding("near", request.keys)
    assert ids([far, near], request, prefixes=held)[0] == "near"
    assert ids([far, near], request)[0] == "far"
    swamped = dataclasses.replace(near, running=4, queued=8, queued_tokens=4000)
    assert ids([far, swamped], request, prefixes=held)[0] == "far"


def test_what_was_sent_counts_before_the_next_view() -> None:
    views = [view("a"), view("b")]
    sent: dict[str, Sent] = {}
    for i in range(8):
        best = ids(views, ask(f"r{i}", 30), sent)[0]
        before = sent.get(best, Sent())
        sent[best] = Sent(before.requests + 1, before.tokens + 30)
    assert {name: load.requests for name, load in sent.items()} == {"a": 4, "b": 4}


def test_equal_replicas_share_requests_of_many_routers() -> None:
    firsts = [ids([view("a"), view("b")], ask(f"request {i}"))[0] for i in range(200)]
    assert 60 < firsts.count("a") < 140
    assert firsts == [ids([view("b"), view("a")], ask(f"request {i}"))[0] for i in range(200)]


def test_stale_views_come_last() -> None:
    assert ids([view("stale", age_s=11.0), view("busy", running=4, queued=9, queued_tokens=900)], ask()) == ["busy", "stale"]


def test_budgets_split_replicas_and_load_orders_each_part() -> None:
    """All loads of three replicas and all budgets: met before missed, the least loaded of the met, the least late of the missed."""
    loads = [{"running": 0}, {"running": 3}, {"running": 4, "queued": 2, "queued_tokens": 900}]
    budgets = itertools.product((None, 30.0, 130.0, 1e5), (None, 20.0, 44.0, 1e4))
    kinds = set()
    for ttft_ms, tpot_ms in budgets:
        for chosen in itertools.product(loads, repeat=3):
            views = [view(f"v{i}", step_costs=COSTS, **load) for i, load in enumerate(chosen)]
            order = ranked(views, ask(ttft_ms=ttft_ms, tpot_ms=tpot_ms))
            assert [p.is_late for p in order] == sorted(p.is_late for p in order)
            met = [p.ttft_s for p in order if not p.is_late]
            missed = [p.lateness for p in order if p.is_late]
            assert met == sorted(met)
            assert missed == sorted(missed)
            kinds.add((bool(met), bool(missed)))
    assert kinds == {(True, False), (True, True), (False, True)}, "all three cases came up"


def test_the_budget_wins_over_the_load() -> None:
    """More work in line, but fewer places: a token costs less there."""
    crowded = view("crowded", running=40, max_running=64, step_costs=COSTS)
    narrow = view("narrow", running=2, queued_tokens=600, step_costs=COSTS)
    assert ids([crowded, narrow], ask(num_tokens=10))[0] == "crowded"
    assert ids([crowded, narrow], ask(num_tokens=10, tpot_ms=50))[0] == "narrow"


def test_without_a_cost_table_nothing_is_late() -> None:
    assert not ranked([view(running=4, queued=50, queued_tokens=5000)], ask(ttft_ms=1, tpot_ms=1))[0].is_late


def fleet(count: int, **changes: object) -> list[ReplicaView]:
    return [view(f"v{i}", step_costs=COSTS, **changes) for i in range(count)]


@pytest.mark.parametrize("count", [1, FULL_SCAN, FULL_SCAN + 1, 50, 333])
def test_every_replica_is_offered_once(count: int) -> None:
    assert sorted(ids(fleet(count), ask())) == sorted(v.id for v in fleet(count))


def looked_at(views: Sequence[ReplicaView], request: Ask, prefixes: PrefixIndex | None = None) -> tuple[Prediction, list[str]]:
    """The choice, and the replicas whose views were read for it."""
    standings = {v.id: Standing(v) for v in views}
    seen: list[str] = []

    def look(replica_id: str) -> Standing | None:
        seen.append(replica_id)
        return standings.get(replica_id)

    return next(choose(request, list(standings), look, prefixes or PrefixIndex())), seen


def test_few_replicas_of_many_are_compared() -> None:
    few, many = fleet(FULL_SCAN), fleet(1000)
    for i in range(50):
        assert len(looked_at(few, ask(f"r{i}"))[1]) == FULL_SCAN
        assert len(looked_at(many, ask(f"r{i}"))[1]) <= DRAWN + DRAWN_HOLDERS


def test_the_search_goes_on_until_a_replica_keeps_the_budget() -> None:
    views = fleet(1000, running=4, queued=9, queued_tokens=900)
    for i in range(0, 1000, 20):
        views[i] = view(f"v{i}", step_costs=COSTS)
    found = [looked_at(views, ask(f"r{i}", ttft_ms=200)) for i in range(60)]
    assert sum(not choice.is_late for choice, _ in found) > 40, "one of twenty: a search of 32 finds it four times of five"
    assert max(len(seen) for _, seen in found) < SEARCH + FULL_SCAN
    assert all(len(looked_at(views, ask(f"r{i}"))[1]) <= DRAWN + DRAWN_HOLDERS for i in range(60)), "no budget, no search"


@pytest.mark.parametrize("count", [1, FULL_SCAN, FULL_SCAN + 1, SEARCH, 100])
@pytest.mark.parametrize("others", ["silent", "leaving", "stale"])
def test_the_one_replica_that_can_be_relied_on_is_found(count: int, others: str) -> None:
    """Wherever it is among those that say nothing, drain, or were last heard long ago."""
    changes = {"silent": {}, "leaving": {"draining": True}, "stale": {"age_s": 11.0}}[others]
    for i, good in itertools.product(range(5), range(0, count, 7)):
        views = {v.id: Standing(v) for v in fleet(count, **changes)} if others != "silent" else {}
        views[f"v{good}"] = Standing(view(f"v{good}", step_costs=COSTS, running=4, queued=9, queued_tokens=900))
        order = [p.replica_id for p in choose(ask(f"r{i}"), [f"v{j}" for j in range(count)], views.get, PrefixIndex())]
        assert sorted(order) == sorted(views if others == "stale" else [f"v{good}"])
        if others != "stale" or count <= SEARCH:
            assert order[0] == f"v{good}"


def test_two_choices_spread_nearly_as_well_as_all() -> None:
    sent: dict[str, Sent] = {}
    views = [view(f"v{i}", max_running=64, step_costs=COSTS) for i in range(100)]
    standings = {v.id: v for v in views}
    for i in range(2000):
        best = next(choose(ask(f"r{i}", 20), list(standings), lambda n: Standing(standings[n], sent.get(n, Sent())), PrefixIndex()))
        load = sent.get(best.replica_id, Sent())
        sent[best.replica_id] = Sent(load.requests + 1, load.tokens + 20)
    loads = [sent.get(name, Sent()).requests for name in standings]
    assert sum(loads) == 2000
    assert max(loads) <= 26, "of 20 on average; drawn blindly the fullest would have over 30"


def test_the_holder_of_a_prefix_is_found_among_many() -> None:
    prompt = tuple(range(CHUNK_TOKENS * 6))
    request = ask(num_tokens=len(prompt), keys=tuple(chunk_keys(prompt)))
    held = holding("v700", request.keys)
    held.add(request.keys[:1], "v3")
    assert all(looked_at(fleet(1000), dataclasses.replace(request, id=f"r{i}"), held)[0].replica_id == "v700" for i in range(20))
    held.add(request.keys, "gone")  # the index may name a replica that has left
    assert looked_at(fleet(1000), request, held)[0].replica_id in {v.id for v in fleet(1000)}


def test_requests_that_ended_since_the_view_are_not_in_the_way() -> None:
    """The replica that has just got idle is as good as the one that was: four at once are shared."""
    views = [view("a", running=2), view("b")]
    sent = {"a": Sent(ended=2), "b": Sent()}
    counts = {"a": 0, "b": 0}
    for i in range(4):
        best = ids(views, ask(f"r{i}", 30), sent)[0]
        counts[best] += 1
        sent[best] = Sent(sent[best].requests + 1, sent[best].tokens + 30, sent[best].ended)
    assert counts == {"a": 2, "b": 2}
    assert ranked([view("a", running=1, queued=2, queued_tokens=90)], ask(), {"a": Sent(ended=3)}) == ranked([view("a")], ask())
