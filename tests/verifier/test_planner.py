"""The prefix scheduler: the paper's counterexample, exhaustive small cases, and what a token's admission may depend on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from dspark.workers.verifier.costs import CostTable, Curve, Floats
from dspark.workers.verifier.planner import MIN_GAIN, Pace, best_count, count_within, early_stop, pack, rank

PAPER_SPS = {1: 1.0, 2: 0.5, 3: 0.45}
COSTS: dict[str, Callable[[int], float]] = {
    "flat": lambda b: 1.0,
    "linear": lambda b: float(b),
    "affine": lambda b: 4.0 + b,
    "staircase": lambda b: 1.0 + (b - 1) // 2,
    "jump then flat": lambda b: 1.0 if b <= 2 else 1.6,
}
VALUES = (0.2, 0.5, 0.9)
Chains = tuple[tuple[float, ...], ...]


def survival_of(confidence: Chains) -> Floats:
    """Survival of chains with these conditional confidences."""
    return pack([tuple(itertools.accumulate(c, lambda a, b: a * b)) for c in confidence])


def seconds_of(cost: Callable[[int], float], base: int, most: int) -> Floats:
    return np.array([cost(base + k) for k in range(most + 1)])


def plan(confidence: Chains, cost: str, can_look_ahead: bool, most: int = 100) -> list[int]:
    rows = len(confidence)
    survival = survival_of(confidence)
    seconds = seconds_of(COSTS[cost], rows, min(most, survival.size))
    ranking = rank(survival)
    count = best_count(ranking, rows, seconds) if can_look_ahead else early_stop(ranking, rows, seconds)
    lengths: list[int] = ranking.lengths(count).tolist()
    return lengths


def output_law(choose: Callable[[tuple[float, float]], int]) -> list[float]:
    """Exact law of the first token in the paper's appendix A, under the ratio rule; ``choose`` gives the verified length."""
    target, draft = (0.7, 0.3), (0.5, 0.5)
    law = [0.0, 0.0]
    residual = [max(0.0, t - d) for t, d in zip(target, draft, strict=True)]
    residual = [r / sum(residual) for r in residual]
    for token, second in ((0, 0.9), (1, 0.0)):
        if choose((0.8, second)) == 0:
            for i in (0, 1):
                law[i] += draft[token] * target[i]
            continue
        accept = min(1.0, target[token] / draft[token])
        law[token] += draft[token] * accept
        for i in (0, 1):
            law[i] += draft[token] * (1 - accept) * residual[i]
    return law


def paper_seconds() -> Floats:
    return np.array([1 / PAPER_SPS[b] for b in (1, 2, 3)])


def test_the_papers_counterexample() -> None:
    def stops_early(confidence: tuple[float, float]) -> int:
        return early_stop(rank(survival_of((confidence,))), 1, paper_seconds())

    def looks_ahead(confidence: tuple[float, float]) -> int:
        return best_count(rank(survival_of((confidence,))), 1, paper_seconds())

    assert output_law(stops_early) == pytest.approx([0.7, 0.3])
    assert output_law(looks_ahead) == pytest.approx([0.85, 0.15]), "the bias that the early stop is there for"


def test_a_budget_from_old_confidences_biases_nothing() -> None:
    """Rule of section 5.2: how many from an earlier step, which from this one. Whatever the old step was, the law is the target's."""
    for old in itertools.product((0.0, 0.3, 0.8, 1.0), repeat=2):
        budget = best_count(rank(survival_of((old,))), 1, paper_seconds())

        def old_budget(confidence: tuple[float, float], budget: int = budget) -> int:
            return int(rank(survival_of((confidence,))).lengths(budget)[0])

        assert output_law(old_budget) == pytest.approx([0.7, 0.3])


def test_under_an_old_budget_admission_never_depends_on_later_tokens() -> None:
    """2 requests x 2 positions x 3 values, every budget: whether a token is admitted does not change with confidences behind it."""
    for budget in range(5):
        for a1, b1, b2 in itertools.product(VALUES, repeat=3):
            for swap in (False, True):
                chains = [((a1, a2), (b1, b2)) for a2 in VALUES]
                firsts = {int(rank(survival_of(c[::-1] if swap else c)).lengths(budget)[int(swap)]) >= 1 for c in chains}
                assert len(firsts) == 1


@pytest.mark.parametrize("cost", COSTS)
def test_no_admission_depends_on_the_token_itself(cost: str) -> None:
    """All cases of 2 requests x 2 positions x 3 values: position j never depends on confidences behind j."""
    for a1, b1, b2 in itertools.product(VALUES, repeat=3):
        firsts = {plan(((a1, a2), (b1, b2)), cost, False)[0] >= 1 for a2 in VALUES}
        assert len(firsts) == 1
        others = {plan(((b1, b2), (a1, a2)), cost, False)[1] >= 1 for a2 in VALUES}
        assert len(others) == 1


@pytest.mark.parametrize("cost", COSTS)
def test_stopping_early_is_algorithm_1(cost: str) -> None:
    """Against the loop of the paper, written out."""
    for a1, a2, b1, b2 in itertools.product(VALUES, repeat=4):
        survival = survival_of(((a1, a2), (b1, b2)))
        order = sorted((-survival[r, j], j, r) for r in (0, 1) for j in (0, 1))
        lengths, expected, tokens = [0, 0], 2.0, 2
        for negative, _, request in order:
            here, there = COSTS[cost](tokens), COSTS[cost](tokens + 1)
            if -negative < (1 + MIN_GAIN) * expected / here * (there - here):
                break
            lengths[request] += 1
            expected, tokens = expected - negative, tokens + 1
        assert plan(((a1, a2), (b1, b2)), cost, False) == lengths


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


def test_ties_go_by_position_then_request() -> None:
    ranking = rank(survival_of(((0.5, 1.0), (0.5, 1.0), (1.0,))))
    assert [ranking.lengths(count).tolist() for count in range(6)] == [
        [0, 0, 0],
        [0, 0, 1],
        [1, 0, 1],
        [1, 1, 1],
        [2, 1, 1],
        [2, 2, 1],
    ]


def test_limits_and_empty_drafts() -> None:
    assert plan(((), (0.9, 0.9)), "flat", False, most=1) == [0, 1]
    assert plan(((0.9, 0.9),), "flat", False, most=0) == [0]
    assert plan(((0.0, 0.9),), "flat", False) == [0]
    assert plan(((), ()), "flat", True) == [0, 0]
    assert rank(pack([])).lengths(0).tolist() == []


def test_plain_decoding_is_a_normal_answer() -> None:
    for can_look_ahead in (False, True):
        assert plan(((0.9, 0.9), (0.9, 0.9)), "linear", can_look_ahead) == [0, 0]


def test_latency_budgets_choose_among_counts() -> None:
    """2 requests x 2 positions against the rule written out: the best theta that keeps both paces, else the best of all."""
    seconds = seconds_of(COSTS["affine"], 2, 4)
    for a1, a2, b1, b2 in itertools.product(VALUES, repeat=4):
        survival = survival_of(((a1, a2), (b1, b2)))
        ranking = rank(survival)
        for allowed, others in itertools.product(itertools.product((1.5, 4.0, np.inf), repeat=2), (3.0, 7.0, np.inf)):
            overshoot, theta = [], []
            for count in range(5):
                lengths = ranking.lengths(count)
                gains = [1 + survival[r, : lengths[r]].sum() for r in (0, 1)]
                overshoot.append(max(*(seconds[count] / g / a for g, a in zip(gains, allowed, strict=True)), seconds[count] / others))
                theta.append(sum(gains) / seconds[count])
            keeps = [count for count in range(5) if overshoot[count] <= 1] or range(5)
            expected = max(keeps, key=lambda c: (round(theta[c], 12), -c))
            found = count_within(ranking, survival, 2, seconds, Pace(np.array(allowed), others), 4)
            assert found == expected or theta[found] == pytest.approx(theta[expected])


def test_prompts_and_one_poor_draft_decide_about_no_budget() -> None:
    """Without the seconds of prompts, and with the tokens of usual rounds, the best count keeps a pace that it would break otherwise."""
    survival = survival_of(((0.9, 0.8), (0.1, 0.1)))
    ranking, seconds = rank(survival), np.array([1.0, 1.1, 1.2, 1.3, 1.4]) + 5.0
    for pace, most in (
        (Pace(np.array([1.0, 1.0])), 3),  # nothing keeps it
        (Pace(np.array([1.0, 1.0]), prompt_s=5.0), 0),  # a step without drafts keeps it, one for the first request's does not
        (Pace(np.array([1.0, 1.0]), usual=np.array([2.0, 2.0]), prompt_s=5.0), 3),
        (Pace(np.array([1.0, 1.0]), others=1.15, usual=np.array([2.0, 2.0]), prompt_s=5.0), 1),
    ):
        assert count_within(ranking, survival, 2, seconds, pace, 4) == most


def test_curve_is_monotone_and_extrapolates() -> None:
    curve = Curve.fit([(1, 0.040), (2, 0.039), (8, 0.045), (4, 0.050)])
    assert curve.seconds == (0.039, 0.039, 0.045, 0.045)
    assert [curve(b) for b in (1, 3, 8)] == pytest.approx([0.039, 0.042, 0.045])
    assert Curve.fit([(1, 1.0), (2, 2.0)])(5) == pytest.approx(5.0)
    assert Curve((1,), (0.5,))(9) == 0.5
    for each in (curve, Curve.fit([(1, 1.0), (2, 2.0)]), Curve((1,), (0.5,))):
        assert each.dense(12)[1:] == pytest.approx([each(size) for size in range(1, 13)])


def test_a_table_adds_up_its_terms() -> None:
    table = CostTable(Curve((1,), (0.5,)), Curve((1,), (0.1,)), 0.001, 0.002, Curve((1,), (0.01,)), 0.0001)
    assert table.step_seconds(4) == 0.5
    assert table.step_seconds(4, 100) == pytest.approx(0.6)
    assert table.draft_seconds(2, 1) == pytest.approx(0.1)
    assert table.draft_seconds(2, 3, 100) == pytest.approx(0.13)
    assert table.draft_seconds(0, 3) == table.draft_seconds(3, 0) == 0.0
