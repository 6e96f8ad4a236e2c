"""Where prompts come from: JSON lines, or the target itself, continuing an empty or begun user turn.

A turn becomes token ids by the model's own chat template, rendered once around a mark and then filled: a hundred thousand
prompts need one call of the tokenizer. The first ones are compared with the template's own rendering.
"""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dspark
from dspark.errors import BadRequest, ConfigError
from dspark.prompting import render_chat
from dspark.training.config import Opening, SynthesizeConfig
from dspark.training.files import read_json
from dspark.training.shards import text_digest

BUILT_IN = Path(dspark.__file__).parent / "bench" / "prompts"  # what the project measures with; never trained on
KNOWN = Path(__file__).parent / "known_prompts.json"  # digests of public evaluation sets, made by known_prompts.py
MARK = "MARK\N{REPLACEMENT CHARACTER}MARK"
NUM_CHECKED = 4
PASSAGE_WORDS = 13
MAX_SHARED = 2


@dataclass(frozen=True, slots=True)
class Template:
    """The chat template around one user turn. ``stop_ids`` end a turn, whoever's it is."""

    tokenizer: Any
    before: str
    after: str
    stop_ids: tuple[int, ...]

    @staticmethod
    def of(tokenizer: Any, eos_ids: Sequence[int]) -> Template:
        """Read the template of a model; ConfigError if it has none, or changes what a user says."""
        if tokenizer is None or not tokenizer.chat_template:
            raise ConfigError("the target has no chat template, so it cannot answer prompts; training data needs one")
        text = str(tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True))
        before, mark, after = text.partition(MARK)
        if not mark or MARK in after:
            raise ConfigError("the target's chat template does not show a user's message exactly once")
        special = [token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in tokenizer.all_special_ids]
        return Template(tokenizer, before, after, tuple(dict.fromkeys([*eos_ids, *special[:1]])))

    def answer_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of conversations with one user turn, ready for the answer; ConfigError if the template does otherwise."""
        if not texts:
            return []
        ids = self._tokenise([f"{self.before}{text.strip()}{self.after}" for text in texts])
        for text, own in list(zip(texts, ids, strict=True))[:NUM_CHECKED]:
            try:
                expected = render_chat(self.tokenizer, [{"role": "user", "content": text.strip()}])
            except BadRequest as error:
                raise ConfigError(f"the target's chat template refused a prompt: {error}") from error
            if own != expected:
                raise ConfigError("the target's chat template does more with a message than to put text around it")
        return ids

    def turn_prompts(self, openings: Sequence[str]) -> list[list[int]]:
        """Token ids that end inside a user turn which begins so."""
        return self._tokenise([self.before + opening for opening in openings])

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found


def read_prompts(path: Path) -> list[str]:
    """First turns of a JSON lines file, or of all such files of a folder; ConfigError names the file and line that is wrong."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    prompts: list[str] = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts {file} cannot be read: {error}") from error
        prompts.extend(_first_turn(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line.strip())
    if not prompts:
        raise ConfigError(f"{path} has no prompts")
    return prompts


def _first_turn(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    turns = entry.get("turns") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str) or not turns[0].strip():
        raise ConfigError(f'{where}: expected {{"turns": ["…"]}} with a first turn that is not empty')
    return turns[0]


@dataclass(frozen=True, slots=True)
class Excluded:
    """Evaluation prompts, which may not be trained on: digests of their texts, and of passages that tell them.

    A text is one of them if it is the same but for case and spacing, or repeats ``PASSAGE_WORDS`` words in a row that at most
    ``MAX_SHARED`` of them share: what more share is the set's instructions.
    """

    digests: frozenset[int]
    passages: frozenset[int]

    @staticmethod
    def of(folders: Sequence[Path]) -> Excluded:
        """The prompts of all folders, and of the public sets; ConfigError if a folder is not there or holds none."""
        known = {name: base64.b64decode(text) for name, text in read_json(KNOWN)["digests"].items()}
        digests, passages = (set(np.frombuffer(known[name], "<i8").tolist()) for name in ("prompts", "passages"))
        prompts: list[str] = []
        for folder in folders:
            if not folder.exists():
                raise ConfigError(f"synthesize.exclude: {folder} does not exist")
            prompts += read_prompts(folder)
        digests.update(map(text_digest, prompts))
        return Excluded(frozenset(digests), frozenset(passages.union(*telling_passages(prompts))))

    def has(self, text: str) -> bool:
        """Whether ``text`` is one of them."""
        return text_digest(text) in self.digests or not self.passages.isdisjoint(passage_digests(text))

    def refuse(self, prompts: Sequence[str]) -> None:
        """ConfigError if one of ``prompts`` is one of them."""
        for number, prompt in enumerate(prompts, start=1):
            if self.has(prompt):
                raise ConfigError(
                    f"synthesize.prompts: prompt {number} is an evaluation prompt or repeats a passage of one,"
                    f" which may not be trained on: {prompt.strip()[:80]!r}"
                )


def telling_passages(prompts: Sequence[str]) -> list[set[int]]:
    """Digests of every prompt's passages without those that more than ``MAX_SHARED`` of the prompts have."""
    found = [passage_digests(prompt) for prompt in prompts]
    counts = Counter(digest for digests in found for digest in digests)
    return [{digest for digest in digests if counts[digest] <= MAX_SHARED} for digests in found]


def passage_digests(text: str) -> set[int]:
    """Digests of all ``PASSAGE_WORDS`` words in a row."""
    words = text.split()
    return {text_digest(" ".join(words[i : i + PASSAGE_WORDS])) for i in range(len(words) - PASSAGE_WORDS + 1)}


def draw_openings(config: SynthesizeConfig, count: int, draws: random.Random) -> list[tuple[str, Opening]]:
    """How each of ``count`` self-written prompts begins."""
    kinds = draws.choices(config.openings, [opening.weight for opening in config.openings], k=count)
    return [(draws.choice(kind.texts), kind) for kind in kinds]


def usable_prompts(texts: Sequence[str | None], config: SynthesizeConfig, seen: set[int], excluded: Excluded) -> list[str]:
    """The texts that are new, long enough and none of the evaluation's; ``seen`` learns them."""
    kept = []
    for text in texts:
        if text is None or len(text.strip()) < config.min_prompt_chars or excluded.has(text):
            continue
        digest = text_digest(text)
        if digest not in seen:
            seen.add(digest)
            kept.append(text.strip())
    return kept
