"""How long requests wait while steps run ahead: a few steps, for others, and never when they are few or in a hurry."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from helpers.engines import greedy

from dspark.types import LatencyBudget, Speculation
from dspark.workers.verifier.gate import MAX_HELD_S, MAX_STEPS, Gate
from dspark.workers.verifier.sequence import Sequence


def waiting(count: int, ttft_ms: float | None = None) -> list[Sequence]:
    request = greedy("r", [1, 2, 3], 4)
    if ttft_ms is not None:
        request = dataclasses.replace(request, latency_budget=LatencyBudget(ttft_ms, None))
    return [Sequence.of(request, Speculation(), 100) for _ in range(count)]


def held(gate: Gate, requests: list[Sequence], num_running: int, num_places: int) -> int:
    """Steps until the gate opens."""
    return next(step for step in range(100) if gate.lets_in(requests, num_running, num_places))


@pytest.mark.parametrize(
    ("count", "num_running", "num_places", "steps"),
    [(1, 1, 15, 0), (1, 15, 1, 0), (1, 16, 1, 1), (1, 64, 8, 4), (4, 64, 8, 1), (9, 64, 1, 4), (1, 255, 1, MAX_STEPS), (50, 206, 50, 0)],
)
def test_the_more_run_and_the_fewer_wait_the_longer(count: int, num_running: int, num_places: int, steps: int) -> None:
    gate = Gate(lambda: 0.0)
    for _ in range(2):
        assert held(gate, waiting(count), num_running, num_places) == steps


def test_nobody_waits_longer_than_a_moment() -> None:
    times: Iterator[float] = iter([0.0, 0.6 * MAX_HELD_S, 1.1 * MAX_HELD_S, 9.0])
    gate = Gate(lambda: next(times))
    assert held(gate, waiting(1), 255, 1) == 2
    assert not gate.lets_in(waiting(1), 255, 1), "time counts from the first request that is held back"


def test_who_is_in_a_hurry_is_let_in_at_once() -> None:
    gate = Gate(lambda: 0.0)
    assert gate.lets_in(waiting(1, ttft_ms=50.0), 255, 1)
    resumed = waiting(1)
    resumed[0].admitted = True
    assert gate.lets_in(resumed, 255, 1)
    assert not gate.lets_in(waiting(1) + waiting(1, ttft_ms=50.0), 255, 1), "there is no place for the second"


def test_without_places_or_requests_it_stays_shut() -> None:
    gate = Gate(lambda: 0.0)
    for _ in range(3 * MAX_STEPS):
        assert not gate.lets_in([], 10, 5)
        assert not gate.lets_in(waiting(2), 16, 0)
