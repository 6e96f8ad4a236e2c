"""Routing decisions, by enumeration where that is possible."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from dspark.errors import Overloaded
from dspark.router.admission import MAX_RETRY_AFTER_S, admit, capacity
from dspark.router.policy import Sent, predicted_work, rank, step_cost
from dspark.router.prefixes import CHUNK_TOKENS, MAX_CHUNKS, PrefixIndex, chunk_keys
from dspark.types import ReplicaView

COSTS = ((1, 0.040), (8, 0.045), (64, 0.095), (512, 0.600))


def view(name: str = "a", **changes: object) -> ReplicaView:
    base = ReplicaView(name, "x:1", queued=0, running=0, max_running=4, queued_tokens=0, free_blocks=100, num_blocks=100)
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("costs", [(), COSTS], ids=["no table", "table"])
def test_more_load_is_never_less_work(costs: tuple[tuple[int, float], ...]) -> None:
    loads = [
        view(running=running, queued=queued, queued_tokens=40 * queued, free_blocks=free, step_costs=costs)
        for running, queued, free in itertools.product(range(5), range(4), (0, 100))
        if running == 4 or queued == 0 or free == 0
    ]
    for one, other in itertools.product(loads, loads):
        if one.running <= other.running and one.queued <= other.queued and one.free_blocks >= other.free_blocks:
            assert predicted_work(one, 20, Sent()) <= predicted_work(other, 20, Sent())
    idle = view(step_costs=costs)
    works = [predicted_work(idle, 20, Sent(requests=n, tokens=20 * n)) for n in range(10)]
    assert works == sorted(works)
    assert len(set(works)) == 10


def test_the_idle_replica_wins_and_draining_ones_are_out() -> None:
    views = [view("busy", running=4, queued=3, queued_tokens=90), view("idle"), view("leaving", draining=True)]
    for order in itertools.permutations(views):
        assert rank(order, "r", 50) == ["idle", "busy"]
    assert rank([view(draining=True)], "r", 5) == []


def test_a_prefix_hit_outweighs_a_little_load_but_not_a_queue() -> None:
    far, near = view("far", step_costs=COSTS), view("near", running=2, step_costs=COSTS)
    assert rank([far, near], "r", 500, hits={"near": 448})[0] == "near"
    assert rank([far, near], "r", 500)[0] == "far"
    swamped = dataclasses.replace(near, running=4, queued=8, queued_tokens=4000)
    assert rank([far, swamped], "r", 500, hits={"near": 448})[0] == "far"


def test_what_was_sent_counts_before_the_next_view() -> None:
    views = [view("a"), view("b")]
    sent: dict[str, Sent] = {}
    for i in range(8):
        best = rank(views, f"r{i}", 30, sent=sent)[0]
        before = sent.get(best, Sent())
        sent[best] = Sent(before.requests + 1, before.tokens + 30)
    assert {name: load.requests for name, load in sent.items()} == {"a": 4, "b": 4}


def test_equal_replicas_share_requests_of_many_routers() -> None:
    firsts = [rank([view("a"), view("b")], f"request {i}", 10)[0] for i in range(200)]
    assert 60 < firsts.count("a") < 140
    assert firsts == [rank([view("b"), view("a")], f"request {i}", 10)[0] for i in range(200)]


def test_stale_views_come_last() -> None:
    assert rank([view("stale", age_s=11.0), view("busy", running=4, queued=9, queued_tokens=900)], "r", 5) == ["busy", "stale"]


def test_step_cost_rounds_up_and_extrapolates() -> None:
    table = view(step_costs=COSTS)
    assert [step_cost(table, rows) for rows in (1, 2, 8, 64, 512)] == [0.040, 0.045, 0.045, 0.095, 0.600]
    assert step_cost(table, 1024) == pytest.approx(1.2)


def test_admission_is_exact() -> None:
    for in_flight, wanted, limit, waiting in itertools.product(range(6), range(1, 4), range(4), range(3)):
        fits = in_flight + wanted <= limit + waiting
        try:
            admit(wanted, in_flight, limit, waiting, finished_per_s=1.0)
        except Overloaded:
            assert not fits
        else:
            assert fits


@pytest.mark.parametrize(("rate", "expected"), [(0.0, MAX_RETRY_AFTER_S), (100.0, 1.0), (0.5, 8.0), (1e-9, MAX_RETRY_AFTER_S)])
def test_retry_after_follows_the_rate(rate: float, expected: float) -> None:
    with pytest.raises(Overloaded) as caught:
        admit(1, 13, 5, 5, finished_per_s=rate)
    assert caught.value.retry_after_s == expected


def test_capacity_leaves_draining_replicas_out() -> None:
    assert capacity([view("a"), view("b", draining=True), view("c", max_running=7)]) == 11


def test_prefixes_are_found_where_they_went() -> None:
    prompt = list(range(CHUNK_TOKENS * 3 + 5))
    keys = chunk_keys(prompt)
    assert len(keys) == 3
    index = PrefixIndex()
    index.add(keys[:2], "a")
    index.add(keys, "b")
    assert index.hits(keys) == {"a": 2 * CHUNK_TOKENS, "b": 3 * CHUNK_TOKENS}
    assert index.hits(chunk_keys(prompt, salt="tenant")) == {}
    assert index.hits(chunk_keys([9, *prompt[1:]])) == {}
    assert index.hits(chunk_keys([*prompt[:CHUNK_TOKENS], 0, 0, *prompt[CHUNK_TOKENS + 2 :]])) == {"a": CHUNK_TOKENS, "b": CHUNK_TOKENS}
    index.forget("b")
    assert index.hits(keys) == {"a": 2 * CHUNK_TOKENS}
    assert len(index) == 2


def test_a_gap_ends_a_hit() -> None:
    keys = chunk_keys(list(range(CHUNK_TOKENS * 3)))
    index = PrefixIndex()
    index.add(keys, "a")
    index.add([keys[0], keys[2]], "b")
    assert index.hits(keys) == {"a": 3 * CHUNK_TOKENS, "b": CHUNK_TOKENS}


def test_the_index_is_bounded_and_forgets_ends_first() -> None:
    index = PrefixIndex(capacity=4)
    first = chunk_keys(list(range(CHUNK_TOKENS * 4)))
    index.add(first, "a")
    index.add(chunk_keys([7] * CHUNK_TOKENS * 2), "a")
    assert len(index) == 4
    assert index.hits(first) == {"a": 2 * CHUNK_TOKENS}
    assert len(chunk_keys([0] * CHUNK_TOKENS * (MAX_CHUNKS + 9))) == MAX_CHUNKS
    assert chunk_keys([0] * (CHUNK_TOKENS - 1)) == []
