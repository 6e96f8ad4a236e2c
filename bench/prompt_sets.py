"""Prompt sets: NAME.jsonl in a folder, one ``{"turns": ["…"]}`` a line. The default folder is ours: chat, code, math."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from dspark.errors import ConfigError

T = TypeVar("T")

DEFAULT_FOLDER = Path(__file__).resolve().parent / "prompts"
DEFAULT_SETS = ("chat", "code", "math")


def load_set(folder: Path, name: str) -> list[str]:
    """The first turn of every prompt of a set, in file order; ConfigError names a missing set or a bad line."""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl"))) or "none"
        raise ConfigError(f"no prompt set {name!r} in {folder}; it has: {found}")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            prompts.append(_first_turn(line, f"{path}:{number}"))
    if not prompts:
        raise ConfigError(f"{path} has no prompts")
    return prompts


def _first_turn(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    turns = entry.get("turns") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str) or not turns[0]:
        raise ConfigError(f'{where}: expected {{"turns": ["…"]}}')
    return turns[0]


def take(prompts: Sequence[T], count: int) -> list[T]:
    """``count`` prompts, from the start again when there are fewer."""
    return [prompts[i % len(prompts)] for i in range(count)]
