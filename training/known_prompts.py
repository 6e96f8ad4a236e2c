"""Make ``known_prompts.json``: digests of public evaluation sets, so that nobody trains on them unawares. No text of theirs is kept.

``python -m dspark.training.known_prompts FOLDER`` reads the sets of a folder (JSON lines, as ``evaluate --prompts`` takes them). Of
every prompt it keeps the digest of its text and those of the ``NUM_PASSAGES`` telling passages with the least digests: whoever
repeats the prompt inside another text repeats these too.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dspark.training.files import write_json
from dspark.training.prompts import KNOWN, read_prompts, telling_passages
from dspark.training.shards import text_digest

NUM_PASSAGES = 2


def write_known(folder: Path, path: Path) -> None:
    """Write the digests of all sets of ``folder`` to ``path``; ConfigError names a file that cannot be read."""
    sets = {file.stem: read_prompts(file) for file in sorted(folder.glob("*.jsonl"))}
    prompts = [prompt for texts in sets.values() for prompt in texts]
    passages = {digest for digests in telling_passages(prompts) for digest in sorted(digests)[:NUM_PASSAGES]}
    digests = {"prompts": _packed(map(text_digest, prompts)), "passages": _packed(passages)}
    write_json(path, {"sets": {name: len(texts) for name, texts in sets.items()}, "digests": digests})


def _packed(digests: Iterable[int]) -> str:
    """Little-endian int64, rising, each once, in base64."""
    return base64.b64encode(np.unique(np.array(list(digests), "<i8")).tobytes()).decode()


if __name__ == "__main__":
    write_known(Path(sys.argv[1]), KNOWN)
