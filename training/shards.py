"""Answers on disk: shards of token ids and a manifest that says whose they are.

A shard is one safetensors file of n samples::

    tokens       [T]      uint16, or uint32 for vocabularies over 65,536: prompt, then answer, sample by sample
    starts       [n + 1]  int64    sample i owns tokens starts[i] .. starts[i + 1]
    prompt_lens  [n]      int32
    temperatures [n]      float32  of the answer; 0 is greedy
    digests      [n]      int64    of the prompt's text, to find repeated ones

A shard appears by a rename, so what is there is whole; the manifest is written after it and only adds up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dspark.errors import ConfigError
from dspark.training.files import read_json, write_json, write_whole

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and its answer."""

    prompt: Sequence[int]
    answer: Sequence[int]
    temperature: float
    digest: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """All samples of a folder in memory; the arrays are as in a shard."""

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    prompt_lens: NDArray[np.int32]
    temperatures: NDArray[np.float32]
    digests: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.prompt_lens)

    def sample(self, index: int) -> NDArray[Any]:
        """Tokens of one sample."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def text_digest(text: str) -> int:
    """A number that equal texts share, whatever their case and spacing."""
    normalised = " ".join(text.split()).casefold()
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest(), "little", signed=True)


def write_shard(folder: Path, index: int, samples: Sequence[Sample], vocab_size: int) -> None:
    """Write one shard, whole or not at all."""
    rows = [np.concatenate([sample.prompt, sample.answer]).astype(np.uint32) for sample in samples]
    tokens = np.concatenate(rows) if rows else np.empty(0, np.uint32)
    tensors = {
        "tokens": tokens.astype(np.uint16) if vocab_size <= 2**16 else tokens,
        "starts": np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        "prompt_lens": np.array([len(sample.prompt) for sample in samples], np.int32),
        "temperatures": np.array([sample.temperature for sample in samples], np.float32),
        "digests": np.array([sample.digest for sample in samples], np.int64),
    }
    write_whole(shard_path(folder, index), lambda path: save_file(tensors, path))


def read_corpus(folder: Path) -> Corpus:
    """All shards of a folder; ConfigError if there are none, or one is damaged."""
    paths = sorted(folder.glob("shard-*.safetensors"))
    parts = []
    for path in paths:
        try:
            parts.append(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); delete it and synthesize again") from error
    if sum(len(part["prompt_lens"]) for part in parts) == 0:
        raise ConfigError(f"{folder} holds no samples; run dspark train synthesize first")
    offsets = np.cumsum([0] + [len(part["tokens"]) for part in parts])
    starts = [part["starts"][:-1] + offset for part, offset in zip(parts, offsets, strict=False)]
    return Corpus(
        tokens=np.concatenate([part["tokens"] for part in parts]),
        starts=np.concatenate([*starts, [offsets[-1]]]).astype(np.int64),
        prompt_lens=np.concatenate([part["prompt_lens"] for part in parts]),
        temperatures=np.concatenate([part["temperatures"] for part in parts]),
        digests=np.concatenate([part["digests"] for part in parts]),
    )


def has_samples(folder: Path) -> bool:
    """Whether a folder has a whole shard."""
    return any(folder.glob("shard-*.safetensors"))


def check_manifest(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to mix samples of another target or other settings; ConfigError names what differs."""
    path = folder / MANIFEST
    if not path.exists():
        write_json(path, {**identity, "num_samples": 0, "num_tokens": 0, "num_shards": 0})
        return
    found = read_json(path)
    wrong = [f"{key} was {found.get(key)!r:.80}, is {value!r:.80}" for key, value in identity.items() if found.get(key) != value]
    if wrong:
        raise ConfigError(f"{folder} holds answers made otherwise: {'; '.join(wrong)}; choose another folder or delete it")


def update_manifest(folder: Path, counts: dict[str, int]) -> None:
    """Put the present counts into the manifest."""
    write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), **counts})
