"""Cost tables of earlier starts, by a fingerprint of everything that a step's cost hangs on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from dspark.workers.verifier.costs import CostTable, Curve

FORMAT = 1  # raise it when steps begin to cost something else, or tables to mean something else


def device_name(device: torch.device) -> str:
    """What computes: the GPU's name, or the processor's with its number of usable cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {cores} cores"


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Names the table of an engine with these ``facts`` (model, drafter, dtype, device, parallel sizes, limits), and these versions."""
    versions = {"format": FORMAT, "torch": torch.__version__, "transformers": transformers.__version__}
    return hashlib.sha256(json.dumps({**facts, **versions}, sort_keys=True, default=str).encode()).hexdigest()[:24]


def load(folder: Path, name: str) -> CostTable | None:
    """The table kept under a fingerprint; None if there is none, or none that can be read."""
    try:
        values = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return CostTable(
            verify=_curve(values["verify"]),
            draft=_curve(values["draft"]),
            verify_context_s=float(values["verify_context_s"]),
            prefill_s=float(values["prefill_s"]),
            draft_deeper=_curve(values["draft_deeper"]),
            draft_context_s=float(values["draft_context_s"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def save(folder: Path, name: str, table: CostTable) -> None:
    """Keep a table; OSError if the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
        json.dump(dataclasses.asdict(table), file)
    Path(file.name).replace(folder / f"{name}.json")


def _curve(values: Mapping[str, Any]) -> Curve:
    sizes, seconds = tuple(map(int, values["sizes"])), tuple(map(float, values["seconds"]))
    if not sizes or len(sizes) != len(seconds) or list(sizes) != sorted(set(sizes)) or min(seconds) < 0:
        raise ValueError("not a cost curve")
    return Curve(sizes, seconds)
