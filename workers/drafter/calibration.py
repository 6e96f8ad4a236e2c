"""Temperatures of the confidence head (DSpark section 3.2, sequential temperature scaling), kept beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from dspark.errors import ConfigError

CALIBRATION_FILE = "calibration.json"


def read_temperatures(folder: Path, block_size: int, device: torch.device) -> Tensor | None:
    """What position k's confidence logit is divided by, [γ] fp32; None if the folder has no calibration. ConfigError if damaged."""
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return None
    try:
        values = torch.tensor(json.loads(path.read_text(encoding="utf-8"))["temperatures"], dtype=torch.float32, device=device)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"drafter: {path} cannot be read: {error}") from error
    if tuple(values.shape) != (block_size,) or not bool((values > 0).all()):
        raise ConfigError(f"drafter: {path} must hold {block_size} positive temperatures")
    return values
