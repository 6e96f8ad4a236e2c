"""The prefix scheduler: the paper's counterexample, exhaustive small cases, and what a token's admission may depend on."""

from __future__ import annotations

import itertools

import pytest

from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.planner import MIN_GAIN, Candidate, DraftGate, schedule

PAPER_SPS = {1: 1.0, 2: 0.5, 3: 0.45}
COSTS = {
    "flat": lambda b: 1.0,
    "linear": lambda b: float(b),
    "affine": lambda b: 4.0 + b,
    "staircase": lambda b: 1.0 + (b - 1) // 2,
    "jump then flat": lambda b: 1.0 if b <= 2 else 1.6,
}
VALUES = (0.2, 0.5, 0.9)


def chain(*confidence: float) -> Candidate:
    """A chain with these conditional confidences."""
    return Candidate(tuple(itertools.accumulate(confidence, lambda a, b: a * b)))


def plan(confidence: tuple[tuple[float, ...], ...], cost: str, can_look_ahead: bool) -> list[int]:
    rows = len(confidence)
    return schedule([chain(*c) for c in confidence], rows, rows, COSTS[cost], 100, can_look_ahead)


def output_law(can_look_ahead: bool) -> list[float]:
    """Exact law of the first token in the paper's appendix A, under the ratio rule."""
    target, draft = (0.7, 0.3), (0.5, 0.5)
    law = [0.0, 0.0]
    residual = [max(0.0, t - d) for t, d in zip(target, draft, strict=True)]
    residual = [r / sum(residual) for r in residual]
    for token, second in ((0, 0.9), (1, 0.0)):
        length = schedule([chain(0.8, second)], 1, 1, lambda b: 1 / PAPER_SPS[b], 100, can_look_ahead)[0]
        if length == 0:
            for i in (0, 1):
                law[i] += draft[token] * target[i]
            continue
        accept = min(1.0, target[token] / draft[token])
        law[token] += draft[token] * accept
        for i in (0, 1):
            law[i] += draft[token] * (1 - accept) * residual[i]
    return law


def test_the_papers_counterexample() -> None:
    assert output_law(can_look_ahead=False) == pytest.approx([0.7, 0.3])
    assert output_law(can_look_ahead=True) == pytest.approx([0.85, 0.15]), "the bias that the early stop is there for"


@pytest.mark.parametrize("cost", COSTS)
def test_no_admission_depends_on_the_token_itself(cost: str) -> None:
    """All cases of 2 requests x 2 positions x 3 values: position j never depends on confidences behind j."""
    for a1, b1, b2 in itertools.product(VALUES, repeat=3):
        firsts = {plan(((a1, a2), (b1, b2)), cost, False)[0] >= 1 for a2 in VALUES}
        assert len(firsts) == 1
        others = {plan(((b1, b2), (a1, a2)), cost, False)[1] >= 1 for a2 in VALUES}
        assert len(others) == 1


@pytest.mark.parametrize("cost", COSTS)
def test_looking_ahead_finds_the_best_of_all_plans(cost: str) -> None:
    for a1, a2, b1, b2 in itertools.product(VALUES, repeat=4):
        lengths = plan(((a1, a2), (b1, b2)), cost, True)

        def theta(i: int, j: int, a: tuple[float, float] = (a1, a2), b: tuple[float, float] = (b1, b2)) -> float:
            gains = [a[0], a[0] * a[1]][:i] + [b[0], b[0] * b[1]][:j]
            return (2 + sum(gains)) / COSTS[cost](2 + i + j)

        best = max(theta(i, j) for i in range(3) for j in range(3))
        plain = theta(0, 0)
        expected = best if best >= plain * (1 + MIN_GAIN) else plain
        assert theta(*lengths) == pytest.approx(expected)


@pytest.mark.parametrize("can_look_ahead", [False, True])
def test_ties_go_by_position_then_request(can_look_ahead: bool) -> None:
    costs = {2: 1.0, 3: 1.0, 4: 100.0, 5: 100.0, 6: 100.0}
    candidates = [chain(0.5, 1.0), chain(0.5, 1.0)]
    assert schedule(candidates, 2, 2, lambda b: costs[b], 100, can_look_ahead) == [1, 0]


def test_limits_and_empty_drafts() -> None:
    flat = COSTS["flat"]
    assert schedule([], 1, 1, flat, 10, False) == []
    assert schedule([Candidate(()), chain(0.9, 0.9)], 2, 2, flat, 1, False) == [0, 1]
    assert schedule([chain(0.9, 0.9)], 1, 1, flat, 0, False) == [0]
    assert schedule([chain(0.0, 0.9)], 1, 1, flat, 5, False) == [0]


def test_plain_decoding_is_a_normal_answer() -> None:
    for can_look_ahead in (False, True):
        assert plan(((0.9, 0.9), (0.9, 0.9)), "linear", can_look_ahead) == [0, 0]


def test_curve_is_monotone_and_extrapolates() -> None:
    curve = Curve.fit([(1, 0.040), (2, 0.039), (8, 0.045), (4, 0.050)])
    assert curve.seconds == (0.039, 0.039, 0.045, 0.045)
    assert [curve(b) for b in (1, 3, 8)] == pytest.approx([0.039, 0.042, 0.045])
    assert Curve.fit([(1, 1.0), (2, 2.0)])(5) == pytest.approx(5.0)
    assert Curve((1,), (0.5,))(9) == 0.5
    table = CostTable(Curve((1,), (0.5,)), Curve((1,), (0.1,)))
    assert table.step_seconds(4, 0) == 0.5
    assert table.step_seconds(4, 2) == pytest.approx(0.6)


def test_gate_closes_on_loss_and_probes_more_and_more_rarely() -> None:
    gate = DraftGate(smoothing=1.0)
    assert gate.is_open()
    gate.observe(0.9)
    waits = []
    for _ in range(4):
        wait = 1
        while not gate.is_open():
            wait += 1
        waits.append(wait)
        gate.observe(0.9)
    assert waits == sorted(waits)
    assert waits[-1] > waits[0]
    gate.observe(1.2)
    assert gate.is_open()
