"""Calibration of a drafter's own estimates, kept beside its weights: where the estimators of the verifier start from.

::

    temperatures   [γ]  what position k's confidence logit is divided by (DSpark section 3.2, sequential temperature scaling)
    margin         slope [γ], intercept [γ]: logit of acceptance at position k = slope * margin + intercept
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.errors import ConfigError
from dspark.types import DraftSignals

CALIBRATION_FILE = "calibration.json"
# Fitted to the default drafter of SmolLM2-135M-Instruct, all positions together; live recalibration does the rest.
MARGIN_SLOPE = 0.6
MARGIN_INTERCEPT = 0.05


def read_temperatures(folder: Path, block_size: int, device: torch.device) -> Tensor | None:
    """Temperatures of the confidence head, [γ] fp32; None if the folder has none. ConfigError if damaged."""
    path, content = _read(folder)
    if "temperatures" not in content:
        return None
    values = _numbers(path, content, "temperatures", block_size)
    if min(values) <= 0:
        raise ConfigError(f"drafter: {path}: temperatures must be over 0")
    return torch.tensor(values, dtype=torch.float32, device=device)


def read_signals(folder: Path, block_size: int, has_head: bool) -> DraftSignals:
    """How to read the estimates of the drafter in ``folder``; margins by a prior of ours if it has no fit. ConfigError if damaged."""
    path, content = _read(folder)
    if "margin" not in content:
        return default_signals(has_head)
    fit = content["margin"]
    if not isinstance(fit, dict):
        raise ConfigError(f"drafter: {path}: margin must hold slope and intercept")
    slope, intercept = (_numbers(path, fit, name, block_size) for name in ("slope", "intercept"))
    return DraftSignals(has_head, slope, intercept)


def default_signals(has_head: bool) -> DraftSignals:
    """How to read the estimates of a DSpark module whose margins nobody fitted."""
    return DraftSignals(has_head, (MARGIN_SLOPE,), (MARGIN_INTERCEPT,))


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file's path and content; empty if there is no file."""
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return path, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"drafter: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"drafter: {path} must hold keys and values")
    return path, content


def _numbers(path: Path, content: dict[str, Any], name: str, count: int) -> tuple[float, ...]:
    """``count`` finite numbers; ConfigError names the key otherwise."""
    values = content.get(name)
    numbers = [float(value) for value in values if isinstance(value, int | float)] if isinstance(values, list) else []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"drafter: {path}: {name} must be {count} numbers")
    return tuple(numbers)
