"""The curves of a sweep in one picture: a column a prompt set, a row a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.bench.records import SYNTHETIC
from dspark.bench.results import Rates, offline, values_by_point
from dspark.errors import ConfigError

WIDTH, HEIGHT = 5.5, 4.0  # inches of one panel
Curves = dict[str, list[tuple[float, float]]]  # label -> (x, y)


@dataclass(frozen=True, slots=True)
class Row:
    """One question: the curves of a prompt set that answer it. ``is_line`` joins them; otherwise x = y is drawn for comparison."""

    x: str
    y: str
    curves: Callable[[str], Curves]
    is_line: bool = True
    is_log: bool = False  # powers of two along x


def draw(records: Sequence[Mapping[str, Any]], png: Path) -> None:
    """Throughput against speed per user, budget against load, predicted against measured step time.

    Rows for which the records have no figures are left out. ConfigError without matplotlib.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png needs matplotlib: pip install 'dspark-serve[plot]'") from error
    rows = _rows(records)
    names = sorted({str(record["prompt_set"]) for record in offline(records)})
    labels = sorted({label for row in rows for name in names for label in row.curves(name)})
    colours = {label: colormaps["tab20"](place % 20) for place, label in enumerate(labels)}
    figure = Figure(figsize=(WIDTH * len(names), HEIGHT * len(rows)))
    grid = figure.subplots(len(rows), len(names), squeeze=False)
    for row, panels in zip(rows, grid, strict=True):
        for name, axes in zip(names, panels, strict=True):
            _draw_panel(axes, name, row, colours)
    if forced := sorted({str(text) for record in offline(records) if (text := record.get("synthetic_acceptance")) is not None}):
        figure.suptitle(f"{SYNTHETIC} ACCEPTANCE, forced: {'; '.join(forced)}")
    figure.tight_layout()
    figure.savefig(png, dpi=120)


def _rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    rates = values_by_point(records, "tokens_per_s")
    budgets = values_by_point([record for record in records if record.get("drafter", "none") != "none"], "budget_mean")
    predicted, measured = values_by_point(records, "predicted_step_ms"), values_by_point(records, "measured_step_ms")
    rows = [Row("tokens/s per user", "tokens/s", lambda name: curves(rates, name, lambda point, _, rate: (rate / point[1], rate)))]
    if budgets:
        rows.append(
            Row(
                "streams",
                "drafted tokens verified a request and round",
                lambda name: curves(budgets, name, lambda point, _, mean: (point[1], mean)),
                is_log=True,
            )
        )
    if predicted:
        pairs = {
            point: {label: ms for label, ms in found.items() if label in predicted.get(point, {})} for point, found in measured.items()
        }
        rows.append(
            Row(
                "predicted step, ms",
                "measured step, ms",
                lambda name: curves(pairs, name, lambda point, label, ms: (predicted[point][label], ms)),
                is_line=False,
            )
        )
    return rows


def curves(values: Rates, name: str, place: Callable[[tuple[str, int, float], str, float], tuple[float, float]]) -> Curves:
    """The points of a prompt set by label, by number of streams; a temperature over 0 is part of the label."""
    found: Curves = {}
    for point, labels in sorted(values.items()):
        for label, value in labels.items() if point[0] == name else ():
            at = f"{label} T={point[2]:g}" if point[2] else label
            found.setdefault(at, []).append(place(point, label, value))
    return found


def _draw_panel(axes: Any, name: str, row: Row, colours: Mapping[str, Any]) -> None:
    found = row.curves(name)
    for label, places in sorted(found.items()):
        xs, ys = zip(*places, strict=True)
        axes.plot(xs, ys, marker="o", linestyle="-" if row.is_line else "none", label=label, color=colours[label])
    if not row.is_line and found:
        ends = [value for places in found.values() for pair in places for value in pair]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="grey", linestyle="--", label="equal")
    axes.set(title=name, xlabel=row.x, ylabel=row.y)
    if row.is_log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if found:
        axes.legend(fontsize="small")
