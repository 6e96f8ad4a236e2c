"""Survival estimators: what they learn from trimmed rounds, what they never look at, and how little a burst moves them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers.draft_rounds import Floats, Law, logistic, make_tree, rounds

from dspark.types import DraftLaw, DraftSignals, DraftTree
from dspark.workers.verifier.acceptance_models import OnlineLogistic
from dspark.workers.verifier.survival import MAX_ROUNDS_A_REFIT, ROUNDS_A_REFIT, SIGNALS, SurvivalEstimator, make_estimator

POSITIONS = 4
NAMES = tuple(SIGNALS)


def flat_prior() -> DraftSignals:
    return DraftSignals(True, (0.0,), (1.0,))


def estimator(name: str) -> SurvivalEstimator:
    return make_estimator(name, POSITIONS, flat_prior())


def serve(survival: SurvivalEstimator, law: Law, count: int, threshold: float = 0.0, seed: int = 0) -> None:
    """Serve rounds in steps of 8; tokens whose estimated survival is under ``threshold`` are trimmed away."""
    for i, (tree, stood) in enumerate(rounds(law, POSITIONS, count, seed), start=1):
        verified = int((survival.survival([tree])[0] >= threshold).sum())
        survival.observe(tree, verified, range(min(stood, verified)))
        if i % 8 == 0:
            survival.learn()


def by_margin(k: int, margin: float) -> float:
    return logistic(0.8 * margin - 0.3 * k + 0.4)


def by_position(k: int, margin: float) -> float:
    return (0.9, 0.8, 0.6, 0.7)[k]


def test_margins_are_learnt_from_trimmed_rounds_without_bias() -> None:
    """Whether a token is verified hangs on the estimate itself; slopes and intercepts become the true ones all the same."""
    survival = estimator("margin")
    serve(survival, by_margin, 12_000, threshold=0.35)
    found = [(one.parameters["slope"], one.parameters["intercept"]) for one in survival.report().positions]
    for k, (slope, intercept) in enumerate(found[:3]):
        assert slope == pytest.approx(0.8, abs=0.15)
        assert intercept == pytest.approx(0.4 - 0.3 * k, abs=0.2)
    tree = make_tree([1.0, 0.5, 1.5])
    expected = np.cumprod([by_margin(k, x) for k, x in enumerate(tree.margin)])
    assert survival.survival([tree])[0] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("lengths", [(1, 4), (2, 3), (4,)])
def test_acceptance_is_learnt_from_trimmed_rounds_without_bias(lengths: tuple[int, ...]) -> None:
    """With drafts cut to any length, a position's rate is that of rounds that verified it and accepted all before."""
    survival = estimator("constant")
    for i, (tree, stood) in enumerate(rounds(by_position, POSITIONS, 16_000), start=1):
        verified = lengths[i % len(lengths)]
        survival.observe(tree, verified, range(min(stood, verified)))
        survival.learn()
    report = survival.report()
    for k in range(max(lengths)):
        assert report.positions[k].parameters["rate"] == pytest.approx(by_position(k, 0.0), abs=0.05)
        assert report.positions[k].acceptance == pytest.approx(by_position(k, 0.0), abs=0.05)
    expected = np.cumprod([by_position(k, 0.0) for k in range(max(lengths))])
    assert survival.survival([make_tree([0.0] * max(lengths))])[0] == pytest.approx(expected, abs=0.05)


def test_a_head_that_is_too_sure_is_corrected() -> None:
    """Its confidence is the true chance with logits doubled: the scale becomes a half, and the calibration error falls."""

    def sharpened(tree: DraftTree) -> DraftTree:
        logits = np.log(np.array(tree.confidence) / (1.0 - np.array(tree.confidence)))
        return dataclasses.replace(tree, confidence=tuple(logistic(2.0 * z) for z in logits), margin=())

    survival = estimator("head")
    errors = []
    for i, (tree, stood) in enumerate(rounds(by_margin, POSITIONS, 16_000), start=1):
        survival.observe(sharpened(tree), POSITIONS, range(stood))
        survival.learn()
        if i in (2 * ROUNDS_A_REFIT, 16_000):
            errors.append(survival.report().mean_error)
    assert [one.parameters["scale"] for one in survival.report().positions] == pytest.approx([0.5] * POSITIONS, abs=0.1)
    assert errors[1] < 0.03 < 0.05 < errors[0]


def test_a_head_is_helped_by_the_margin() -> None:
    """A confidence that knows nothing: what the margin says is learnt on top of it."""
    survival = estimator("head")
    for tree, stood in rounds(by_margin, POSITIONS, 12_000):
        survival.observe(dataclasses.replace(tree, confidence=(0.5,) * POSITIONS), POSITIONS, range(stood))
        survival.learn()
    assert [one.parameters["margin"] for one in survival.report().positions] == pytest.approx([0.8] * POSITIONS, abs=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_a_burst_moves_estimates_by_little(name: str) -> None:
    survival = estimator(name)
    serve(survival, by_position, 4_000)
    probe = [tree for tree, _ in rounds(by_position, POSITIONS, 50, seed=7)]
    before = survival.survival(probe)
    for tree, _ in rounds(by_position, POSITIONS, ROUNDS_A_REFIT, seed=5):
        survival.observe(tree, POSITIONS, range(0))  # a whole refit of nothing but rejections
    survival.learn()
    after = survival.survival(probe)
    assert survival.report().refits == 4_000 // ROUNDS_A_REFIT + 1
    assert np.abs(after - before)[:, 0].mean() > 0.01
    assert np.abs(after - before).max() < 0.2


def test_one_refit_moves_no_parameter_by_more_than_its_bound() -> None:
    random = np.random.default_rng(0)
    model = OnlineLogistic(("slope", "intercept"), np.zeros((2, 2)))
    for outcome in (True, False, False):
        before = model.parameters().copy()
        model.learn([random.normal(0, 12, 500)], random.integers(0, 2, 500), np.full(500, outcome))
        assert 0.1 < np.abs(model.parameters() - before).max() <= OnlineLogistic.MAX_STEP + 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_what_nobody_verifies_goes_back_to_where_it_started(name: str) -> None:
    """Nothing stands for a while, then drafts are trimmed to one token: positions behind it can learn no more."""
    survival = estimator(name)
    tree = make_tree([1.0] * POSITIONS)

    def judge(law: Law, count: int, verified: int) -> Floats:
        for _, stood in rounds(law, POSITIONS, count):
            survival.observe(tree, verified, range(min(stood, verified)))
            survival.learn()
        return survival.survival([tree])[0]

    start = survival.survival([tree])[0]
    low = judge(lambda k, _: 0.95 if k == 0 else 0.05, 4_000, POSITIONS)
    back = judge(by_position, 500 * ROUNDS_A_REFIT, 1)
    assert low[1] / low[0] < 0.3
    assert back[1] / back[0] == pytest.approx(start[1] / start[0], abs=0.05)
    assert back[0] == pytest.approx(0.9, abs=0.05)


def test_rejected_and_trimmed_are_told_apart() -> None:
    """A test of the tests above: whoever counts trimmed tokens as rejected, or skips rejections, gets another rate."""
    survival = estimator("constant")
    for i, (tree, stood) in enumerate(rounds(by_position, POSITIONS, 8_000), start=1):
        verified = (1, 4)[i % 2]
        survival.observe(tree, POSITIONS, range(min(stood, verified)))  # wrong: claims that all were verified
        survival.learn()
    assert survival.report().positions[1].parameters["rate"] < 0.6


@pytest.mark.parametrize("name", NAMES)
def test_survival_of_a_node_depends_on_nothing_behind_it(name: str) -> None:
    """Neither on a token of the draft, nor on the law it was drawn from: rules 1 and 3 of the schedule."""
    survival = estimator(name)
    serve(survival, by_margin, 1_000)
    random = np.random.default_rng(3)
    tree, _ = next(rounds(by_margin, POSITIONS, 1))
    found = survival.survival([tree])[0]
    for k in range(POSITIONS + 1):
        for _ in range(20):
            behind = POSITIONS - k
            changed = dataclasses.replace(
                tree,
                tokens=tuple(random.integers(0, 99, POSITIONS).tolist()),
                confidence=(*tree.confidence[:k], *random.random(behind).tolist()),
                margin=(*tree.margin[:k], *random.normal(0, 5, behind).tolist()),
                law=DraftLaw(torch.zeros(POSITIONS, 2, dtype=torch.int64), torch.rand(POSITIONS, 2)),
            )
            assert survival.survival([changed, tree])[0, :k].tolist() == found[:k].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_survival_depends_on_no_other_request(name: str) -> None:
    survival = estimator(name)
    serve(survival, by_margin, 500)
    trees = [tree for tree, _ in rounds(by_margin, POSITIONS, 6)] + [make_tree([1.0, 2.0]), make_tree([1.0] * 3, parents=(-1, -1, 0))]
    together = survival.survival(trees)
    for row, tree in zip(together, trees, strict=True):
        alone = survival.survival([tree])[0]
        assert row[: len(alone)] == pytest.approx(alone, rel=1e-12)
        assert not row[len(alone) :].any()
        assert (alone > 0).all()
        assert (np.diff(alone) <= 0).all()
        assert alone[0] <= 1


def test_without_history_constant_counts_everything_as_certain() -> None:
    survival = estimator("constant")
    assert survival.survival([make_tree([0.0] * POSITIONS)])[0].tolist() == [1.0] * POSITIONS


def test_estimates_start_from_calibration() -> None:
    """A new engine estimates as the calibration says, position by position; deeper positions as the last one."""
    signals = DraftSignals(True, (0.5, 1.0), (0.25, -0.5))
    tree = make_tree([2.0, 1.0, 3.0], [0.9, 0.8, 0.7])
    margin = make_estimator("margin", POSITIONS, signals).survival([tree])[0]
    assert margin == pytest.approx(np.cumprod([logistic(1.25), logistic(0.5), logistic(2.5)]))
    head = make_estimator("head", POSITIONS, signals).survival([tree])[0]
    assert head == pytest.approx(np.cumprod([0.9, 0.8, 0.7]))


def test_drafts_deeper_than_the_drafter_says_are_estimated_like_its_last_position() -> None:
    survival = estimator("constant")
    serve(survival, by_position, 4_000)
    rates = survival.survival([make_tree([0.0] * 6)])[0]
    assert rates[5] / rates[4] == pytest.approx(rates[3] / rates[2])


def test_later_siblings_are_learnt_apart() -> None:
    """The first child stands in half the rounds, the second in half of the rest; the chain's own estimate stays what it is."""
    survival = make_estimator("constant", 2, flat_prior())
    tree = make_tree([0.0] * 3, parents=(-1, -1, 0))
    random = np.random.default_rng(0)
    for _ in range(8_000):
        accepted = ((0, 2), (0,), (1,), ())[int(random.integers(0, 4))]
        survival.observe(tree, 3, accepted)
        survival.learn()
    first, second, _ = survival.survival([tree])[0]
    assert first == pytest.approx(0.5, abs=0.04)
    assert second == pytest.approx(0.25, abs=0.04)
    assert survival.survival([make_tree([0.0] * 2)])[0] == pytest.approx([0.5, 0.25], abs=0.04)


def test_large_steps_are_sampled() -> None:
    survival = estimator("constant")
    for tree, stood in rounds(by_position, POSITIONS, 5 * MAX_ROUNDS_A_REFIT):
        survival.observe(tree, POSITIONS, range(stood))
    survival.learn()
    report = survival.report()
    assert (report.rounds, report.refits) == (5 * MAX_ROUNDS_A_REFIT, 1)
    assert report.positions[0].outcomes == MAX_ROUNDS_A_REFIT


def test_laws_are_not_kept() -> None:
    """A dense law is megabytes; what waits to be learnt must not hold it."""
    survival = estimator("margin")
    tree = dataclasses.replace(make_tree([1.0]), law=DraftLaw(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4)))
    survival.observe(tree, 1, range(1))
    assert not any(isinstance(part, (DraftTree, DraftLaw)) for part in survival._rounds[0])


def measured(survival: SurvivalEstimator, trees: Sequence[tuple[DraftTree, int]]) -> tuple[list[float], list[float]]:
    found = survival.survival([tree for tree, _ in trees])
    stood = np.array([[count > k for k in range(POSITIONS)] for _, count in trees])
    return found.mean(0).tolist(), stood.mean(0).tolist()


def test_the_report_says_what_was_predicted_and_what_came() -> None:
    survival = estimator("margin")
    serve(survival, by_margin, 8_000)
    report, stats = survival.report(), survival.stats()
    assert (report.estimator, report.rounds, len(report.positions)) == ("margin", 8_000, POSITIONS)
    predicted, came = measured(survival, list(rounds(by_margin, POSITIONS, 4_000, seed=9)))
    assert [one.predicted for one in report.positions] == pytest.approx(predicted, abs=0.04)
    assert [one.measured for one in report.positions] == pytest.approx(came, abs=0.04)
    assert report.mean_error == pytest.approx(np.mean([one.error for one in report.positions]))
    assert report.mean_error < 0.03
    assert stats["survival_ece_mean"] == report.mean_error
    assert stats['acceptance_rate_per_pos{position="0"}'] == report.positions[0].acceptance
    assert stats['survival_slope_per_pos{position="3"}'] == report.positions[3].parameters["slope"]
    assert stats["survival_rounds_total"] == 8_000


def test_positions_that_were_never_seen_have_no_statistics() -> None:
    survival = estimator("margin")
    for tree, stood in rounds(by_margin, POSITIONS, ROUNDS_A_REFIT):
        survival.observe(tree, 1, range(min(stood, 1)))
    survival.learn()
    names = [name for name in survival.stats() if name.startswith("survival_ece_per_pos")]
    assert names == ['survival_ece_per_pos{position="0"}']
    assert survival.report().positions[1].outcomes == 0
