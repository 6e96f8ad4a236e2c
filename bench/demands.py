"""Bars that results must meet: ``plain / vllm-0.26.0 plain @ 64 >= 1.5``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.bench.results import Rates, geometric_mean, name_of, rates_by_point
from dspark.errors import ConfigError

_FORM = re.compile(r"(.+?) / (.+?)(?: @ ?([\d,]+))? ?>= ?([\d.]+)")


@dataclass(frozen=True, slots=True)
class Demand:
    """``label`` has ``factor`` times the throughput of ``other`` at ``levels`` (none: all), as geometric mean of the sets."""

    label: str
    other: str
    levels: tuple[int, ...]
    factor: float

    @staticmethod
    def parse(text: str) -> Demand:
        """Read ``LABEL / LABEL @ STREAMS,STREAMS >= FACTOR``; ConfigError otherwise."""
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise ConfigError(f"bar {text!r}: use LABEL / LABEL @ STREAMS >= FACTOR, for example plain / vllm-0.26.0 plain @ 1,64 >= 1.5")
        label, other, levels, factor = found.groups()
        return Demand(label, other, tuple(int(level) for level in levels.split(",")) if levels else (), float(factor))


def demand_lines(records: Sequence[Mapping[str, Any]], demands: Sequence[Demand]) -> tuple[list[str], bool]:
    """A line for every demand at every level, and whether all are met; what was not measured is not met."""
    rates = rates_by_point(records)
    lines, all_met = [], True
    for demand in demands:
        for level in demand.levels or sorted({level for _, level, _ in rates}):
            text, is_met = _line(rates, demand, level)
            lines.append(text)
            all_met &= is_met
    return lines, all_met


def _line(rates: Rates, demand: Demand, level: int) -> tuple[str, bool]:
    name = f"{demand.label} / {demand.other} at {level}"
    ratios = {
        point: found[demand.label] / found[demand.other]
        for point, found in rates.items()
        if point[1] == level and demand.label in found and demand.other in found
    }
    if not ratios:
        return f"{name}: not measured, >= {demand.factor:g}x asked: NOT met", False
    mean, lowest = geometric_mean(list(ratios.values())), min(ratios, key=ratios.__getitem__)
    is_met = mean >= demand.factor
    verdict = "met" if is_met else "NOT met"
    return f"{name}: {mean:.2f}x (lowest {ratios[lowest]:.2f}x, {name_of(lowest)}), >= {demand.factor:g}x asked: {verdict}", is_met
