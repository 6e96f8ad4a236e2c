"""Files that are whole or absent: written beside their name, synced, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dspark.errors import ConfigError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file under another name, then give it this one; ConfigError, nothing changed, if the disk refuses."""
    making = path.with_name(f".{path.name}.making")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(making)
        with making.open("rb") as stream:
            os.fsync(stream.fileno())
        making.replace(path)
    except (OSError, SafetensorError) as error:
        making.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError | SafetensorError) -> ConfigError:
    """What to tell whoever owns the disk; safetensors has its own name for what the system refused."""
    reason = error.strerror if isinstance(error, OSError) else None
    return ConfigError(f"cannot write {path}: {reason or error}")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON document, whole or not at all."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    write_whole(path, lambda making: _put_text(making, text))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ConfigError if the file holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


def append_line(path: Path, value: Any) -> None:
    """Add one JSON line; ConfigError if the disk refuses."""
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(value) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def _put_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
