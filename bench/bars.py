"""What adaptive verification is worth against the best fixed choice, and the overlapped driver against the plain one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.bench.results import ambiguous, geometric_mean, is_ours, label_of, name_of, offline, point_of, rates_by_point

Point = tuple[str, int, float]
BAR = 0.97  # of the best of all others, at each point
CLEARLY = 2.0  # standard errors
MIN_TURNS = 3
RIVALS = ("plain", "static", "tree")  # shadow is no choice for speed: it verifies what it then throws away


@dataclass(frozen=True, slots=True)
class Kind:
    """What a label stands for. ``variant``: drafter, coupled rule or not, and synthetic acceptance; modes that draft are rivals only
    within one."""

    mode: str
    driver: str
    variant: tuple[str, bool, str | None]
    without_driver: str

    def rivals(self, other: Kind) -> bool:
        """Whether the other is a choice that could have been made instead of this one."""
        same = self.driver == other.driver and (other.mode == "plain" or self.variant == other.variant)
        return same and other.mode in RIVALS


def bar_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Adaptive over the best of all others at each point, over the best single static length; overlapped over plain driver."""
    ours = [record for record in offline(records) if is_ours(record)]
    rates, kinds, turns = rates_by_point(ours), kinds_by_label(ours), turns_by_point(ours)
    lines = []
    for label in sorted(label for label, kind in kinds.items() if kind.mode == "adaptive"):
        if best := _against_best(rates, kinds, label):
            lines.append(best)
            lines += _turn_by_turn(rates, kinds, label, turns)
        if static := _against_static(rates, kinds, label):
            lines.append(static)
    return lines + _drivers(rates, kinds)


def kinds_by_label(records: Sequence[Mapping[str, Any]]) -> dict[str, Kind]:
    """What each label of our engine stands for."""
    named = ambiguous(records)
    return {
        label_of(record, named): Kind(
            mode=str(record["mode"]),
            driver=str(record.get("driver", "")),
            variant=(str(record.get("drafter", "")), record.get("acceptance") == "coupled", record.get("synthetic_acceptance")),
            without_driver=label_of({**record, "driver": ""}, named),
        )
        for record in records
    }


def _against_best(rates: Mapping[Point, Mapping[str, float]], kinds: Mapping[str, Kind], label: str) -> str | None:
    ratios: dict[Point, tuple[float, str]] = {}
    for point, found in rates.items():
        others = {other: rate for other, rate in found.items() if kinds[label].rivals(kinds[other])}
        if label in found and others:
            best = max(others, key=others.__getitem__)
            ratios[point] = (found[label] / others[best], best)
    if not ratios:
        return None
    lowest = min(ratios, key=lambda point: ratios[point][0])
    mean = geometric_mean([ratio for ratio, _ in ratios.values()])
    return (
        f"{label} / best of all others at each point: lowest {ratios[lowest][0]:.3f}x ({name_of(lowest)}, {ratios[lowest][1]}),"
        f" geometric mean {mean:.3f}x over {_points(len(ratios))}"
    )


def turns_by_point(records: Sequence[Mapping[str, Any]]) -> dict[Point, dict[str, list[float]]]:
    """Tokens a second of every repeat of every label at every point, in the order in which they ran."""
    named = ambiguous(records)
    turns: dict[Point, dict[str, list[float]]] = {}
    for record in records:
        turns.setdefault(point_of(record), {}).setdefault(label_of(record, named), []).extend(record.get("tokens_per_s_each", ()))
    return turns


def _turn_by_turn(
    rates: Mapping[Point, Mapping[str, float]], kinds: Mapping[str, Kind], label: str, turns: Mapping[Point, Mapping[str, Sequence[float]]]
) -> list[str]:
    """Where a label is below the bar by more than chance explains: ratios of turns that ran beside each other, to the best other.

    The machine's drift is in both turns of a ratio. That the best other is the best of several by chance, too, is left in.
    """
    found: dict[Point, tuple[float, float]] = {}
    for point, medians in rates.items():
        others = [other for other in medians if kinds[label].rivals(kinds[other])]
        if label not in medians or not others:
            continue
        ours, theirs = turns[point][label], turns[point][max(others, key=medians.__getitem__)]
        if len(ours) == len(theirs) >= MIN_TURNS:
            logs = [math.log(mine / its) for mine, its in zip(ours, theirs, strict=True)]
            found[point] = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    if not found:
        return []
    below = [point for point, (mean, error) in found.items() if mean + CLEARLY * error < math.log(BAR)]
    lowest = min(found, key=lambda point: found[point][0])
    mean, error = found[lowest]
    clear = f" ({', '.join(map(name_of, below))})" if below else ""
    return [
        f"{label}, turn by turn: below {BAR} x by more than {CLEARLY:g} standard errors at {len(below)} of {_points(len(found))}{clear};"
        f" lowest {math.exp(mean):.3f}x +- {100 * error:.1f} % ({name_of(lowest)})"
    ]


def _against_static(rates: Mapping[Point, Mapping[str, float]], kinds: Mapping[str, Kind], label: str) -> str | None:
    """Over the points where every static length ran: the best is the one that a user could have chosen for all of them."""
    lengths = [other for other, kind in kinds.items() if kind.mode == "static" and kinds[label].rivals(kind)]
    whole = [found for found in rates.values() if label in found and all(length in found for length in lengths)]
    if not lengths or not whole:
        return None
    ratios = {length: geometric_mean([found[label] / found[length] for found in whole]) for length in lengths}
    best = min(ratios, key=ratios.__getitem__)
    return f"{label} / best single static ({best}): {ratios[best]:.3f}x, geometric mean over {_points(len(whole))}"


def _drivers(rates: Mapping[Point, Mapping[str, float]], kinds: Mapping[str, Kind]) -> list[str]:
    twins = {kind.without_driver: label for label, kind in kinds.items() if kind.driver == "plain"}
    ratios: dict[tuple[str, Point], float] = {}
    for label, kind in kinds.items():
        plain = twins.get(kind.without_driver)
        if kind.driver == "overlapped" and plain is not None:
            ratios |= {(label, point): found[label] / found[plain] for point, found in rates.items() if label in found and plain in found}
    if not ratios:
        return []
    lowest = min(ratios, key=ratios.__getitem__)
    return [
        f"overlapped / plain driver: lowest {ratios[lowest]:.3f}x ({lowest[0]}, {name_of(lowest[1])}),"
        f" geometric mean {geometric_mean(list(ratios.values())):.3f}x over {len(ratios)} pairs"
    ]


def _points(count: int) -> str:
    return f"{count} point" if count == 1 else f"{count} points"
