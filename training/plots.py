"""Pictures of a run, if matplotlib is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Bin = tuple[float, float, int]  # mean estimate, share that survived, observations


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_metrics(metrics: Path) -> Path | None:
    """Loss terms and acceptance length over the steps, as ``metrics.png`` beside the file; None without matplotlib."""
    if not can_plot():
        return None
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line for line in lines if "loss" in line]
    for name in ("loss", "law", "cross_entropy", "confidence"):
        left.plot([line["step"] for line in steps], [line[name] for line in steps], label=name)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.legend()
    right.plot([line["step"] for line in steps], [line["acceptance_length"] for line in steps], label="training")
    held_out = [line for line in lines if "held_out" in line]
    for name in ("acceptance_length", "greedy_length"):
        points = [(line["step"], line["held_out"][name]) for line in held_out if name in line["held_out"]]
        if points:
            right.plot([x for x, _ in points], [y for _, y in points], marker="o", label=f"held out, {name}")
    right.set(xlabel="step", ylabel="tokens a round")
    right.legend()
    path = metrics.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def plot_reliability(folder: Path, diagrams: Sequence[Mapping[str, Sequence[Bin]]]) -> list[Path]:
    """One diagram a position: mean estimated survival against what survived, bin by bin; no files without matplotlib."""
    if not can_plot():
        return []
    from matplotlib.figure import Figure

    paths = []
    for position, estimators in enumerate(diagrams, start=1):
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for name, bins in estimators.items():
            axes.plot([b[0] for b in bins], [b[1] for b in bins], marker="o", label=name)
        axes.set(xlabel="estimated survival", ylabel="share that survived", title=f"position {position}", xlim=(0, 1), ylim=(0, 1))
        axes.legend()
        path = folder / f"reliability-{position}.png"
        figure.savefig(path, dpi=100)
        paths.append(path)
    return paths
