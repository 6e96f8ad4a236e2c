"""Predicted seconds, against hand counts and by enumeration."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from dspark.router.predict import (
    TYPICAL_OUTPUT_TOKENS,
    Ask,
    Sent,
    lateness,
    predict,
    predicted_tpot,
    predicted_ttft,
    step_seconds,
    verify_seconds,
)
from dspark.types import LatencyBudget, ReplicaView

COSTS = ((1, 0.040), (8, 0.045), (64, 0.095), (512, 0.600))
LINEAR = tuple((n, 0.010 + 0.001 * n) for n in range(1, 65))  # 10 ms and one a token, steps of up to 64 tokens


def view(name: str = "a", **changes: object) -> ReplicaView:
    base = ReplicaView(name, "x:1", queued=0, running=0, max_running=4, queued_tokens=0, free_blocks=100, num_blocks=100)
    return dataclasses.replace(base, **changes)


def linear(**changes: object) -> ReplicaView:
    return view(step_costs=LINEAR, max_step_tokens=64, **changes)


@pytest.mark.parametrize("costs", [(), COSTS], ids=["no table", "table"])
def test_more_load_is_never_less_work(costs: tuple[tuple[int, float], ...]) -> None:
    loads = [
        view(running=running, queued=queued, queued_tokens=40 * queued, free_blocks=free, step_costs=costs)
        for running, queued, free in itertools.product(range(5), range(4), (0, 100))
        if running == 4 or queued == 0 or free == 0
    ]
    for one, other in itertools.product(loads, loads):
        if one.running <= other.running and one.queued <= other.queued and one.free_blocks >= other.free_blocks:
            assert predicted_ttft(one, 20, 0, Sent()) <= predicted_ttft(other, 20, 0, Sent())
            assert predicted_tpot(one, one.running) <= predicted_tpot(other, other.running)
    idle = view(step_costs=costs)
    works = [predicted_ttft(idle, 20, 0, Sent(requests=n, tokens=20 * n)) for n in range(10)]
    assert works == sorted(works)
    assert works[-1] > works[0]


def test_prefill_alone_is_chunked() -> None:
    assert predicted_ttft(linear(), 20, 0, Sent()) == pytest.approx(0.030)
    assert predicted_ttft(linear(), 64, 0, Sent()) == pytest.approx(0.074 + 0.010, abs=0.002)  # and the step of its first row
    assert predicted_ttft(linear(), 2 * 64 + 20, 0, Sent()) == pytest.approx(2 * 0.074 + 0.030)


def test_running_requests_take_their_share_of_every_chunk() -> None:
    busy = linear(running=3)
    assert predicted_ttft(busy, 20, 0, Sent()) == pytest.approx(1.5 * 0.033), "half of a step like it is under way"
    # 61 tokens a step are left: 100 tokens need a full step and 39 more
    assert predicted_ttft(busy, 100, 0, Sent()) == pytest.approx(0.074 + 1.5 * 0.052)


def test_the_line_in_front_counts() -> None:
    queue = linear(running=1, queued=1, queued_tokens=30)
    assert predicted_ttft(queue, 20, 0, Sent()) == pytest.approx(1.5 * 0.062)
    sent = predicted_ttft(linear(running=1), 20, 0, Sent(1, 30))
    assert sent == pytest.approx(predicted_ttft(queue, 20, 0, Sent()))


def test_without_a_free_place_one_must_end_first() -> None:
    full = linear(running=4)
    waits = TYPICAL_OUTPUT_TOKENS * 0.014 / 4
    assert predicted_ttft(full, 20, 0, Sent()) == pytest.approx(1.5 * 0.034 + waits)
    quick = dataclasses.replace(full, tokens_per_round=2.0)
    assert predicted_ttft(quick, 20, 0, Sent()) == pytest.approx(1.5 * 0.034 + waits / 2)
    no_blocks = linear(running=1, free_blocks=1)
    assert predicted_ttft(no_blocks, 17, 0, Sent()) - predicted_ttft(no_blocks, 16, 0, Sent()) > waits / 2


def test_less_urgent_requests_are_not_in_front() -> None:
    waiting = ((-1, 1, 10), (0, 2, 100), (5, 3, 1000))
    replica = linear(running=4, queued=6, queued_tokens=1110, waiting=waiting)
    times = [predicted_ttft(replica, 20, priority, Sent()) for priority in (-2, -1, 0, 4, 5, 9)]
    assert times[0] < times[1] < times[2] == times[3] < times[4] == times[5]
    alone = linear(running=4, queued=0)
    assert times[0] == pytest.approx(predicted_ttft(alone, 20, 0, Sent()))
    told_apart = dataclasses.replace(replica, waiting=())
    assert predicted_ttft(told_apart, 20, -2, Sent()) == pytest.approx(times[-1]), "unknown priorities all count as in front"


def test_drafting_costs_and_pays() -> None:
    plain = linear()
    drafting = linear(drafted_per_round=3.0, tokens_per_round=2.5, draft_costs=((1, 0.002), (4, 0.004)))
    assert predicted_tpot(plain, 2) == pytest.approx(0.012)
    assert predicted_tpot(drafting, 2) == pytest.approx((0.010 + 0.008 + 0.004) / 2.5)
    assert step_seconds(drafting, 0, 9) == pytest.approx(0.019)
    assert step_seconds(drafting, 4, 50) == pytest.approx(0.074 + 0.004), "drafts fill only what prefill leaves"
    assert step_seconds(drafting, 4, 60) == pytest.approx(0.074 + 0.004)
    assert predicted_tpot(plain, 99) == predicted_tpot(plain, 4), "no more than max_running run"


def test_prompt_tokens_and_context_have_their_own_price() -> None:
    replica = linear(running=2, prefill_token_s=0.0001, context_row_s=0.003)
    assert step_seconds(replica, 2, 30) == pytest.approx(0.012 + 0.003 + 0.006)
    assert step_seconds(replica, 0, 30) == pytest.approx(0.011 + 0.003), "the least step of the table"
    assert predicted_tpot(replica, 2) == pytest.approx(0.018)


def test_step_cost_rounds_up_and_extrapolates() -> None:
    table = view(step_costs=COSTS)
    assert [verify_seconds(table, rows) for rows in (0, 1, 2, 8, 64, 512)] == [0.040, 0.040, 0.045, 0.045, 0.095, 0.600]
    assert verify_seconds(table, 1024) == pytest.approx(1.2)


def test_lateness_is_the_worse_ratio() -> None:
    assert lateness(LatencyBudget(), 9, 9) == 0
    assert lateness(LatencyBudget(1000, None), 0.5, 9) == 0.5
    assert lateness(LatencyBudget(None, 100), 9, 0.2) == 2
    assert lateness(LatencyBudget(1000, 100), 3, 0.2) == 3
    prediction = predict(linear(), Ask("r", 20, LatencyBudget(31, None)), 20, Sent())
    assert (prediction.replica_id, prediction.is_late) == ("a", False)
    assert predict(linear(), Ask("r", 20, LatencyBudget(29, None)), 20, Sent()).is_late
    assert not predict(view(), Ask("r", 20, LatencyBudget(1, 1)), 20, Sent()).is_late, "a table is needed to call something late"
