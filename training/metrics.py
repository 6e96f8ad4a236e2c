"""What a run reports while it trains: JSON lines, and TensorBoard's events if it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dspark.training.files import append_line

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"


class Metrics:
    """Writes ``metrics.jsonl`` in the run's folder, and the same numbers under ``tensorboard/``; both go on where they were."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self._writer: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / EVENTS))

    def log(self, line: Mapping[str, Any]) -> None:
        """Report the numbers of one step; ``line`` has its number under ``step``. ConfigError if the disk refuses."""
        append_line(self.path, line)
        if self._writer is not None:
            for name, value in _numbers(line, ""):
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _numbers(line: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif name != "step":
            yield prefix + name, float(value)
