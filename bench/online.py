"""``dspark bench online``: load on a server that runs already, a prompt set at a time or mixed, with or without service classes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dspark.bench.http_client import Ask, send
from dspark.bench.load import Load, Measured, connect, find_model, run_load
from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.metrics import Limits, LoadSummary
from dspark.bench.prompt_sets import load_set, take
from dspark.bench.tables import Column, Table
from dspark.bench.traffic import Job, ServiceClass, assign, mix
from dspark.errors import ConfigError

COLUMNS = [
    Column("set", 14, is_text=True),
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
class OnlinePlan:
    """A whole run of ``dspark bench online``. ``trace``: the sets are mixed at random instead of measured one after the other.

    Without ``classes`` every request should keep ``limits``; with them each its class's, which the server is told of if
    ``tells_budgets``.
    """

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
    trace: bool = False
    classes: tuple[ServiceClass, ...] = ()
    tells_budgets: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """What is measured under each load: sets, or one mix of them."""
        return ("+".join(self.sets),) if self.trace else self.sets

    def jobs(self, ask: Ask, name: str, count: int) -> list[Job]:
        """The requests of one measurement, the same for the same seed."""
        sets = [load_set(self.folder, one) for one in (self.sets if self.trace else (name,))]
        prompts = mix(sets, count, self.seed) if self.trace else take(sets[0], count)
        if self.classes:
            return assign(ask, prompts, self.classes, self.seed, self.tells_budgets)
        return [Job(ask, prompt, self.limits) for prompt in prompts]


async def run_online(plan: OnlinePlan, out: TextIO | None) -> int:
    """Measure every set (or their mix) under every load, print rows, write JSON lines; returns the number of failed requests."""
    async with connect(plan.url, plan.api_key, plan.timeout_s) as client:
        ask = plan.ask if plan.ask.model else dataclasses.replace(plan.ask, model=await find_model(client))
        table, failed = Table(COLUMNS), 0
        for name, load in [(name, load) for name in plan.names for load in plan.loads]:
            jobs = plan.jobs(ask, name, plan.requests or load.default_requests())
            warm = await send(client, dataclasses.replace(jobs[0].ask, max_tokens=4), jobs[0].prompt)
            if warm.error:
                raise ConfigError(f"{plan.url} refuses a first request: {warm.error}")
            measured = await run_load(client, jobs, load, plan.seed)
            failed += measured.errors.total()
            print_measured(table, name, load, measured)
            if out is not None:
                print(json.dumps(_record(plan, ask, name, load) | measured.as_record()), file=out, flush=True)
    return failed


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
        "seed": plan.seed,
        "tells_budgets": plan.tells_budgets and bool(plan.classes),
        "limits": dataclasses.asdict(plan.limits),
        "machine": describe_machine(),
        "commit": source_commit(),
    }


def print_measured(table: Table, name: str, load: object, measured: Measured) -> None:
    """A row for all requests, one for each service class, and how often each error came."""
    table.row(name, load, *_cells(measured.summary(), measured.acceptance))
    for class_name in measured.classes:
        table.row(f"  {class_name}", load, *_cells(measured.summary(class_name), None))
    for error, count in measured.errors.most_common():
        print(f"    {count} x {error}")


def _cells(summary: LoadSummary, acceptance: float | None) -> Sequence[object]:
    def joined(*values: float | None) -> str:
        return "/".join("-" if value is None else f"{value:.1f}" for value in values)

    ttft, tpot, itl = summary.ttft_ms, summary.tpot_ms, summary.itl_ms
    return (
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
