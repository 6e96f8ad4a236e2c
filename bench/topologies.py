"""``dspark bench online --compare-topologies``: the same number of processes arranged in three ways, under the same load in turns.

``colocated``      every process a verifier that drafts for itself
``disaggregated``  some verifiers, the others draft workers
``plain``          every process a verifier that does not speculate

All servers run all the time, so their idle processes weigh on each alike. What counts is throughput a process: a draft worker
is paid for like a verifier.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from dspark.bench.http_client import Ask
from dspark.bench.load import Load, Measured, connect, find_model, run_load
from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.metrics import median
from dspark.bench.modes import rotated
from dspark.bench.prompt_sets import load_set, take
from dspark.bench.tables import Column, Table
from dspark.bench.traffic import Job
from dspark.errors import ConfigError, DSparkError

COLUMNS: Final = [
    Column("set", 10, is_text=True),
    Column("conc", 4),
    Column("topology", 14, is_text=True),
    Column("processes", 10, is_text=True),
    Column("tok/s", 8),
    Column("tok/s a process", 15),
    Column("TTFT p50 ms", 11),
    Column("TPOT p50 ms", 11),
    Column("acc.len", 7),
    Column("bytes/token", 11),
    Column("waited ms/token", 15),
]
WIRE_BYTES: Final = ("dspark_draft_bytes_sent_total", "dspark_draft_bytes_received_total")
WAITED: Final = "dspark_draft_wait_seconds_total"
GENERATED: Final = "dspark_generation_tokens_total"
STATS_PERIOD_S: Final = 0.6  # verifiers tell routers their counters four times a second
FIGURES: Final = (
    "tokens_per_s",
    "tokens_per_s_per_process",
    "ttft_p50_ms",
    "tpot_p50_ms",
    "accepted_length",
    "wire_bytes_per_token",
    "draft_wait_ms_per_token",
)


@dataclass(frozen=True, slots=True)
class Topology:
    """One arrangement: how many verifiers and draft workers, and the flags of its server."""

    name: str
    verifiers: int
    draft_workers: int
    settings: tuple[str, ...]

    @property
    def num_processes(self) -> int:
        return self.verifiers + self.draft_workers

    def __str__(self) -> str:
        return f"{self.verifiers} + {self.draft_workers}" if self.draft_workers else f"{self.verifiers}"


@dataclass(frozen=True, slots=True)
class TopologiesPlan:
    """A whole run; the prefix cache is left cold by a salt of each measurement."""

    ask: Ask
    folder: Path
    sets: tuple[str, ...]
    levels: tuple[int, ...]
    requests: int | None
    repeats: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement of one topology: the load's outcome, and what its servers' counters grew by."""

    measured: Measured
    grown: dict[str, float]

    @property
    def wire_bytes_per_token(self) -> float | None:
        """Draft traffic, both ways; None where there is none."""
        return self._per_token(sum(self.grown.get(name, 0.0) for name in WIRE_BYTES))

    @property
    def waited_ms_per_token(self) -> float | None:
        """What verifiers waited for drafts."""
        return self._per_token(1e3 * self.grown.get(WAITED, 0.0)) if WAITED in self.grown else None

    def _per_token(self, total: float) -> float | None:
        return total / self.grown[GENERATED] if total and self.grown.get(GENERATED) else None


def arrange(num_processes: int, num_draft_workers: int, drafter: str, speculation: str) -> tuple[Topology, ...]:
    """The three arrangements; ConfigError if no verifier is left."""
    verifiers = num_processes - num_draft_workers
    if verifiers < 1 or num_draft_workers < 1:
        raise ConfigError(f"--processes {num_processes} with --draft-workers {num_draft_workers} leaves {verifiers} verifiers")
    drafting = ("--drafter", drafter, "--speculation", speculation)
    workers = ("--topology", "disaggregated", "--num-draft-workers", str(num_draft_workers))
    return (
        Topology("colocated", num_processes, 0, ("--num-verifiers", str(num_processes), *drafting)),
        Topology("disaggregated", verifiers, num_draft_workers, ("--num-verifiers", str(verifiers), *workers, *drafting)),
        Topology("plain", num_processes, 0, ("--num-verifiers", str(num_processes), "--drafter", "none", "--speculation", "off")),
    )


def run_topologies(plan: TopologiesPlan, servers: Sequence[tuple[Topology, str]], out: TextIO | None) -> None:
    """Measure every topology at its URL, print rows, write JSON lines; DSparkError if a request fails."""
    table, runs = Table(COLUMNS), 0
    origin = {"machine": describe_machine(), "commit": source_commit()}
    for name in plan.sets:
        prompts = load_set(plan.folder, name)
        for level in plan.levels:
            load = Load(concurrency=level)
            work = take(prompts, plan.requests or load.default_requests())
            turns: dict[str, list[Turn]] = {topology.name: [] for topology, _ in servers}
            for repeat in range(plan.repeats):
                for topology, url in rotated(list(servers), repeat):
                    runs += 1
                    turns[topology.name].append(asyncio.run(_measure(plan, url, work, load, f"topologies-{runs}")))
            for topology, _ in servers:
                record = summarize_turns(topology, turns[topology.name])
                table.row(name, level, topology.name, str(topology), *(record[key] for key in FIGURES))
                if out is not None:
                    line = {"kind": "topology", "prompt_set": name, "concurrency": level, "repeats": plan.repeats} | record | origin
                    print(json.dumps(line), file=out, flush=True)


def summarize_turns(topology: Topology, turns: Sequence[Turn]) -> dict[str, Any]:
    """Medians over the turns of a topology, as JSON fields."""
    summaries = [turn.measured.summary() for turn in turns]
    rate = median([summary.tokens_per_s for summary in summaries])
    return {
        "topology": topology.name,
        "verifiers": topology.verifiers,
        "draft_workers": topology.draft_workers,
        "tokens_per_s": rate,
        "tokens_per_s_per_process": rate / topology.num_processes,
        "ttft_p50_ms": _median([summary.ttft_ms.p50 for summary in summaries]),
        "tpot_p50_ms": _median([summary.tpot_ms.p50 for summary in summaries]),
        "accepted_length": _median([turn.measured.acceptance for turn in turns]),
        "wire_bytes_per_token": _median([turn.wire_bytes_per_token for turn in turns]),
        "draft_wait_ms_per_token": _median([turn.waited_ms_per_token for turn in turns]),
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


async def _measure(plan: TopologiesPlan, url: str, work: Sequence[str], load: Load, salt: str) -> Turn:
    async with connect(url, None, plan.timeout_s) as client:
        ask = dataclasses.replace(plan.ask, model=await find_model(client), cache_salt=salt)
        before = await _counters(client)
        measured = await run_load(client, [Job(ask, prompt) for prompt in work], load, seed=0)
        if measured.errors:
            raise DSparkError(f"{url}: {measured.errors.total()} requests failed: {measured.errors.most_common(1)[0][0]}")
        await asyncio.sleep(STATS_PERIOD_S)
        after = await _counters(client)
        return Turn(measured, {name: value - before.get(name, 0.0) for name, value in after.items()})


async def _counters(client: Any) -> dict[str, float]:
    """The server's counters of interest, summed over verifiers."""
    response = await client.get(str(client.base_url).removesuffix("/v1/").removesuffix("/v1") + "/metrics")
    return sum_counters(response.text, (*WIRE_BYTES, WAITED, GENERATED))


def sum_counters(text: str, names: Sequence[str]) -> dict[str, float]:
    """Sums of some series of a Prometheus exposition over their labels; those that are not there are absent."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in names:
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found
