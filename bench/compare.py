"""What HTTP through Ray Serve adds to ``LLM.stream`` in process: the same prompts, in turns, never both at once.

Both engines stay loaded all the time, so the idle processes of Ray weigh on both sides alike. Prefix caches are on, as
users have them: the first repeat finds them cold on both sides, the others warm.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dspark.bench.http_client import Ask
from dspark.bench.in_process import Streams, run_in_process
from dspark.bench.load import Load, Measured, as_record, connect, find_model, run_load
from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.metrics import LoadSummary, median
from dspark.bench.prompt_sets import load_set, take
from dspark.bench.tables import Column, Table
from dspark.bench.traffic import Job
from dspark.errors import DSparkError

COLUMNS = [
    Column("set", 10, is_text=True),
    Column("conc", 4),
    Column("in-process tok/s", 16),
    Column("HTTP tok/s", 10),
    Column("HTTP/in-process", 15),
    Column("in-process TTFT ms", 18),
    Column("HTTP TTFT ms", 12),
    Column("added TTFT ms", 13),
]


@dataclass(frozen=True, slots=True)
class ComparePlan:
    """A whole run of ``dspark bench online --compare-in-process``."""

    url: str
    ask: Ask
    api_key: str | None
    folder: Path
    sets: tuple[str, ...]
    levels: tuple[int, ...]
    requests: int | None
    repeats: int
    timeout_s: float
    dtype: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both sides of one point, a summary a repeat, in the order they were measured."""

    in_process: tuple[LoadSummary, ...]
    http: tuple[LoadSummary, ...]

    @property
    def throughput_ratio(self) -> float:
        """HTTP over in-process tokens a second; the median over the repeats."""
        return median([http.tokens_per_s / local.tokens_per_s for http, local in zip(self.http, self.in_process, strict=True)])

    @property
    def added_ttft_ms(self) -> float:
        """HTTP minus in-process TTFT p50; the median over the repeats."""
        return median([_p50(http) - _p50(local) for http, local in zip(self.http, self.in_process, strict=True)])


def _p50(summary: LoadSummary) -> float:
    if summary.ttft_ms.p50 is None:
        raise DSparkError(f"all {summary.requests} requests of a repeat failed")
    return summary.ttft_ms.p50


def run_compare(plan: ComparePlan, llm: Streams, out: TextIO | None) -> list[Comparison]:
    """Measure all points, print rows, write JSON lines; DSparkError if a request fails, since then nothing is comparable."""
    ask = plan.ask if plan.ask.model else dataclasses.replace(plan.ask, model=asyncio.run(_find_model(plan)))
    table, found = Table(COLUMNS), []
    machine, commit = describe_machine(plan.dtype), source_commit()
    for name in plan.sets:
        prompts = load_set(plan.folder, name)
        for level in plan.levels:
            work = take(prompts, plan.requests or Load(concurrency=level).default_requests())
            comparison = compare_point(plan, ask, work, level, llm)
            found.append(comparison)
            rates = [median([summary.tokens_per_s for summary in side]) for side in (comparison.in_process, comparison.http)]
            firsts = [median([_p50(summary) for summary in side]) for side in (comparison.in_process, comparison.http)]
            table.row(name, level, *rates, comparison.throughput_ratio, *firsts, comparison.added_ttft_ms)
            if out is not None:
                origin = {"url": plan.url, "model": ask.model, "machine": machine, "commit": commit}
                print(json.dumps(_record(name, level, comparison) | origin), file=out, flush=True)
    return found


def compare_point(plan: ComparePlan, ask: Ask, work: Sequence[str], level: int, llm: Streams) -> Comparison:
    """All repeats at one concurrency; the side that begins alternates, and both are warmed first."""
    warm = dataclasses.replace(ask, max_tokens=4)
    sides: dict[str, list[LoadSummary]] = {"in_process": [], "http": []}
    for side in sides:
        _measure(plan, side, warm, work[:level], level, llm)
    for repeat in range(plan.repeats):
        for side in ("in_process", "http") if repeat % 2 == 0 else ("http", "in_process"):
            sides[side].append(_measure(plan, side, ask, work, level, llm))
    return Comparison(tuple(sides["in_process"]), tuple(sides["http"]))


def _measure(plan: ComparePlan, side: str, ask: Ask, work: Sequence[str], level: int, llm: Streams) -> LoadSummary:
    if side == "http":
        measured = asyncio.run(_over_http(plan, ask, work, level))
    else:
        measured = run_in_process(llm, [Job(ask, prompt) for prompt in work], level)
    summary, errors = measured.summary(), measured.errors
    if errors:
        raise DSparkError(f"{side}: {summary.errors} of {summary.requests} requests failed: {errors.most_common(1)[0][0]}")
    return summary


async def _over_http(plan: ComparePlan, ask: Ask, work: Sequence[str], level: int) -> Measured:
    async with connect(plan.url, plan.api_key, plan.timeout_s) as client:
        return await run_load(client, [Job(ask, prompt) for prompt in work], Load(concurrency=level), seed=0)


async def _find_model(plan: ComparePlan) -> str:
    async with connect(plan.url, plan.api_key, plan.timeout_s) as client:
        return await find_model(client)


def _record(name: str, level: int, comparison: Comparison) -> dict[str, Any]:
    return {
        "kind": "compare",
        "prompt_set": name,
        "concurrency": level,
        "throughput_ratio": round(comparison.throughput_ratio, 4),
        "added_ttft_p50_ms": round(comparison.added_ttft_ms, 3),
        "in_process": [as_record(summary) for summary in comparison.in_process],
        "http": [as_record(summary) for summary in comparison.http],
    }
