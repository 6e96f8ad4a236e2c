"""Ratios between modes, read from result files: ours, another engine's, or several together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark.bench.metrics import median
from dspark.bench.modes import TRANSFORMERS
from dspark.bench.tables import Column, Table
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


def label_of(record: Mapping[str, Any], with_drafter: bool = False) -> str:
    """``static:3``, ``plain``, ``adaptive:7 coupled``, …; what another engine ran is marked with its name."""
    label = f"{record['mode']}:{record['draft_len']}" if record.get("draft_len") else str(record["mode"])
    if with_drafter and record.get("drafter", "none") != "none":
        label += f" {Path(record['drafter']).name}"
    if record.get("acceptance") == "coupled":
        label += " coupled"
    engine = str(record.get("engine", ""))
    return label if engine.startswith("dspark") or record["mode"] == TRANSFORMERS else f"{engine} {label}"


def point_of(record: Mapping[str, Any]) -> tuple[str, int, float]:
    """Prompt set, concurrency, temperature: where rates may be divided by each other."""
    return str(record["prompt_set"]), int(record["concurrency"]), float(record.get("temperature", 0.0))


def rates_by_point(records: Sequence[Mapping[str, Any]]) -> Rates:
    """Tokens a second of every label at every point; the median where a label was measured more than once.

    Only offline results are comparable: others (``kind`` online, compare) are left out. Drafters are named in the
    labels if there are several.
    """
    offline = [record for record in records if "kind" not in record]
    with_drafter = len({record["drafter"] for record in offline if record.get("drafter", "none") != "none"}) > 1
    found: dict[tuple[str, int, float], dict[str, list[float]]] = {}
    for record in offline:
        labels = found.setdefault(point_of(record), {})
        labels.setdefault(label_of(record, with_drafter), []).append(float(record["tokens_per_s"]))
    return {point: {label: median(rates) for label, rates in labels.items()} for point, labels in found.items()}


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


def print_report(rates: Rates, baseline: str) -> None:
    """Tokens a second of every label at every point, with the ratio to the baseline, then the summary lines."""
    labels = sorted({label for found in rates.values() for label in found}, key=lambda label: (label != baseline, label))
    widths = [max(14, len(label)) for label in labels]
    headings = [Column(label, width) for label, width in zip(labels, widths, strict=True)]
    table = Table([Column("set", 10, is_text=True), Column("conc", 4), Column("temp", 4), *headings])
    relative = ratios_to(rates, baseline)
    for point in sorted(rates):
        cells = [_cell(rates[point].get(label), relative.get(point, {}).get(label)) for label in labels]
        table.row(point[0], point[1], f"{point[2]:g}", *cells)
    for line in summary_lines(rates, baseline):
        print(line)


def summary_lines(rates: Rates, baseline: str) -> list[str]:
    """The headline ratios: each mode to the baseline over all points, the baseline to transformers, and its scaling."""
    lines = []
    relative = ratios_to(rates, baseline)
    for label in sorted({label for found in relative.values() for label in found} - {baseline, TRANSFORMERS}):
        values = {point: found[label] for point, found in relative.items() if label in found}
        lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        lines.append(
            f"{label} / {baseline}: {geometric_mean(list(values.values())):.2f}x"
            f" (from {values[lowest]:.2f}x, {_name(lowest)}, to {values[highest]:.2f}x, {_name(highest)})"
        )
    against = [found[baseline] for found in ratios_to(rates, TRANSFORMERS).values() if baseline in found]
    if against:
        lines.append(f"{baseline} / transformers generate, one stream: {geometric_mean(against):.2f}x (lowest set {min(against):.2f}x)")
    scaled = scaling(rates, baseline)
    for level in sorted({level for _, level, _ in scaled}):
        values_at = [value for (_, at, _), value in scaled.items() if at == level]
        lines.append(f"{baseline} at {level} streams / at one: {geometric_mean(values_at):.2f}x (lowest set {min(values_at):.2f}x)")
    return lines


def _cell(rate: float | None, ratio: float | None) -> str | None:
    if rate is None:
        return None
    return f"{rate:,.1f}" if ratio is None else f"{rate:,.1f} {ratio:.2f}x"


def _name(point: tuple[str, int, float]) -> str:
    return f"{point[0]} at {point[1]}" + (f" T={point[2]:g}" if point[2] else "")


def draw(rates: Rates, png: Path) -> None:
    """Tokens a second against tokens a second and user: a panel a set, a line a label. ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png needs matplotlib: pip install 'dspark-serve[plot]'") from error
    names = sorted({name for name, _, _ in rates})
    figure = Figure(figsize=(5 * len(names), 4))
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        curves: dict[str, list[tuple[int, float]]] = {}
        for (at, level, temperature), found in sorted(rates.items()):
            for label, rate in found.items() if at == name else ():
                curves.setdefault(f"{label} T={temperature:g}" if temperature else label, []).append((level, rate))
        for label, curve in sorted(curves.items()):
            axis.plot([rate / level for level, rate in curve], [rate for _, rate in curve], marker="o", label=label)
        axis.set(title=name, xlabel="tokens/s per user", ylabel="tokens/s")
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(png, dpi=120)
