"""``dspark bench cohorts``: an engine in this process, a draft worker in another; do two cohorts hide drafting under verification?

``plain``      no speculation
``together``   all requests are drafted for, then all are verified
``cohorts``    two halves take turns
``auto``       as the engine decides
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.metrics import median
from dspark.bench.modes import rotated
from dspark.bench.round_trace import RoundTrace
from dspark.bench.tables import Column, Table
from dspark.errors import ConfigError
from dspark.sampling import SamplingParams

if TYPE_CHECKING:
    from dspark import LLM

COLUMNS: Final = [
    Column("conc", 4),
    Column("mode", 8, is_text=True),
    Column("tok/s", 8),
    Column("min-max", 15),
    Column("waited ms/token", 15),
    Column("hidden", 6),
    Column("bytes/token", 11),
]
FORCED: Final = {"together": False, "cohorts": True, "auto": None}
MODES: Final = ("plain", *FORCED)
READY: Final = "draft worker ready"


@dataclass(frozen=True, slots=True)
class CohortsPlan:
    """A whole run. ``trace`` is where the last run of ``cohorts`` is written as a Chrome trace."""

    prompts: Sequence[Sequence[int]]
    levels: tuple[int, ...]
    max_tokens: int
    repeats: int
    trace: Path | None


@dataclass(frozen=True, slots=True)
class CohortsRun:
    """One mode, once."""

    tokens_per_s: float
    waited_ms_per_token: float
    hidden_share: float
    bytes_per_token: float


_NAMES: Final = tuple(item.name for item in dataclasses.fields(CohortsRun))


@contextmanager
def draft_worker(flags: Sequence[str], start_s: float) -> Iterator[tuple[str, str]]:
    """A ``dspark draft-worker`` of our own: its address and token. ConfigError with its output if it does not get ready."""
    token = secrets.token_hex(32)
    command = [sys.executable, "-m", "dspark", "draft-worker", *flags]
    environment = os.environ | {"DSPARK_DRAFT_TOKEN": token}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        yield _address(process, start_s), token
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(30.0)


def _address(process: subprocess.Popen[str], start_s: float) -> str:
    """What the ready line of a draft worker says."""
    deadline, lines = time.monotonic() + start_s, []
    assert process.stdout is not None
    while time.monotonic() < deadline and (line := process.stdout.readline()):
        lines.append(line)
        if line.startswith(READY):
            return line.split()[-1]
    process.kill()
    raise ConfigError(f"the draft worker did not get ready:\n{''.join(lines)}")


def run_cohorts(plan: CohortsPlan, llm: LLM, out: TextIO | None) -> None:
    """Measure all modes at all levels in turns, print rows, write JSON lines."""
    table = Table(COLUMNS)
    origin = {"machine": describe_machine(), "commit": source_commit()}
    for level in plan.levels:
        runs: dict[str, list[CohortsRun]] = {mode: [] for mode in MODES}
        for repeat in range(plan.repeats):
            for mode in rotated(list(MODES), repeat):
                runs[mode].append(_run(plan, llm, mode, level))
        for mode in MODES:
            rates = [run.tokens_per_s for run in runs[mode]]
            figures = {name: median([getattr(run, name) for run in runs[mode]]) for name in _NAMES}
            span = f"{min(rates):.1f}-{max(rates):.1f}"
            hidden = f"{figures['hidden_share']:.0%}"
            table.row(level, mode, figures["tokens_per_s"], span, figures["waited_ms_per_token"], hidden, figures["bytes_per_token"])
            if out is not None:
                record = {"kind": "cohorts", "mode": mode, "concurrency": level, "repeats": plan.repeats} | figures | origin
                print(json.dumps(record), file=out, flush=True)


def _run(plan: CohortsPlan, llm: LLM, mode: str, level: int) -> CohortsRun:
    """Decode ``level`` streams to their end in one mode. The prefix cache is off, so every run is as cold as the first."""
    params = SamplingParams(temperature=0.0, max_tokens=plan.max_tokens, ignore_eos=True)
    prompts = [plan.prompts[i % len(plan.prompts)] for i in range(level)]
    engine: Any = llm.engine
    engine.cohorts.forced = FORCED.get(mode, False)
    trace = RoundTrace()
    trace.attach(engine)
    before, started = llm.stats(), time.perf_counter()
    outputs = llm.generate(prompts, params, speculation="off" if mode == "plain" else None, max_concurrency=level)
    seconds = time.perf_counter() - started
    llm.rest()
    after = llm.stats()
    trace.detach(engine)
    if mode == "cohorts" and plan.trace is not None:
        trace.write(plan.trace)
    tokens = sum(len(output.token_ids) for output in outputs)
    sent = sum(after[name] - before[name] for name in ("draft_bytes_sent_total", "draft_bytes_received_total"))
    waited_s = after["draft_wait_seconds_total"] - before["draft_wait_seconds_total"]
    return CohortsRun(tokens / seconds, 1e3 * waited_s / tokens, trace.hidden_share(), sent / tokens)
