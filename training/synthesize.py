"""Make training data: prompts, and the target's own answers to them, wave by wave, one shard a wave.

A wave is a function of the settings and its number alone, and its shard appears whole, so a run that was stopped goes on
with the next wave.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm import tqdm

from dspark.config import EngineConfig
from dspark.errors import ConfigError
from dspark.training.config import SynthesizeConfig, TrainConfig
from dspark.training.dense import DenseGenerator
from dspark.training.prompts import BUILT_IN, Excluded, Template, draw_openings, read_prompts, usable_prompts
from dspark.training.served import ServedGenerator
from dspark.training.shards import Sample, check_manifest, read_corpus, shard_path, text_digest, update_manifest, write_shard
from dspark.training.target import fingerprint, load_target, peak_memory, template_digest
from dspark.workers.verifier.targets import Target

Progress = Callable[[str], None]


class Generator(Protocol):
    """Whoever answers prompts."""

    def generate(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], max_tokens: int, stop_ids: Sequence[int], seed: int
    ) -> list[list[int]]:
        """Answers of at most ``max_tokens`` tokens, the stop token included where one came."""


@dataclass(frozen=True, slots=True)
class Wave:
    """One shard's work."""

    index: int
    num_prompts: int
    given: Sequence[str] | None  # None: the target writes them


def synthesize(config: TrainConfig, progress: Progress, max_seconds: float | None = None) -> bool:
    """Fill ``config.data``; True when all shards are there, False when ``max_seconds`` ended it before, with what is there whole.

    A wave is not interrupted, and every call makes one at least. ConfigError names what is wrong with the input.
    """
    begin = time.monotonic()
    settings = config.synthesize
    excluded = Excluded.of((BUILT_IN, *settings.exclude))
    given = _given_prompts(settings, excluded)
    target, tokenizer = load_target(config)
    template = Template.of(tokenizer, target.eos_ids)
    check_manifest(config.data, _identity(config, target, tokenizer))
    maker = _Maker(settings, target, template, _generator(config, target, tokenizer), excluded)
    waves = _waves(settings, given)
    done = [wave for wave in waves if shard_path(config.data, wave.index).exists()]
    if done:
        maker.seen.update(read_corpus(config.data).digests.tolist())
        progress(f"{len(done)} of {len(waves)} shards are there already")
    has_made = False
    with tqdm(total=sum(wave.num_prompts for wave in waves), initial=sum(w.num_prompts for w in done), unit=" prompts") as bar:
        for wave in waves:
            if wave in done:
                continue
            if has_made and max_seconds is not None and time.monotonic() - begin > max_seconds:
                progress(f"stopped after {max_seconds:.0f} s; run again to go on")
                break
            write_shard(config.data, wave.index, maker.make(wave), target.vocab_size)
            has_made = True
            bar.update(wave.num_prompts)
    _count(config, progress, f"{time.monotonic() - begin:.0f} s{peak_memory(target.device)}")
    return all(shard_path(config.data, wave.index).exists() for wave in waves)


def _given_prompts(settings: SynthesizeConfig, excluded: Excluded) -> list[str] | None:
    if settings.prompts is None:
        return None
    prompts = read_prompts(settings.prompts)
    excluded.refuse(prompts)
    kept = usable_prompts(prompts, settings, set(), excluded)[: settings.num_prompts]
    if not kept:
        raise ConfigError(f"synthesize.prompts: none of {settings.prompts} has {settings.min_prompt_chars} characters (min_prompt_chars)")
    return kept


def _waves(settings: SynthesizeConfig, given: list[str] | None) -> list[Wave]:
    total = settings.num_prompts if given is None else len(given)
    waves = []
    for index, first in enumerate(range(0, total, settings.wave_size)):
        count = min(settings.wave_size, total - first)
        waves.append(Wave(index, count, None if given is None else given[first : first + count]))
    return waves


def _generator(config: TrainConfig, target: Target, tokenizer: Any) -> Generator:
    settings = config.synthesize
    truncates = settings.top_p < 1 or settings.top_k > 0
    kind = settings.generator
    if kind == "auto":
        kind = "dense" if target.device.type == "cuda" and not truncates else "engine"
    if kind == "dense":
        if truncates:
            raise ConfigError("synthesize.generator: dense draws from whole laws only; leave top_p and top_k out, or use engine")
        return DenseGenerator(target)
    engine = EngineConfig(
        drafter="none",
        speculation="off",
        max_num_seqs=min(settings.wave_size, 512),
        max_queued=settings.wave_size,
        max_model_len=min(target.max_position, settings.max_prompt_tokens + settings.max_tokens + 64),
        max_batch_tokens=2048,
    )
    return ServedGenerator(target, tokenizer, engine, settings.top_p, settings.top_k)


def _identity(config: TrainConfig, target: Target, tokenizer: Any) -> dict[str, Any]:
    """What all shards of a folder must share."""
    sampling = config.synthesize.model_dump(mode="json", exclude={"num_prompts", "generator", "exclude"})
    return {"model": fingerprint(target), "template": template_digest(tokenizer), "vocab_size": target.vocab_size, "settings": sampling}


def _count(config: TrainConfig, progress: Progress, took: str) -> None:
    corpus = read_corpus(config.data)
    num_answer = len(corpus.tokens) - int(corpus.prompt_lens.sum())
    counts = {"num_samples": len(corpus), "num_tokens": len(corpus.tokens), "num_answer_tokens": num_answer}
    update_manifest(config.data, {**counts, "num_shards": len(list(config.data.glob("shard-*.safetensors")))})
    progress(f"{len(corpus)} samples, {num_answer} answer tokens in {config.data} ({took})")


@dataclass(slots=True)
class _Maker:
    """Turns a wave into samples. ``seen`` are digests of prompts that may not come again."""

    settings: SynthesizeConfig
    target: Target
    template: Template
    generator: Generator
    excluded: Excluded
    seen: set[int] = field(default_factory=set)

    def make(self, wave: Wave) -> list[Sample]:
        seed = self.settings.seed * 1_000_003 + wave.index
        draws = random.Random(seed)
        texts = list(wave.given) if wave.given is not None else self._write_prompts(wave.num_prompts, draws, seed)
        ids = self.template.answer_prompts(texts)
        kept = [(text, prompt) for text, prompt in zip(texts, ids, strict=True) if len(prompt) <= self.settings.max_prompt_tokens]
        temperatures = [draws.choice(self.settings.temperatures) for _ in kept]
        prompts = [prompt for _, prompt in kept]
        answers = self.generator.generate(prompts, temperatures, self.settings.max_tokens, self.template.stop_ids, seed)
        return [
            Sample(prompt, answer, temperature, text_digest(text))
            for (text, prompt), answer, temperature in zip(kept, answers, temperatures, strict=True)
            if len(answer) >= self.settings.min_tokens
        ]

    def _write_prompts(self, count: int, draws: random.Random, seed: int) -> list[str]:
        """User turns by the target itself; those it did not end, repeated or excluded ones are dropped."""
        openings = draw_openings(self.settings, count, draws)
        prompts = self.template.turn_prompts([text for text, _ in openings])
        heat = [self.settings.prompt_temperature] * count
        stops = self.template.stop_ids
        turns = self.generator.generate(prompts, heat, self.settings.max_prompt_tokens, stops, seed + 500_009)
        bodies = self.template.tokenizer.batch_decode(turns, skip_special_tokens=True)
        texts = [
            opening + body.rstrip() + kind.ending if turn and turn[-1] in stops else None
            for (opening, kind), turn, body in zip(openings, turns, bodies, strict=True)
        ]
        return usable_prompts(texts, self.settings, self.seen, self.excluded)
