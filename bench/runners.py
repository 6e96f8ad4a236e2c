"""What decodes in a benchmark: our engine in one mode, or transformers' ``generate`` on the same weights."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dspark.bench.metrics import Timeline
from dspark.sampling import AcceptanceRule

if TYPE_CHECKING:
    import torch

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How every request of a point is sampled. ``rule`` None leaves the acceptance rule to the engine."""

    max_tokens: int
    temperature: float = 0.0
    rule: AcceptanceRule | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """Work done by an engine: forward steps, rounds that verified drafts, drafted tokens verified and accepted."""

    steps: int = 0
    drafted_rounds: int = 0
    verified: int = 0
    accepted: int = 0

    def minus(self, before: Counts) -> Counts:
        """What was done since ``before``."""
        return Counts(
            self.steps - before.steps,
            self.drafted_rounds - before.drafted_rounds,
            self.verified - before.verified,
            self.accepted - before.accepted,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """What came of some prompts, in their order."""

    timelines: tuple[Timeline, ...]
    token_ids: tuple[tuple[int, ...], ...]
    seconds: float
    counts: Counts


class Runner(Protocol):
    """Something that decodes prompts. ``engine`` is its name with its version."""

    engine: str

    def run(self, prompts: Prompts, concurrency: int, settings: Settings) -> Run:
        """Decode all prompts, ``concurrency`` at a time, each group after the one before it."""

    def close(self) -> None:
        """Give threads and memory back."""


def groups(prompts: Prompts, size: int) -> list[Prompts]:
    """Consecutive groups of at most ``size`` prompts."""
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


class TransformersRunner:
    """``model.generate`` of transformers, one prompt after the other: the baseline everybody has."""

    def __init__(self, model: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.engine = f"transformers-{importlib.metadata.version('transformers')}"
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def run(self, prompts: Prompts, concurrency: int, settings: Settings) -> Run:
        """Decode one prompt at a time; ValueError for any other concurrency."""
        if concurrency != 1:
            raise ValueError("the transformers baseline runs one prompt at a time")
        started = time.perf_counter()
        answers = [self._generate(prompt, settings) for prompt in prompts]
        seconds = time.perf_counter() - started
        timelines, tokens = zip(*answers, strict=True)
        return Run(timelines, tokens, seconds, Counts(steps=sum(map(len, tokens))))

    def _generate(self, prompt: Sequence[int], settings: Settings) -> tuple[Timeline, tuple[int, ...]]:
        import torch

        ids = torch.tensor([list(prompt)], device=self.model.device)
        clock = ArrivalClock()
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": 1.0, "top_k": 0}
        if settings.ignore_eos:
            sampling["min_new_tokens"] = settings.max_tokens
        sent = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.max_tokens, streamer=clock, **sampling
            )
        tokens = tuple(output[0, ids.shape[1] :].tolist())
        return Timeline(sent, tuple(clock.arrivals), len(tokens)), tokens

    def close(self) -> None:
        """Drop the weights."""
        del self.model


class ArrivalClock:
    """A streamer for ``generate`` that only notes when each token came; the first call carries the prompt."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """One call with the prompt, then one a token."""
        if self._has_prompt:
            self.arrivals.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to do when the answer ends: the last token has been put."""
