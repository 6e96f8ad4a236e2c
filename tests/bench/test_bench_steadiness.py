"""Turns that the machine disturbed are measured again, whatever they brought."""

from __future__ import annotations

from dspark.bench.steadiness import FIRST_LOOK_S, LOOKS, MOST_TURNS, PAUSE_S, Steadiness, products


class Machine:
    """A machine with a clock of its own, slow from one time to another."""

    def __init__(self, slow: list[tuple[float, float]]) -> None:
        self.now_s, self._slow = 0.0, slow
        self.turns: list[float] = []  # when they began

    @property
    def is_slow(self) -> bool:
        return any(begin <= self.now_s < end for begin, end in self._slow)

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def look(self) -> float:
        seconds = 0.013 if self.is_slow else 0.01
        self.now_s += seconds
        return seconds

    def turn(self) -> int:
        self.turns.append(self.now_s)
        self.now_s += 2.0
        return len(self.turns)

    def steadiness(self, wait_s: float) -> Steadiness:
        return Steadiness(wait_s, self.look, self.clock, self.sleep)


def test_a_steady_turn_counts_at_once() -> None:
    machine = Machine([])
    steadiness = machine.steadiness(10)
    assert machine.now_s >= FIRST_LOOK_S
    assert [steadiness.steady(machine.turn) for _ in range(3)] == [1, 2, 3]
    assert (steadiness.num_again, steadiness.num_disturbed) == (0, 0)


def test_it_waits_for_the_machine_and_measures_disturbed_turns_again() -> None:
    machine = Machine([(3.5, 20.0), (21.0, 25.0)])
    steadiness = machine.steadiness(60)
    machine.now_s = 4.0
    assert steadiness.steady(machine.turn) == 2, "the first began in time, but the machine was slow when it ended"
    assert machine.turns[0] >= 20.0
    assert machine.turns[1] >= 25.0
    assert (steadiness.num_again, steadiness.num_disturbed) == (1, 0)
    assert steadiness.waited_s > 16.0


def test_the_least_disturbed_turn_counts_if_the_machine_stays_slow() -> None:
    machine = Machine([(3.5, 1000.0)])
    steadiness = machine.steadiness(1)
    machine.now_s = 4.0
    assert steadiness.steady(machine.turn) == 1
    assert len(machine.turns) == MOST_TURNS
    assert (steadiness.num_again, steadiness.num_disturbed) == (MOST_TURNS - 1, 1)
    assert steadiness.waited_s <= MOST_TURNS * (1 + PAUSE_S + 2 * LOOKS * 0.013)
    assert steadiness.summary() == f"steadiness: 3 turns measured again, 1 counted though disturbed, {steadiness.waited_s:.0f} s waited"


def test_the_work_takes_time() -> None:
    assert 0.0 < products()() < 5.0
