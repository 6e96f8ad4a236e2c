"""Load on an OpenAI-compatible server: a fixed number of streams, or arrivals at a rate."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dspark.bench.http_client import Answer, Ask, send
from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.metrics import Limits, LoadSummary, Spread, accepted_length, poisson_arrivals, summarize
from dspark.bench.prompt_sets import load_set, take
from dspark.bench.tables import Column, Table
from dspark.errors import ConfigError

if TYPE_CHECKING:
    import httpx

COLUMNS = [
    Column("set", 8, is_text=True),
    Column("load", 8, is_text=True),
    Column("ok", 5),
    Column("err", 4),
    Column("tok/s", 8),
    Column("TTFT p50/p90/p99 ms", 22),
    Column("TPOT p50/p90/p99 ms", 20),
    Column("ITL p50/p99 ms", 15),
    Column("tok/chunk", 9),
    Column("acc.len", 7),
    Column("good/s", 7),
    Column("good", 5),
]


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive: ``concurrency`` streams at all times, or at ``rate_per_s`` whatever is still running."""

    concurrency: int | None = None
    rate_per_s: float | None = None

    def __str__(self) -> str:
        return f"c={self.concurrency}" if self.concurrency else f"{self.rate_per_s:g}/s"

    def default_requests(self) -> int:
        """Enough for a median at one stream, four rounds at more, half a minute at a rate."""
        if self.concurrency:
            return 8 if self.concurrency == 1 else 4 * self.concurrency
        return max(8, round(30 * (self.rate_per_s or 0)))


@dataclass(frozen=True, slots=True)
class OnlinePlan:
    """A whole run of ``dspark bench online``."""

    url: str
    ask: Ask
    api_key: str | None
    folder: Path
    sets: tuple[str, ...]
    loads: tuple[Load, ...]
    requests: int | None
    limits: Limits
    seed: int
    timeout_s: float


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


async def run_load(client: httpx.AsyncClient, ask: Ask, prompts: Sequence[str], load: Load, seed: int) -> tuple[list[Answer], float]:
    """Answers to all prompts under a load, and the seconds from the first request to the last byte."""
    start = time.perf_counter()
    if load.concurrency:
        answers = await _at_concurrency(client, ask, prompts, load.concurrency)
    else:
        due = poisson_arrivals(load.rate_per_s or 0.0, len(prompts), seed)
        answers = list(await asyncio.gather(*(_when_due(client, ask, prompt, start + at) for prompt, at in zip(prompts, due, strict=True))))
    return answers, time.perf_counter() - start


async def _at_concurrency(client: httpx.AsyncClient, ask: Ask, prompts: Sequence[str], concurrency: int) -> list[Answer]:
    waiting = iter(prompts)
    answers: list[Answer] = []

    async def stream() -> None:
        for prompt in waiting:
            answers.append(await send(client, ask, prompt))

    await asyncio.gather(*(stream() for _ in range(concurrency)))
    return answers


async def _when_due(client: httpx.AsyncClient, ask: Ask, prompt: str, due_s: float) -> Answer:
    """Send at a moment; the time counts from when it was due, so a late client does not flatter the server."""
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    return await send(client, ask, prompt, due_s)


def summarize_answers(answers: Sequence[Answer], seconds: float, limits: Limits) -> tuple[LoadSummary, Counter[str]]:
    """The summary, and how often each error came."""
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    timelines = [answer.timeline for answer in answers if answer.timeline is not None]
    return summarize(timelines, errors.total(), seconds, limits), errors


def reported_acceptance(answers: Sequence[Answer]) -> float | None:
    """Accepted length over all answers by what the server reports; None if it reports nothing."""
    told = [(answer.accepted, answer.drafted_rounds) for answer in answers if answer.drafted_rounds is not None]
    if not told:
        return None
    return round(accepted_length(sum(accepted or 0 for accepted, _ in told), sum(rounds for _, rounds in told)), 3)


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


async def run_online(plan: OnlinePlan, out: TextIO | None) -> int:
    """Measure every set under every load, print rows, write JSON lines; returns the number of failed requests."""
    async with connect(plan.url, plan.api_key, plan.timeout_s) as client:
        ask = plan.ask if plan.ask.model else dataclasses.replace(plan.ask, model=await find_model(client))
        table, failed = Table(COLUMNS), 0
        for name, load in _points(plan):
            prompts = load_set(plan.folder, name)
            warm = await send(client, dataclasses.replace(ask, max_tokens=4), prompts[0])
            if warm.error:
                raise ConfigError(f"{plan.url} refuses a first request: {warm.error}")
            answers, seconds = await run_load(client, ask, take(prompts, plan.requests or load.default_requests()), load, plan.seed)
            summary, errors = summarize_answers(answers, seconds, plan.limits)
            failed += summary.errors
            acceptance = reported_acceptance(answers)
            _print_row(table, name, load, summary, acceptance)
            for error, count in errors.most_common():
                print(f"    {count} x {error}")
            if out is not None:
                record = _record(plan, ask, name, load) | as_record(summary) | {"accepted_length": acceptance}
                print(json.dumps(record), file=out, flush=True)
    return failed


def _points(plan: OnlinePlan) -> Iterator[tuple[str, Load]]:
    for name in plan.sets:
        for load in plan.loads:
            yield name, load


def _record(plan: OnlinePlan, ask: Ask, name: str, load: Load) -> dict[str, Any]:
    return {
        "kind": "online",
        "url": plan.url,
        "model": ask.model,
        "prompt_set": name,
        "concurrency": load.concurrency,
        "rate_per_s": load.rate_per_s,
        "temperature": ask.temperature,
        "max_tokens": ask.max_tokens,
        "limits": dataclasses.asdict(plan.limits),
        "machine": describe_machine(),
        "commit": source_commit(),
    }


def _print_row(table: Table, name: str, load: Load, summary: LoadSummary, acceptance: float | None) -> None:
    def joined(*values: float | None) -> str:
        return "/".join("-" if value is None else f"{value:.1f}" for value in values)

    ttft, tpot, itl = summary.ttft_ms, summary.tpot_ms, summary.itl_ms
    table.row(
        name,
        load,
        summary.requests - summary.errors,
        summary.errors,
        summary.tokens_per_s,
        joined(ttft.p50, ttft.p90, ttft.p99),
        joined(tpot.p50, tpot.p90, tpot.p99),
        joined(itl.p50, itl.p99),
        summary.tokens_per_chunk,
        acceptance,
        summary.goodput_per_s,
        f"{summary.goodput_share:.0%}",
    )
