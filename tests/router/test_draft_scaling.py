"""Draft workers by how busy they are and by what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from dspark.drafting import FULL_RETRY_S
from dspark.router.draft_scaling import DraftDecision, DraftReport, DraftScaler
from dspark.router.replica_count import CountRules, ScalingState


def scaler(**changes: float) -> DraftScaler:
    rules = {"min_count": 1, "max_count": 6, "up_cooldown_s": 10.0, "down_cooldown_s": 30.0, "start_timeout_s": 60.0} | changes
    return DraftScaler(CountRules(**rules), window_s=20.0)  # type: ignore[arg-type]


class Drafters:
    """``work(t)`` seconds of drafting a second in all; what a worker cannot do waits.

    Each has room for ``room`` of its share of the ``requests``; the others are refused again and again.
    """

    def __init__(
        self,
        chosen: DraftScaler,
        work: Callable[[float], float],
        count: int = 1,
        can_grow: bool = True,
        requests: float = 10.0,
        room: float = 1e9,
    ) -> None:
        self.scaler, self.work, self.can_grow, self.requests, self.room = chosen, work, can_grow, requests, room
        self.workers = {f"d{i}": [0.0, 0.0, 0.0] for i in range(count)}
        self.now_s = 0.0
        self.decisions: list[DraftDecision] = []
        self._number = count

    def run(self, seconds: int, age_s: float = 0.0) -> list[int]:
        return [self._tick(age_s) for _ in range(seconds)]

    def _tick(self, age_s: float) -> int:
        self.now_s += 1.0
        share = self.work(self.now_s) / len(self.workers)
        for state in self.workers.values():
            state[0] += min(share, 1.0)
            state[1] += 20 * share
            state[2] += max(self.requests / len(self.workers) - self.room, 0.0) / FULL_RETRY_S
        held = min(self.requests / len(self.workers), self.room)
        reports = [DraftReport(name, *state, held, age_s) for name, state in self.workers.items()]
        self.decisions.append(self.scaler.decide(self.now_s, reports))
        wanted = self.decisions[-1].wanted
        while len(self.workers) > wanted:
            self.workers.popitem()
        while len(self.workers) < wanted and self.can_grow:
            self._number += 1
            self.workers[f"d{self._number}"] = [0.0, 0.0, 0.0]
        return len(self.workers)


def moves(counts: list[int]) -> list[int]:
    return [count for count, _ in itertools.groupby(counts)]


def test_a_step_of_work_moves_the_count_and_back() -> None:
    drafters = Drafters(scaler(), lambda t: 1.9 if 50 < t < 250 else 0.3)
    counts = drafters.run(450)
    assert moves(counts) == [1, 2, 4, 3, 2, 1] or moves(counts) == [1, 2, 4, 3, 4, 3, 2, 1]
    assert counts[240] == 4, "1.9 / 4 is under 55 %"
    assert counts[-1] == 1


@pytest.mark.parametrize("work", [0.4, 0.65, 0.75, 1.0, 1.3, 2.0, 2.6])
def test_a_constant_load_ends_in_a_constant_count(work: float) -> None:
    for start in (1, 3, 6):
        counts = Drafters(scaler(), lambda t: work, start).run(500)
        assert len(set(counts[300:])) == 1, moves(counts)
        assert work / counts[-1] <= 0.7
        assert len(moves(counts)) <= 6


def test_requests_without_room_ask_for_a_worker_that_is_not_busy() -> None:
    drafters = Drafters(scaler(), lambda t: 0.5, requests=10.0, room=8.0)
    assert drafters.run(100)[-1] == 2, "and one would refuse again"
    assert any("no room for 20.0%" in decision.reason for decision in drafters.decisions)
    assert Drafters(scaler(), lambda t: 0.5, requests=100.0, room=99.0).run(100)[-1] == 1, "one of a hundred is not many"


def test_silence_and_absence_hold() -> None:
    drafters = Drafters(scaler(), lambda t: 0.1, 3)
    drafters.run(10)
    assert set(drafters.run(100, age_s=60.0)) == {3}
    assert drafters.decisions[-1].state is ScalingState.BLIND
    assert drafters.scaler.decide(200.0, []).wanted == 3


def test_what_cannot_be_scheduled_is_given_up() -> None:
    drafters = Drafters(scaler(), lambda t: 1.9, can_grow=False)
    drafters.run(120)
    states = [decision.state for decision in drafters.decisions]
    assert ScalingState.UNSCHEDULABLE in states
    assert drafters.decisions[states.index(ScalingState.UNSCHEDULABLE)].wanted == 1


def test_the_limit_is_a_state() -> None:
    drafters = Drafters(scaler(max_count=2), lambda t: 4.0)
    assert max(drafters.run(60)) == 2
    assert drafters.decisions[-1].state is ScalingState.AT_LIMIT


def test_a_replaced_worker_starts_counting_anew() -> None:
    """Its counters fall to zero; that must not read as negative work."""
    chosen = scaler()
    for t in range(1, 15):
        chosen.decide(float(t), [DraftReport("d", 900.0 + 0.1 * t, 5000.0 + t, 0.0)])
    for t in range(15, 40):
        decision = chosen.decide(float(t), [DraftReport("d", 0.1 * (t - 14), float(t - 14), 0.0)])
        assert "-" not in decision.reason
        assert decision.wanted == 1
