"""How often the fault tests do it (FAULT_REPEATS in the environment, 20 otherwise), and what came of it, for the table at the end."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

FAULT_REPEATS = int(os.environ.get("FAULT_REPEATS", "20"))


@dataclass
class Tally:
    """One fault of one component: how often it was tried, how often all went well, and how long that took."""

    tried: int = 0
    passed: int = 0
    pauses_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)


@dataclass
class Recovery:
    """One repeat. ``pause_s``: the longest time that a stream waited for its next tokens; ``whole_s``: until all was as before.

    None: nobody measured it.
    """

    pause_s: float | None = None
    whole_s: float | None = None


TALLIES: dict[tuple[str, str], Tally] = {}


@contextmanager
def counted(component: str, fault: str) -> Iterator[Recovery]:
    """Counts a repeat, and its times if nothing is raised inside."""
    tally, recovery = TALLIES.setdefault((component, fault), Tally()), Recovery()
    tally.tried += 1
    yield recovery
    tally.passed += 1
    tally.pauses_s += [] if recovery.pause_s is None else [recovery.pause_s]
    tally.whole_s += [] if recovery.whole_s is None else [recovery.whole_s]


def table() -> list[str]:
    """All repeats so far as a Markdown table."""
    lines = ["| component | fault | passed | longest pause of a stream, s: median, worst | whole again, s: median, worst |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for (component, fault), tally in TALLIES.items():
        passed = f"{tally.passed} of {tally.tried}"
        lines.append(f"| {component} | {fault} | {passed} | {_times(tally.pauses_s)} | {_times(tally.whole_s)} |")
    return lines


def _times(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f}, {max(seconds):.2f}" if seconds else "–"
