"""Calibration: fits find what made the data, errors are what they say, and what is written is what serving reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training_runs import BLOCK, make_run, run_config

from dspark.errors import ConfigError
from dspark.training.calibrate import (
    Rounds,
    calibrate,
    calibration_error,
    diagrams,
    fit,
    fit_margins,
    fit_temperatures,
    ranking_quality,
    rounds_of,
    survival,
)  # fmt: skip
from dspark.training.served import Record, Round
from dspark.training.trainer import train
from dspark.workers.drafter.calibration import CALIBRATION_FILE, read_signals, read_temperatures

GAMMA = 4
WRONG_BY = np.array([2.0, 0.6, 1.5, 1.0])  # the head says its logits times this
LINES = (np.array([1.3, 0.7, 1.0, 0.5]), np.array([-0.4, 0.3, 0.0, 0.6]))


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def drawn_rounds(seed: int, count: int = 12_000) -> Rounds:
    """Rounds whose acceptance has the probability of true logits; head and margins are distortions of these."""
    draws = np.random.default_rng(seed)
    true = draws.normal(1.0, 1.2, (count, GAMMA))
    stands = draws.random((count, GAMMA)) < sigmoid(true)
    accepted = np.cumprod(stands, axis=1).sum(axis=1)
    slope, intercept = LINES
    return Rounds(true * WRONG_BY, (true - intercept) / slope, accepted.astype(np.int64), np.arange(count))


def test_temperatures_undo_what_distorted_the_head() -> None:
    assert fit_temperatures(drawn_rounds(0), 15) == pytest.approx(WRONG_BY, rel=0.2)


def test_margin_lines_are_found() -> None:
    """Only rounds that reached a position are observations of it: those that did not would pull every line down."""
    found = fit_margins(drawn_rounds(1))
    assert found.slope == pytest.approx(LINES[0], rel=0.1)
    assert found.intercept == pytest.approx(LINES[1], abs=0.1)


def test_errors_fall_on_rounds_that_were_not_fitted_on() -> None:
    result = fit(drawn_rounds(2), drawn_rounds(3), 15)
    assert result["mean_ece_before"] > 0.04
    assert result["mean_ece_after"] < 0.015
    assert result["margin"]["mean_ece_after"] < 0.015 < 0.05 < result["margin"]["mean_ece_before"]
    assert all(after >= before - 0.01 for before, after in zip(result["auc_before"], result["auc_after"], strict=True))
    assert result["survival"] == sorted(result["survival"], reverse=True)


def test_the_fit_does_not_see_what_it_is_measured_on() -> None:
    """Other measured rounds change the errors, not the parameters."""
    one, other = fit(drawn_rounds(4), drawn_rounds(5, 3000), 15), fit(drawn_rounds(4), drawn_rounds(6, 3000), 15)
    assert one["temperatures"] == other["temperatures"]
    assert one["margin"]["slope"] == other["margin"]["slope"]
    assert one["ece_after"] != other["ece_after"]


def test_expected_calibration_error_by_hand() -> None:
    estimates, outcomes = np.array([0.1, 0.1, 0.9, 0.9]), np.array([0.0, 1.0, 1.0, 1.0])
    assert calibration_error(estimates, outcomes, 10) == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)
    assert calibration_error(outcomes, outcomes, 10) == 0.0


def test_ranking_quality_by_counting_pairs() -> None:
    draws = np.random.default_rng(0)
    estimates, outcomes = draws.integers(0, 6, 60) / 5.0, (draws.random(60) < 0.4).astype(np.float64)
    pairs = [(a > b) + 0.5 * (a == b) for a in estimates[outcomes > 0] for b in estimates[outcomes == 0]]
    assert ranking_quality(estimates, outcomes) == pytest.approx(np.mean(pairs))
    assert np.isnan(ranking_quality(estimates, np.ones(60)))


def test_survival_is_the_product_of_the_positions() -> None:
    logits = np.array([[0.0, 1.0, -1.0]])
    assert survival(logits, 1) == pytest.approx(0.5 * sigmoid(1.0))


def record(*rounds: tuple[int, int]) -> Record:
    return Record([], [Round((0.5,) * drafted, (0.1,) * drafted, drafted, accepted, accepted + 1) for drafted, accepted in rounds])


def test_only_whole_rounds_count_and_never_a_last_one() -> None:
    """The end of a request may cut its last round, and a trimmed draft says nothing of what was trimmed."""
    rounds = rounds_of([record((3, 1), (2, 2), (3, 3), (3, 0)), record((3, 2))], 3, has_head=True)
    assert rounds.accepted.tolist() == [1, 3]
    assert rounds.request.tolist() == [0, 0]
    assert rounds_of([record((3, 1), (3, 0))], 3, has_head=False).logits is None


def test_a_drafter_that_says_nothing_cannot_be_calibrated() -> None:
    nothing = Rounds(None, None, np.array([1, 2]), np.array([0, 1]))
    with pytest.raises(ConfigError, match="neither a confidence head nor margins"):
        fit(nothing, nothing, 15)


def test_reliability_has_a_curve_for_each_estimator() -> None:
    rounds = drawn_rounds(7, 4000)
    pictures = diagrams(rounds, fit(rounds, rounds, 15), 15)
    assert len(pictures) == GAMMA
    assert set(pictures[0]) == {"head", "head, scaled", "margin"}
    assert sum(count for _, _, count in pictures[0]["head"]) == 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("calibrate"))


@pytest.mark.parametrize("kind", ["dspark", pytest.param("dflash", marks=pytest.mark.slow)])
def test_a_trained_drafter_is_calibrated_where_it_lies(folder: Path, kind: str) -> None:
    config = run_config(folder, f"run-{kind}", {"kind": kind}, max_steps=12, held_out=4)
    config = config.model_copy(update={"calibrate": config.calibrate.model_copy(update={"max_tokens": 60, "min_rounds": 20})})
    assert train(config, lambda _: None)
    said: list[str] = []
    result = calibrate(config, said.append)
    device, has_head = torch.device("cpu"), kind == "dspark"
    temperatures = read_temperatures(config.drafter_folder, BLOCK, device)
    signals = read_signals(config.drafter_folder, BLOCK, has_head)
    assert (temperatures is not None) == has_head
    if temperatures is not None:
        assert temperatures.tolist() == pytest.approx(result["temperatures"])
    assert list(signals.margin_slope) == result["margin"]["slope"]
    assert "mean ECE of the margin" in said[-1]
    assert sorted(path.name for path in config.out.glob("*.png") if "reliability" in path.name) == [
        f"reliability-{k}.png" for k in range(1, BLOCK + 1)
    ]
    first = (config.drafter_folder / CALIBRATION_FILE).read_text()
    assert calibrate(config, said.append) == result, "an earlier calibration does not distort the next one"
    assert (config.drafter_folder / CALIBRATION_FILE).read_text() == first


def test_too_few_rounds_and_no_drafter_are_said(folder: Path) -> None:
    config = run_config(folder, "untrained")
    with pytest.raises(ConfigError, match="run dspark train drafter first"):
        calibrate(config, lambda _: None)
    config = run_config(folder, "short", max_steps=1, held_out=2)
    assert train(config, lambda _: None)
    short = config.model_copy(update={"calibrate": config.calibrate.model_copy(update={"max_tokens": 3})})
    with pytest.raises(ConfigError, match=r"too few to calibrate on; raise calibrate\.num_prompts"):
        calibrate(short, lambda _: None)
