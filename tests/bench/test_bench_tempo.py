"""Times told in work that is always the same: as on a machine that never changes its speed."""

from __future__ import annotations

import pytest

from dspark.bench.tempo import FIRST_LOOK_S, LOOK_EVERY_S, LOOKS, Tempo, products

FAST_S = 0.01


class Machine:
    """A machine with a clock of its own, 1.5 x as slow from one time to another, that decodes with steps of the same work."""

    def __init__(self, slow: tuple[float, float] = (1e9, 1e9)) -> None:
        self.now_s, self._slow = 0.0, slow
        self.landed_s = 0.0
        self.landed: list[float] = []  # what each step found

    @property
    def factor(self) -> float:
        return 1.5 if self._slow[0] <= self.now_s < self._slow[1] else 1.0

    def clock(self) -> float:
        return self.now_s

    def look(self) -> float:
        seconds = self.factor * FAST_S
        self.now_s += seconds
        return seconds

    def step(self) -> str:
        self.landed.append(self.now_s - self.landed_s if self.landed_s else 0.0)
        self.now_s += self.factor * 0.05
        self.landed_s = self.now_s
        return "a step"


def run(machine: Machine, tempo: Tempo, steps: int) -> tuple[float, float]:
    with tempo.watching(machine):
        begin = machine.now_s
        assert {machine.step() for _ in range(steps)} == {"a step"}
        return begin, machine.now_s


def test_a_slow_machine_and_a_fast_one_need_as_long() -> None:
    machine = Machine(slow=(5.0, 100.0))
    tempo = Tempo(machine.look, machine.clock)
    assert machine.now_s >= FIRST_LOOK_S
    assert tempo.reference_s == FAST_S
    machine.now_s = 3.5
    begin, end = run(machine, tempo, 20)
    assert end < 5.0
    assert tempo.at(end) - tempo.at(begin) == pytest.approx(20 * 0.05)
    machine.now_s = 6.0
    begin, end = run(machine, tempo, 20)
    assert end - begin > 1.5 * 20 * 0.05
    assert tempo.at(end) - tempo.at(begin) == pytest.approx(20 * 0.05)
    assert tempo.summary() == "times at the speed at which the same work takes 10.0 ms; it took up to 1.50 x as long"


def test_a_change_of_speed_amid_a_run_is_seen_at_the_next_look() -> None:
    machine = Machine(slow=(4.0, 5.0))
    tempo = Tempo(machine.look, machine.clock)
    machine.now_s = 3.5
    begin, end = run(machine, tempo, 60)
    assert end > 5.5
    assert tempo.at(end) - tempo.at(begin) == pytest.approx(60 * 0.05, abs=LOOK_EVERY_S)


def test_looks_take_no_time_of_their_own() -> None:
    machine = Machine()
    tempo = Tempo(machine.look, machine.clock)
    begin, end = run(machine, tempo, 30)
    num_looks = round((end - begin - 30 * 0.05) / (LOOKS * FAST_S))
    assert num_looks >= 5
    assert tempo.at(end) - tempo.at(begin) == pytest.approx(30 * 0.05)
    assert max(machine.landed) < 1e-9, "the engine would take a look for time between its steps"
    moments = [begin + i * (end - begin) / 500 for i in range(501)]
    steady = [tempo.at(moment) for moment in moments]
    assert steady == sorted(steady)


def test_moments_before_the_first_look_and_behind_the_last_one_have_a_time() -> None:
    machine = Machine()
    tempo = Tempo(machine.look, machine.clock)
    with pytest.raises(RuntimeError, match="nothing was watched"):
        tempo.at(1.0)
    tempo.note(10.0, 2 * FAST_S, 10.02)
    tempo.note(11.02, 2 * FAST_S, 11.04)
    assert tempo.at(9.0) == pytest.approx(-0.5)
    assert tempo.at(10.01) == 0.0
    assert tempo.at(10.52) == pytest.approx(0.25)
    assert tempo.at(11.03) == tempo.at(11.04) == pytest.approx(0.5)
    assert tempo.at(12.04) == pytest.approx(1.0)


def test_an_engine_is_stepped_as_before_when_nobody_watches() -> None:
    machine = Machine()
    tempo = Tempo(machine.look, machine.clock)
    with pytest.raises(ValueError, match="broke"), tempo.watching(machine):
        raise ValueError("broke")
    assert "step" not in vars(machine)


def test_the_work_takes_time() -> None:
    assert 0.0 < products()() < 5.0
