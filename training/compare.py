"""Drafters of different kinds on the same data for the same time, measured side by side: a table that says what a method gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dspark.training.config import DrafterConfig, TrainConfig
from dspark.training.evaluate import measure
from dspark.training.shards import has_samples
from dspark.training.synthesize import synthesize
from dspark.training.target import release_memory
from dspark.training.trainer import train

Progress = Callable[[str], None]
RESULTS = "comparison.json"
UNBOUNDED_EPOCHS = 10_000.0  # time ends the schedule
NOT_FOR = {"dspark": (), "dflash": ("head", "confidence", "style"), "eagle3": ("head", "confidence", "style", "num_layers", "window")}


def compare(config: TrainConfig, progress: Progress, drafters: Sequence[str] = (), others: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Make the data if they are not there, train every kind, and measure ``drafters``, all kinds and n-gram side by side.

    Whatever was done before is not done again. Writes ``comparison.json`` and ``comparison.md``, and reports the tables, with the
    results in the files ``others`` in them.
    """
    seconds = config.compare.synthesize_seconds
    if seconds is None or not has_samples(config.data):
        synthesize(config, progress, seconds)
    runs = [run_of(config, kind) for kind in config.compare.kinds]
    for kind, run in zip(config.compare.kinds, runs, strict=True):
        if not (run.drafter_folder / "config.json").is_file():
            progress(f"training {kind}")
            train(run, progress)
            release_memory()
    names = [*drafters, *(str(run.drafter_folder) for run in runs), "ngram"]
    return measure(config, names, config.out / RESULTS, progress, others)


def run_of(config: TrainConfig, kind: str) -> TrainConfig:
    """The run that trains a drafter of ``kind`` on the data of ``config``, for the time that all get."""
    given = config.drafter.model_dump(exclude_unset=True, exclude={"kind", *NOT_FOR[kind]})
    trainer = config.trainer
    if config.compare.train_seconds is not None:
        trainer = trainer.model_copy(update={"train_seconds": config.compare.train_seconds, "epochs": UNBOUNDED_EPOCHS, "max_steps": None})
    out: Path = config.out / "compare" / kind
    out.mkdir(parents=True, exist_ok=True)
    drafter = DrafterConfig.model_validate(given | {"kind": kind})
    return config.model_copy(update={"out": out, "data_folder": config.data, "drafter": drafter, "trainer": trainer})
