"""How long requests wait while steps run ahead: until idle places have cost what letting requests in costs, and not when in a hurry."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.engines import greedy

from dspark.types import LatencyBudget, Speculation
from dspark.workers.verifier.gate import FIRST_PAUSE_S, KEPT_PAUSES, MAX_HELD_S, Gate
from dspark.workers.verifier.sequence import Sequence

STEP_S = FIRST_PAUSE_S / 4


class Ticking:
    """A clock that moves on by a step at every look."""

    def __init__(self, step_s: float = STEP_S) -> None:
        self.step_s, self.now_s = step_s, 0.0

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def waiting(count: int, ttft_ms: float | None = None) -> list[Sequence]:
    request = greedy("r", [1, 2, 3], 4)
    if ttft_ms is not None:
        request = dataclasses.replace(request, latency_budget=LatencyBudget(ttft_ms, None))
    return [Sequence.of(request, Speculation(), 100) for _ in range(count)]


def held(gate: Gate, requests: list[Sequence], num_running: int, num_places: int) -> int:
    """Steps until the gate opens."""
    return next(step for step in range(1000) if gate.lets_in(requests, num_running, num_places))


@pytest.mark.parametrize(
    ("count", "num_running", "num_places", "steps"),
    [
        (1, 1, 15, 0),  # who waits idles as long as the other one would be held up
        (1, 2, 15, 4),
        (1, 5, 15, 16),
        (4, 5, 15, 1),  # 4 places x 1 quarter, and once more at once
        (4, 5, 1, 16),  # there is but one place
        (8, 64, 8, 28),
        (50, 206, 50, 13),
    ],
)
def test_idle_places_weigh_as_much_as_those_who_are_held_up(count: int, num_running: int, num_places: int, steps: int) -> None:
    gate = Gate(Ticking())
    for _ in range(2):
        assert held(gate, waiting(count), num_running, num_places) == steps


def test_more_that_come_meanwhile_open_it_sooner() -> None:
    gate = Gate(Ticking())
    steps = next(step for step in range(1000) if gate.lets_in(waiting(1 + step), 64, 64))
    assert sum(range(1, steps + 1)) / 4 + steps + 1 >= 64 > sum(range(1, steps)) / 4 + steps


def test_what_letting_in_costs_is_learnt() -> None:
    gate = Gate(Ticking())
    for seconds in (9.0, FIRST_PAUSE_S / 2, 9.0):
        gate.took(seconds)
    assert held(gate, waiting(1), 5, 1) == 8
    for _ in range(KEPT_PAUSES):
        gate.took(9.0)
    assert held(gate, waiting(1), 5, 1) == pytest.approx(MAX_HELD_S / STEP_S, abs=1)


def test_nobody_waits_longer_than_a_moment() -> None:
    gate = Gate(Ticking(0.6 * MAX_HELD_S))
    assert held(gate, waiting(1), 255, 1) == 2
    assert not gate.lets_in(waiting(1), 255, 1), "time counts from the first request that is held back"


def test_who_is_in_a_hurry_is_let_in_at_once() -> None:
    gate = Gate(Ticking())
    assert gate.lets_in(waiting(1, ttft_ms=50.0), 255, 1)
    resumed = waiting(1)
    resumed[0].admitted = True
    assert gate.lets_in(resumed, 255, 1)
    assert not gate.lets_in(waiting(1) + waiting(1, ttft_ms=50.0), 255, 1), "there is no place for the second"


def test_without_places_or_requests_it_stays_shut() -> None:
    gate = Gate(Ticking())
    for _ in range(100):
        assert not gate.lets_in([], 10, 5)
        assert not gate.lets_in(waiting(2), 16, 0)
