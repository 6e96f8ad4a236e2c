"""Who is refused, and when to come back."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from dspark.errors import Overloaded
from dspark.router.admission import MAX_RETRY_AFTER_S, BudgetOutOfReach, admit, capacity, refuse_late
from dspark.router.predict import TYPICAL_OUTPUT_TOKENS, Ask, Prediction, lateness
from dspark.types import LatencyBudget, ReplicaView

IDLE = ReplicaView("a", "x:1", queued=0, running=0, max_running=4, queued_tokens=0, free_blocks=100, num_blocks=100)


def test_admission_is_exact() -> None:
    for in_flight, wanted, limit, waiting, priority in itertools.product(range(6), range(1, 4), range(4), range(5), (-1, 0, 1)):
        room = waiting // 2 if priority > 0 else waiting
        fits = in_flight + wanted <= limit + room
        try:
            admit(wanted, in_flight, limit, waiting, 1.0, priority)
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
    views = [dataclasses.replace(IDLE, id=name, **changes) for name, changes in (("a", {}), ("b", {"draining": True}))]
    assert capacity([*views, dataclasses.replace(IDLE, id="c", max_running=7)]) == 11


@pytest.mark.parametrize(
    ("ttft_ms", "tpot_ms", "ttft_s", "tpot_s", "retry_after_s"),
    [
        (500, None, 0.5, 9.0, None),
        (500, 50, 0.4, 0.05, None),
        (None, None, 99.0, 99.0, None),
        (500, None, 5.5, 0.01, 5.0),
        (500, None, 0.6, 0.01, 1.0),
        (500, None, 999.0, 0.01, MAX_RETRY_AFTER_S),
        (None, 50, 0.1, 0.1, 0.5 * TYPICAL_OUTPUT_TOKENS * 0.1),
        (500, 50, 20.5, 0.1, 20.0),
    ],
)
def test_late_requests_are_refused_until_the_excess_is_gone(
    ttft_ms: float | None, tpot_ms: float | None, ttft_s: float, tpot_s: float, retry_after_s: float | None
) -> None:
    ask = Ask("r", 10, LatencyBudget(ttft_ms, tpot_ms))
    best = Prediction("a", ttft_s, tpot_s, lateness(ask.budget, ttft_s, tpot_s))
    if retry_after_s is None:
        refuse_late(ask, best)
        return
    with pytest.raises(BudgetOutOfReach) as caught:
        refuse_late(ask, best)
    assert caught.value.retry_after_s == pytest.approx(retry_after_s)
    assert ("ttft_ms" in str(caught.value)) == (ttft_ms is not None and 1e3 * ttft_s > ttft_ms)
