"""Throughput against speed per user (DSpark figure 7): what one mode is worth over another at matched throughput and speed.

::

    speed        tokens a second a user, falls as streams are added
    throughput   tokens a second of all users

A curve is the part of a sweep over streams on which more throughput costs speed: points that another one beats in both are
left out. Between its points it is a straight line on logarithmic axes; beyond its ends nothing is said.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.bench.bars import kinds_by_label
from dspark.bench.results import geometric_mean, is_ours, offline, rates_by_point

Pairs = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points (speed, throughput), speed falling and throughput rising."""

    points: tuple[tuple[float, float], ...]

    @staticmethod
    def of(points: Pairs) -> Curve:
        """The points that no other one beats in both, or ties in one and beats in the other."""
        kept: list[tuple[float, float]] = []
        for speed, throughput in sorted(points, reverse=True):
            if not kept or throughput > kept[-1][1]:
                kept.append((speed, throughput))
        return Curve(tuple(kept))

    @property
    def peak(self) -> float:
        """The largest throughput."""
        return self.points[-1][1]

    def speed_at(self, throughput: float) -> float | None:
        """Speed per user at a throughput; None beyond the ends."""
        return _interpolate([(y, x) for x, y in self.points], throughput)

    def throughput_at(self, speed: float) -> float | None:
        """Throughput at a speed per user; None beyond the ends."""
        return _interpolate(list(reversed(self.points)), speed)


@dataclass(frozen=True, slots=True)
class Gain:
    """What one curve is worth over another, as factors; None where one of them was not measured that far.

    ``speeds``: per-user speed at each measured throughput of the other that both reach. ``speed_at_half`` and
    ``throughput_at_half``: at half the other's peak throughput, and at the speed it has there.
    """

    speeds: tuple[float, ...]
    speed_at_half: float | None
    throughput_at_half: float | None


def gain(curve: Curve, other: Curve) -> Gain:
    """What ``curve`` is worth over ``other``."""
    speeds = [found / speed for speed, throughput in other.points if (found := curve.speed_at(throughput)) is not None]
    half = other.peak / 2
    speed = other.speed_at(half)
    if speed is None:
        return Gain(tuple(speeds), None, None)
    faster, more = curve.speed_at(half), curve.throughput_at(speed)
    return Gain(tuple(speeds), None if faster is None else faster / speed, None if more is None else more / half)


def frontier_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every adaptive label over static:1 (what MTP-1 does), for each prompt set that both swept over several loads."""
    ours = [record for record in offline(records) if is_ours(record)]
    kinds = kinds_by_label(ours)
    points: dict[tuple[str, float], dict[str, list[tuple[float, float]]]] = {}
    for (name, level, temperature), rates in rates_by_point(ours).items():
        for label, rate in rates.items():
            points.setdefault((name, temperature), {}).setdefault(label, []).append((rate / level, rate))
    lines = []
    for label in sorted(label for label, kind in kinds.items() if kind.mode == "adaptive"):
        single = next(
            (other for other in kinds if other.partition("@")[0].split()[0] == "static:1" and kinds[label].rivals(kinds[other])), None
        )
        if single is None:
            continue
        gains: dict[str, Gain] = {}
        for (name, temperature), labels in sorted(points.items()):
            if min(len(labels.get(label, ())), len(labels.get(single, ()))) > 1:
                at = name + (f" T={temperature:g}" if temperature else "")
                gains[at] = gain(Curve.of(labels[label]), Curve.of(labels[single]))
        lines += [f"{label} over {single}, {at}: {describe(found)}" for at, found in gains.items()]
        if len(gains) > 1:
            lines.append(f"{label} over {single}, geometric mean of the sets: {describe(_mean(list(gains.values())))}")
    return lines


def describe(found: Gain) -> str:
    """``+50 % tok/s/user at half its peak throughput (…), +60 % throughput at …``."""
    if found.speeds:
        matched = f"{_percent(min(found.speeds))} to {_percent(max(found.speeds))} tok/s/user at matched throughput"
    else:
        matched = "no throughput that both reach"
    return (
        f"{matched}; at half the peak throughput of the latter {_percent(found.speed_at_half)} tok/s/user,"
        f" and at its speed there {_percent(found.throughput_at_half)} throughput"
    )


def _mean(gains: Sequence[Gain]) -> Gain:
    halves, mores = [found.speed_at_half for found in gains], [found.throughput_at_half for found in gains]
    return Gain(tuple(speed for found in gains for speed in found.speeds), _mean_of(halves), _mean_of(mores))


def _mean_of(values: Sequence[float | None]) -> float | None:
    """None unless every set has a value."""
    known = [value for value in values if value is not None]
    return geometric_mean(known) if len(known) == len(values) else None


def _percent(factor: float | None) -> str:
    return "(not measured)" if factor is None else f"{100 * (factor - 1):+.0f} %"


def _interpolate(rising: Pairs, x: float) -> float | None:
    """y at x on the polyline through ``rising`` (x rising), straight on logarithmic axes; None beyond its ends."""
    xs = [place for place, _ in rising]
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    right = min(bisect.bisect_right(xs, x), len(xs) - 1)
    (x0, y0), (x1, y1) = rising[max(right - 1, 0)], rising[right]
    if x0 == x1:
        return y0
    share = math.log(x / x0) / math.log(x1 / x0)
    return math.exp(math.log(y0) + share * math.log(y1 / y0))
