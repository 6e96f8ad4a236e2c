"""Result files, ours or another engine's, and what of them may be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark.bench.metrics import median
from dspark.bench.modes import TRANSFORMERS
from dspark.bench.records import SYNTHETIC
from dspark.errors import ConfigError

Rates = dict[tuple[str, int, float], dict[str, float]]  # (set, concurrency, temperature) -> label -> tokens a second


def read_lines(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All JSON lines of some result files; ConfigError names a line that is none."""
    found = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(record, dict) or not ("kind" in record or "tokens_per_s" in record):
                raise ConfigError(f"{path}:{number}: not a result of dspark bench (it has no tokens_per_s)")
            found.append(record)
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios; ValueError without values or with one that is not over 0."""
    if not values or min(values) <= 0:
        raise ValueError("a geometric mean needs values over 0")
    return math.exp(sum(map(math.log, values)) / len(values))


def label_of(record: Mapping[str, Any], named: Collection[str] = ()) -> str:
    """``static:3``, ``plain``, ``adaptive:7@overlapped coupled``, …; what another engine ran is marked with its name.

    ``named``: fields whose values must be told apart, of ``drafter`` and ``synthetic_acceptance``.
    """
    label = f"{record['mode']}:{record['draft_len']}" if record.get("draft_len") else str(record["mode"])
    if record.get("driver"):
        label += f"@{record['driver']}"
    if "drafter" in named and record.get("drafter", "none") != "none":
        label += f" {Path(record['drafter']).name}"
    if record.get("acceptance") == "coupled":
        label += " coupled"
    if record.get("synthetic_acceptance") is not None:
        label += f" {SYNTHETIC}" + (f" {record['synthetic_acceptance']}" if "synthetic_acceptance" in named else "")
    return label if is_ours(record) or record["mode"] == TRANSFORMERS else f"{record.get('engine', '')} {label}"


def is_ours(record: Mapping[str, Any]) -> bool:
    """Whether our own engine was measured."""
    return str(record.get("engine", "")).startswith("dspark")


def point_of(record: Mapping[str, Any]) -> tuple[str, int, float]:
    """Prompt set, concurrency, temperature: where rates may be divided by each other."""
    return str(record["prompt_set"]), int(record["concurrency"]), float(record.get("temperature", 0.0))


def offline(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results that are comparable point by point; others (``kind`` online, compare, mixed) are left out."""
    return [record for record in records if "kind" not in record]


def ambiguous(records: Sequence[Mapping[str, Any]]) -> set[str]:
    """What labels must name because there are several of it."""
    drafters = {record["drafter"] for record in records if record.get("drafter", "none") != "none"}
    curves = {record["synthetic_acceptance"] for record in records if record.get("synthetic_acceptance") is not None}
    return {name for name, found in (("drafter", drafters), ("synthetic_acceptance", curves)) if len(found) > 1}


def values_by_point(records: Sequence[Mapping[str, Any]], name: str) -> Rates:
    """A field of every label at every point; the median where a label was measured more than once, nothing where it is null."""
    comparable = offline(records)
    named = ambiguous(comparable)
    found: dict[tuple[str, int, float], dict[str, list[float]]] = {}
    for record in comparable:
        if record.get(name) is not None:
            found.setdefault(point_of(record), {}).setdefault(label_of(record, named), []).append(float(record[name]))
    return {point: {label: median(values) for label, values in labels.items()} for point, labels in found.items()}


def rates_by_point(records: Sequence[Mapping[str, Any]]) -> Rates:
    """Tokens a second of every label at every point."""
    return values_by_point(records, "tokens_per_s")


def ratios_to(rates: Rates, baseline: str) -> Rates:
    """Every rate divided by that of ``baseline`` at the same point; points without it are left out."""
    return {
        point: {label: rate / labels[baseline] for label, rate in labels.items()} for point, labels in rates.items() if labels.get(baseline)
    }


def scaling(rates: Rates, label: str) -> dict[tuple[str, int, float], float]:
    """Throughput of a label at each concurrency over its own at one stream, for the same set and temperature."""
    single = {(name, temperature): labels[label] for (name, level, temperature), labels in rates.items() if level == 1 and label in labels}
    return {
        (name, level, temperature): labels[label] / single[name, temperature]
        for (name, level, temperature), labels in rates.items()
        if label in labels and (name, temperature) in single and level > 1
    }


def name_of(point: tuple[str, int, float]) -> str:
    """``code at 16``, with its temperature if it is not 0."""
    return f"{point[0]} at {point[1]}" + (f" T={point[2]:g}" if point[2] else "")
