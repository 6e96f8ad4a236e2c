"""The planner's clock and the replay of survival estimators: small runs, and scores against their definitions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.draft_rounds import logistic, rounds
from helpers.tiny_model import save_tiny_model

from dspark.bench.cli import main
from dspark.bench.planner_time import STAGES
from dspark.bench.survival_replay import GROUP, Judged, accepted_within, calibration_error, ranking_quality, replay, score
from dspark.errors import ConfigError
from dspark.types import DraftSignals

POSITIONS = 4


def by_margin(k: int, margin: float) -> float:
    return logistic(0.8 * margin - 0.3 * k + 0.4)


@pytest.fixture(scope="module")
def judged() -> list[Judged]:
    return [Judged(tree, stood, False) for tree, stood in rounds(by_margin, POSITIONS, 3_000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "tiny.jsonl").write_text(json.dumps({"turns": ["say ab ab ab ab ab ab"]}) + "\n")
    return str(folder)


def survival_command(model: str, prompts: str) -> list[str]:
    return ["survival", "--model", model, "--drafter", "ngram", "--dtype", "float32", "--sets", "tiny", "--prompts", prompts]


def test_the_planner_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "planner.jsonl"
    command = ["planner", "--requests", "1,3", "--positions", "2", "--estimators", "head,constant", "--repeats", "3"]
    assert main([*command, "--json", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["requests"], r["estimator"]) for r in records] == [(1, "head"), (1, "constant"), (3, "head"), (3, "constant")]
    for record in records:
        assert set(record["medians"]) == {f"{stage}_us" for stage in STAGES}
        assert all(value > 0 for value in record["medians"].values())
        assert record["medians"]["plan_us"] > record["medians"]["estimate_us"]
    assert "estimate us" in capsys.readouterr().out


def test_ranking_quality_counts_pairs() -> None:
    random = np.random.default_rng(0)
    predicted, came = np.round(random.random(60), 1), random.random(60) < 0.4
    pairs = list(itertools.product(predicted[came], predicted[~came]))
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert ranking_quality(predicted, came) == pytest.approx(expected)


def test_calibration_error_is_the_mean_gap_of_bins() -> None:
    predicted = np.array([0.01, 0.02, 0.5, 0.52, 1.0])
    came = np.array([False, True, True, True, True])
    assert calibration_error(predicted, came) == pytest.approx((abs(0.03 - 1) + abs(1.02 - 2) + 0.0) / 5)


def test_accepted_within_a_budget() -> None:
    """Half the rounds are certain, half are hopeless: with one token a round the certain ones get two each."""
    survival = np.tile(np.array([[1.0, 0.9], [0.1, 0.05]]), (GROUP, 1))
    stood = np.tile(np.array([[True, True], [False, False]]), (GROUP, 1))
    share = accepted_within(survival, stood, 1)
    assert 0.7 < share <= 1.0  # the groups are drawn at random, so few of them hold exactly half
    assert accepted_within(survival, stood, 2) == pytest.approx(1.0, abs=0.15)
    assert accepted_within(-survival + 2, stood, 1) < share


def test_an_estimator_that_learns_replays_better(judged: list[Judged]) -> None:
    signals = DraftSignals(True, (0.0,), (0.0,))
    scores = {name: score(judged, replay(judged, name, POSITIONS, signals, 0.0, 16)) for name in ("margin", "margin unlearnt", "constant")}
    assert scores["margin"][0] > 0.8 > scores["constant"][0] + 0.15
    assert scores["margin unlearnt"][0] == pytest.approx(0.5)
    assert scores["margin"][2] < scores["margin unlearnt"][2]
    assert scores["margin"][3][1] > 1.1 * scores["constant"][3][1]


def test_what_is_trimmed_is_not_learnt_from(judged: list[Judged]) -> None:
    """An estimate of one half a token, trimmed below 0.4: only the first position is ever verified."""
    signals = DraftSignals(True, (0.0,), (0.0,))
    early = replay(judged[:64], "margin", POSITIONS, signals, 0.4, 16)
    assert np.array(early).tolist() == pytest.approx(np.array([[0.5, 0.25, 0.125, 0.0625]] * 64))
    trimmed = replay(judged, "margin", POSITIONS, signals, 0.4, 16)
    whole = replay(judged, "margin", POSITIONS, signals, 0.0, 16)
    tree = np.array(judged[-1].tree.margin)
    assert trimmed[-1][0] == pytest.approx(whole[-1][0], abs=0.1)
    assert tree.shape == whole[-1].shape


def test_too_few_rounds_are_refused(model: str, prompts: str) -> None:
    with pytest.raises(ConfigError, match="drafts were judged"):
        main([*survival_command(model, prompts), "--max-tokens", "12", "--requests", "2"])


def test_rounds_of_a_model_are_replayed(model: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "survival.jsonl"
    command = [*survival_command(model, prompts), "--max-tokens", "120", "--requests", "24", "--temperature", "1", "--ignore-eos"]
    assert main([*command, "--json", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["estimator"], r["trim"]) for r in records] == [
        ("margin unlearnt", 0.0),
        ("margin", 0.0),
        ("margin", 0.3),
        ("constant", 0.0),
        ("constant", 0.3),
    ]
    assert all(0 <= r["ece"] <= 1 and 0 <= r["auc_token"] <= 1 for r in records)
    assert "AUC token" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["planner", "--estimators", "oracle"], ["survival", "--trim", "1.5"]])
def test_bad_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    assert flags[-1] in capsys.readouterr().err
