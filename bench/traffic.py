"""What arrives: prompts of several sets in a random order, requests of several service classes. Pure functions of a seed."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from dspark.bench.http_client import Ask
from dspark.bench.metrics import Limits
from dspark.errors import ConfigError

NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """Requests that were promised the same. ``share`` of all requests, relative to the shares of the other classes."""

    name: str
    limits: Limits
    share: float = 1.0

    @staticmethod
    def parse(text: str) -> ServiceClass:
        """Read ``interactive:ttft_ms=500,tpot_ms=50,share=0.5``; ConfigError names what is wrong."""
        name, _, rest = text.partition(":")
        values: dict[str, float] = {}
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            if key not in ("ttft_ms", "tpot_ms", "share") or key in values:
                raise ConfigError(f"service class {text!r}: {key!r} must be ttft_ms, tpot_ms or share, each once")
            try:
                values[key] = float(value)
            except ValueError:
                raise ConfigError(f"service class {text!r}: {key} must be a number, not {value!r}") from None
            if not 0 < values[key] < float("inf"):
                raise ConfigError(f"service class {text!r}: {key} must be over 0, not {value}")
        if not name or not {"ttft_ms", "tpot_ms"} & set(values):
            raise ConfigError(f"service class {text!r}: use NAME:ttft_ms=MS,tpot_ms=MS,share=S with at least one of the two budgets")
        return ServiceClass(name, Limits(values.get("ttft_ms"), values.get("tpot_ms")), values.get("share", 1.0))

    def __str__(self) -> str:
        limits = [f"{key}={ms:g}" for key, ms in (("ttft_ms", self.limits.ttft_ms), ("tpot_ms", self.limits.tpot_ms)) if ms is not None]
        return f"{self.name}:{','.join(limits)},share={self.share:g}"


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send, and what it should keep to count as good; ``class_name`` empty: of no class."""

    ask: Ask
    prompt: str
    limits: Limits = NO_LIMITS
    class_name: str = ""


def mix(sets: Sequence[Sequence[str]], count: int, seed: int) -> list[str]:
    """``count`` prompts, each of a set drawn at random; the prompts of a set come in their order, again and again."""
    draw = random.Random(f"sets {seed}")
    following = [itertools.cycle(prompts) for prompts in sets]
    return [next(draw.choice(following)) for _ in range(count)]


def assign(ask: Ask, prompts: Sequence[str], classes: Sequence[ServiceClass], seed: int, tells_budgets: bool) -> list[Job]:
    """A job for each prompt, its class drawn by the shares. ``tells_budgets``: the server learns class and budget."""
    draw = random.Random(f"classes {seed}")
    chosen = draw.choices(classes, [one.share for one in classes], k=len(prompts))
    return [
        Job(
            dataclasses.replace(ask, service_class=one.name, budget=one.limits) if tells_budgets else ask,
            prompt,
            one.limits,
            one.name,
        )
        for prompt, one in zip(prompts, chosen, strict=True)
    ]
