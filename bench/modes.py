"""What a benchmark compares: the modes of speculation, plain decoding, and transformers' own ``generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from dspark.errors import ConfigError
from dspark.types import Mode, Speculation

TRANSFORMERS = "transformers"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BenchMode:
    """One way to decode. ``speculation`` is None for the transformers baseline.

    ``name`` and ``draft_len`` are what result files carry: plain, static with its length, adaptive with its limit
    (0: the drafter's own), transformers.
    """

    name: str
    draft_len: int
    speculation: Speculation | None

    @property
    def label(self) -> str:
        return f"{self.name}:{self.draft_len}" if self.draft_len else self.name

    @property
    def uses_drafter(self) -> bool:
        return self.speculation is not None and self.speculation.mode is not Mode.OFF


def parse_mode(text: str) -> BenchMode:
    """Read ``plain``, ``static:K``, ``adaptive``, ``adaptive:K`` or ``transformers``; ConfigError otherwise."""
    if text == TRANSFORMERS:
        return BenchMode(TRANSFORMERS, 0, None)
    try:
        speculation = Speculation.parse(text)
    except ValueError as error:
        raise ConfigError(f"mode {text!r}: {error}; use plain, static:K, adaptive, adaptive:K or {TRANSFORMERS}") from error
    name = "plain" if speculation.mode is Mode.OFF else str(speculation.mode)
    return BenchMode(name, speculation.draft_len or 0, speculation)


def parse_modes(text: str) -> list[BenchMode]:
    """A comma-separated list of different modes."""
    modes = [parse_mode(part.strip()) for part in text.split(",")]
    if len(set(modes)) < len(modes):
        raise ConfigError(f"modes {text!r}: one of them is named twice")
    return modes


def rotated(modes: list[T], repeat: int) -> list[T]:
    """The order for one repeat: each mode comes first equally often, so that no mode always follows another."""
    shift = repeat % len(modes)
    return modes[shift:] + modes[:shift]
