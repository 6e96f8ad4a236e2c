"""Ratios between modes, as a table and in lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dspark.bench.bars import bar_lines
from dspark.bench.frontier import frontier_lines
from dspark.bench.modes import TRANSFORMERS
from dspark.bench.results import Rates, geometric_mean, name_of, rates_by_point, ratios_to, scaling
from dspark.bench.tables import Column, Table

PLAIN = ("plain", "plain@plain", "plain@overlapped")


def report(records: Sequence[Mapping[str, Any]], baseline: str | None = None) -> None:
    """All that can be said of offline results: every point, the ratios to the baseline, and what adaptive is worth.

    ``baseline`` None: plain decoding, under the plain driver if there are several.
    """
    rates = rates_by_point(records)
    labels = {label for found in rates.values() for label in found}
    print_report(rates, baseline or next((label for label in PLAIN if label in labels), PLAIN[0]))
    for line in [*bar_lines(records), *frontier_lines(records)]:
        print(line)


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
            f" (from {values[lowest]:.2f}x, {name_of(lowest)}, to {values[highest]:.2f}x, {name_of(highest)})"
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
