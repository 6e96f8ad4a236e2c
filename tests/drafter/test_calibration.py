"""calibration.json: where estimators start from, or a refusal that names the file and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark.deploy.default_model import default_drafter
from dspark.errors import ConfigError
from dspark.types import DraftSignals
from dspark.workers.drafter.calibration import CALIBRATION_FILE, default_signals, read_signals, read_temperatures

CPU = torch.device("cpu")
MARGIN = {"slope": [0.5, 0.6, 1], "intercept": [-0.1, 0.0, 0.2]}


def folder_with(folder: Path, content: Any) -> Path:
    (folder / CALIBRATION_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_the_embedded_drafter_is_calibrated_whole() -> None:
    """Head and margin both, with errors of the survival of at most 2 % on rounds that they were not fitted on."""
    folder = default_drafter()
    assert folder is not None
    assert read_temperatures(folder, 7, CPU) is not None
    signals = read_signals(folder, 7, True)
    assert len(signals.margin_slope) == len(signals.margin_intercept) == 7
    found = json.loads((folder / CALIBRATION_FILE).read_text())
    for part in (found, found["margin"]):
        assert part["mean_ece_after"] <= 0.02 < part["mean_ece_before"]
        assert part["mean_ece_after"] == pytest.approx(sum(part["ece_after"]) / 7)
        assert len(part["auc_before"]) == len(part["auc_after"]) == 7


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"temperatures": [1.0, 0.5, 2], "margin": MARGIN, "ece_before": [0.1]})
    temperatures = read_temperatures(folder, 3, CPU)
    assert temperatures is not None
    assert temperatures.tolist() == [1.0, 0.5, 2.0]
    assert read_signals(folder, 3, True) == DraftSignals(True, (0.5, 0.6, 1.0), (-0.1, 0.0, 0.2))


def test_what_is_not_there_has_a_default(tmp_path: Path) -> None:
    assert read_temperatures(tmp_path, 3, CPU) is None
    assert read_signals(tmp_path, 3, False) == default_signals(False)
    folder = folder_with(tmp_path, {"margin": MARGIN})
    assert read_temperatures(folder, 3, CPU) is None
    assert read_signals(folder, 3, False).margin_slope == (0.5, 0.6, 1.0)
    folder = folder_with(tmp_path, {"temperatures": [1.0, 1.0, 1.0]})
    assert read_signals(folder, 3, True) == default_signals(True)


def read_all(folder: Path) -> None:
    read_temperatures(folder, 3, CPU)
    read_signals(folder, 3, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ([1.0], "keys and values"),
        ({"temperatures": [1.0, 1.0]}, "temperatures must be 3 numbers"),
        ({"temperatures": [1.0, 0.0, 1.0]}, "temperatures must be over 0"),
        ({"temperatures": "1, 1, 1"}, "temperatures must be 3 numbers"),
        ({"margin": [1.0]}, "margin must hold slope and intercept"),
        ({"margin": {"slope": [1, 1, 1]}}, "intercept must be 3 numbers"),
        ({"margin": MARGIN | {"slope": [1, None, 1]}}, "slope must be 3 numbers"),
        ('{"margin": {"slope": [1, Infinity, 1], "intercept": [0, 0, 0]}}', "slope must be 3 numbers"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: Any, message: str) -> None:
    folder = folder_with(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_all(folder)
    assert CALIBRATION_FILE in str(caught.value)
