"""Drafter folders on disk: config.json beside safetensors, one file or an indexed set of shards. No other format is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.errors import ConfigError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAMPLES, SAMPLE_BYTES = 64, 16384  # a checkpoint of gigabytes is named in milliseconds


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; ConfigError if there is no such folder or file, or it holds no JSON object."""
    if not folder.is_dir():
        raise ConfigError(f"drafter: {folder} is no folder")
    return _read_json(folder / CONFIG_FILE)


def read_tensors(folder: Path, dtype: torch.dtype, device: torch.device, wanted: Container[str] | None = None) -> dict[str, Tensor]:
    """The folder's ``wanted`` tensors (None: all) by name, floating ones in ``dtype``; ConfigError if a file is missing or damaged."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            tensors.update(_read_file(path, dtype, device, wanted))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"drafter: {path} cannot be read: {error}") from error
    return tensors


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors, creating the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors of the folder, without reading them."""
    names: set[str] = set()
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"drafter: {path} cannot be read: {error}") from error
    return names


def fingerprint(folder: Path) -> str:
    """Names the checkpoint: equal fingerprints mean the same configuration and, by ``SAMPLES`` places of every file, the same weights."""
    digest = hashlib.sha256(json.dumps(read_config(folder), sort_keys=True).encode())
    for path in _weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as stream:
            for place in range(SAMPLES):
                stream.seek(place * max(0, size - SAMPLE_BYTES) // max(1, SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _read_file(path: Path, dtype: torch.dtype, device: torch.device, wanted: Container[str] | None) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict: it has no iterator)
            if wanted is not None and name not in wanted:
                continue
            tensor = file.get_tensor(name)
            yield name, tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).is_file():
        index = _read_json(folder / INDEX_FILE)
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ConfigError(f"drafter: {folder / INDEX_FILE} has no weight_map")
        paths = [folder / name for name in sorted(set(shards.values()))]
        missing = [path.name for path in paths if path.parent != folder or not path.is_file()]
        if missing:
            raise ConfigError(f"drafter: {folder} lacks the weight files {', '.join(missing)} that {INDEX_FILE} names")
        return paths
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    hint = f" ({others[0]} is not read: only safetensors are)" if others else ""
    raise ConfigError(f"drafter: {folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"drafter: {path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"drafter: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"drafter: {path} must hold a JSON object")
    return content
