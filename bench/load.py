"""Requests sent to an OpenAI-compatible server: a fixed number of streams, or arrivals at a rate; and what came of them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark.bench.http_client import Answer, send
from dspark.bench.metrics import LoadSummary, Spread, accepted_length, poisson_arrivals, summarize
from dspark.bench.traffic import Job
from dspark.errors import ConfigError

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive: ``concurrency`` streams at all times, or at ``rate_per_s`` whatever is still running."""

    concurrency: int | None = None
    rate_per_s: float | None = None

    def __str__(self) -> str:
        return f"c={self.concurrency}" if self.concurrency else f"{self.rate_per_s:.3g}/s"

    def default_requests(self) -> int:
        """Enough for a median at one stream, four rounds at more, half a minute at a rate."""
        if self.concurrency:
            return 8 if self.concurrency == 1 else 4 * self.concurrency
        return max(8, round(30 * (self.rate_per_s or 0)))


@dataclass(frozen=True, slots=True)
class Measured:
    """Jobs and their answers, in one order, and the seconds from the first request to the last byte."""

    jobs: tuple[Job, ...]
    answers: tuple[Answer, ...]
    seconds: float

    @property
    def errors(self) -> Counter[str]:
        """How often each error came."""
        return Counter(answer.error for answer in self.answers if answer.error is not None)

    @property
    def classes(self) -> list[str]:
        """Names of the service classes that had requests."""
        return sorted({job.class_name for job in self.jobs if job.class_name})

    @property
    def acceptance(self) -> float | None:
        """Accepted length over all answers by what the server reports; None if it reports nothing."""
        told = [(answer.accepted, answer.drafted_rounds) for answer in self.answers if answer.drafted_rounds is not None]
        if not told:
            return None
        return round(accepted_length(sum(accepted or 0 for accepted, _ in told), sum(rounds for _, rounds in told)), 3)

    def summary(self, class_name: str | None = None) -> LoadSummary:
        """All requests, or those of one class, each against its own limits."""
        pairs = [(job, answer) for job, answer in zip(self.jobs, self.answers, strict=True) if class_name in (None, job.class_name)]
        answered = [(answer.timeline, job.limits) for job, answer in pairs if answer.timeline is not None]
        return summarize(answered, len(pairs) - len(answered), self.seconds)

    def as_record(self) -> dict[str, Any]:
        """The summary as flat JSON fields, and the same for each class under ``classes``."""
        record = as_record(self.summary()) | {"accepted_length": self.acceptance}
        limits = {job.class_name: dataclasses.asdict(job.limits) for job in self.jobs}
        return record | {"classes": {name: as_record(self.summary(name)) | {"limits": limits[name]} for name in self.classes}}


def connect(url: str, api_key: str | None, timeout_s: float) -> httpx.AsyncClient:
    """A client for a server's base URL, with or without /v1; every stream gets its own connection."""
    import httpx

    base = url.rstrip("/")
    base = base if base.endswith("/v1") else base + "/v1"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(timeout_s, connect=10.0)
    return httpx.AsyncClient(base_url=base + "/", headers=headers, limits=limits, timeout=timeout, trust_env=False)


async def find_model(client: httpx.AsyncClient) -> str:
    """The only or first model that the server lists; ConfigError if it cannot be asked."""
    import httpx

    try:
        response = await client.get("models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{client.base_url} does not list a model ({error}); is it the right --url? otherwise name --model") from error


async def run_load(client: httpx.AsyncClient, jobs: Sequence[Job], load: Load, seed: int) -> Measured:
    """Send all jobs under a load, in their order, and wait for their answers."""
    start = time.perf_counter()
    if load.concurrency:
        answers = await _at_concurrency(client, jobs, load.concurrency)
    else:
        due = poisson_arrivals(load.rate_per_s or 0.0, len(jobs), seed)
        answers = list(await asyncio.gather(*(_when_due(client, job, start + at) for job, at in zip(jobs, due, strict=True))))
    return Measured(tuple(jobs), tuple(answers), time.perf_counter() - start)


async def _at_concurrency(client: httpx.AsyncClient, jobs: Sequence[Job], concurrency: int) -> list[Answer]:
    waiting = iter(enumerate(jobs))
    answers: dict[int, Answer] = {}

    async def stream() -> None:
        for place, job in waiting:
            answers[place] = await send(client, job.ask, job.prompt)

    await asyncio.gather(*(stream() for _ in range(concurrency)))
    return [answers[place] for place in range(len(jobs))]


async def _when_due(client: httpx.AsyncClient, job: Job, due_s: float) -> Answer:
    """Send at a moment; the time counts from when it was due, so a late client does not flatter the server."""
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    return await send(client, job.ask, job.prompt, due_s)


def as_record(summary: LoadSummary) -> dict[str, Any]:
    """The summary as flat JSON fields: ttft_p50_ms, tpot_p90_ms, …"""
    record: dict[str, Any] = {}
    for field in dataclasses.fields(summary):
        value = getattr(summary, field.name)
        if isinstance(value, Spread):
            quantity = field.name.removesuffix("_ms")
            record |= {f"{quantity}_{name}_ms": percentile for name, percentile in dataclasses.asdict(value).items()}
        else:
            record[field.name] = value
    return record
