"""A sweep of many points: how much each asks for, what is left of it, and what an earlier, cut-off one has measured already."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.bench.records import Identity
from dspark.errors import ConfigError

DIRTY = "-dirty"  # ends the commit of a checkout whose files differ from it


@dataclass(frozen=True, slots=True)
class Level:
    """A number of streams, and what is asked for at it."""

    concurrency: int
    requests: int
    max_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.requests * self.max_tokens


def make_levels(concurrency: Sequence[int], requests: Sequence[int] | None, max_tokens: Sequence[int]) -> tuple[Level, ...]:
    """Levels from the flags: ``requests`` and ``max_tokens`` are one for all, or one for each concurrency.

    Requests are rounded up to whole groups of streams; None: 8 at one stream, otherwise as many as streams.
    """
    asked = requests or [8 if streams == 1 else streams for streams in concurrency]
    levels = zip(concurrency, _one_each("--requests", asked, concurrency), _one_each("--max-tokens", max_tokens, concurrency), strict=True)
    return tuple(Level(streams, math.ceil(count / streams) * streams, tokens) for streams, count, tokens in levels)


def _one_each(flag: str, values: Sequence[int], concurrency: Sequence[int]) -> Sequence[int]:
    if len(values) == 1:
        return [values[0]] * len(concurrency)
    if len(values) != len(concurrency):
        raise ConfigError(f"{flag} has {len(values)} values for {len(concurrency)} of --concurrency: name one for all, or one for each")
    return values


class Held:
    """The records of earlier runs, by what they are the result of."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        names = [field.name for field in dataclasses.fields(Identity)]
        # A dirty checkout is no state of the source that could be the same again.
        mine = [line for line in lines if "kind" not in line and not str(line.get("commit", DIRTY)).endswith(DIRTY)]
        self._lines = {tuple(line.get(name) for name in names): line for line in mine}

    def find(self, wanted: Sequence[Identity]) -> list[Mapping[str, Any]] | None:
        """The records of a whole point; None if one of them is missing: contenders are only comparable side by side."""
        found = [self._lines.get(dataclasses.astuple(identity)) for identity in wanted]
        whole = [line for line in found if line is not None]
        return whole if len(whole) == len(found) else None


class Remaining:
    """How long the rest of a sweep may take, from the points that are done."""

    def __init__(self, levels: Sequence[Level]) -> None:
        """``levels`` of all points, in the order in which they are measured."""
        self._left = list(levels)
        self._seconds: dict[Level, list[float]] = {}

    def skip(self) -> None:
        """The next point need not be measured."""
        self._left.pop(0)

    def took(self, seconds: float) -> None:
        """The next point has been measured."""
        self._seconds.setdefault(self._left.pop(0), []).append(seconds)

    def seconds(self) -> float:
        """Expected seconds of the points that are left; ValueError before the first one is done."""
        return sum(map(self._expected, self._left))

    def _expected(self, level: Level) -> float:
        """As long as at the same level before; otherwise as at the nearest, by the tokens: too much, since more streams are faster."""
        if level in self._seconds:
            return sum(self._seconds[level]) / len(self._seconds[level])
        if not self._seconds:
            raise ValueError("nothing has been measured yet")
        nearest = min(self._seconds, key=lambda known: (abs(math.log(known.concurrency / level.concurrency)), known.concurrency))
        return self._expected(nearest) * level.num_tokens / nearest.num_tokens


def as_time(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
