"""What a benchmark compares: the modes of speculation, plain decoding, and transformers' own ``generate``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from dspark.errors import ConfigError
from dspark.types import Mode, Speculation

TRANSFORMERS = "transformers"
KNOWN = f"plain, static:K, static:A..B, adaptive[:K], tree[:NODES], shadow[:K] or {TRANSFORMERS}"
_RANGE = re.compile(r"static:(\d+)\.\.(\d+)")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BenchMode:
    """One way to decode. ``speculation`` is None for the transformers baseline.

    ``name`` and ``draft_len`` are what result files carry: plain, static with its length, adaptive and shadow with their
    limit (0: the drafter's own), tree with its nodes, transformers. ``driver`` of the engine; empty: the engine's own choice.
    """

    name: str
    draft_len: int
    speculation: Speculation | None
    driver: str = ""

    @property
    def label(self) -> str:
        label = f"{self.name}:{self.draft_len}" if self.draft_len else self.name
        return f"{label}@{self.driver}" if self.driver else label

    @property
    def uses_drafter(self) -> bool:
        return self.speculation is not None and self.speculation.mode is not Mode.OFF

    @property
    def needs_costs(self) -> bool:
        """Whether the engine must know what a step costs to decide what is verified."""
        return self.speculation is not None and self.speculation.mode in (Mode.ADAPTIVE, Mode.SHADOW)


def parse_mode(text: str) -> BenchMode:
    """Read one mode (``KNOWN``, but no range); ConfigError otherwise."""
    if text == TRANSFORMERS:
        return BenchMode(TRANSFORMERS, 0, None)
    try:
        speculation = Speculation.parse(text)
    except ValueError as error:
        raise ConfigError(f"mode {text!r}: {error}; use {KNOWN}") from error
    if speculation.tree_nodes:
        if speculation.draft_len:
            raise ConfigError(f"mode {text!r}: results are kept by the number of nodes alone; use tree[:NODES]")
        return BenchMode("tree", speculation.tree_nodes, speculation)
    name = "plain" if speculation.mode is Mode.OFF else str(speculation.mode)
    return BenchMode(name, speculation.draft_len or 0, speculation)


def parse_modes(text: str, drivers: Sequence[str] = ("",)) -> list[BenchMode]:
    """A comma-separated list of different modes, each once under every driver; ``static:1..7`` stands for seven of them."""
    modes: list[BenchMode] = []
    for part in (part.strip() for part in text.split(",")):
        if span := _RANGE.fullmatch(part):
            first, last = map(int, span.groups())
            if first > last:
                raise ConfigError(f"mode {part!r}: the range is empty")
            modes += [parse_mode(f"static:{length}") for length in range(first, last + 1)]
        else:
            modes.append(parse_mode(part))
    if len(set(modes)) < len(modes):
        raise ConfigError(f"modes {text!r}: one of them is named twice")
    # The drivers of one mode run right after each other: they are what is compared.
    return [
        mode if mode.speculation is None else dataclasses.replace(mode, driver=driver)
        for mode in modes
        for driver in (drivers if mode.speculation is not None else ("",))
    ]


def rotated(modes: list[T], repeat: int) -> list[T]:
    """The order for one repeat: each mode comes first equally often, so that no mode always follows another."""
    shift = repeat % len(modes)
    return modes[shift:] + modes[:shift]
