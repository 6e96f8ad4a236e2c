"""``dspark bench profile``: where a round's time goes, part by part, and how far each part is from what the machine allows.

The limit of a part is the larger of the bytes it must read over the measured copy bandwidth and its multiplications over the
measured rate of a large matrix product; parts that need not exist (pointwise passes, judging, idle time) have the limit 0.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dspark import SamplingParams
from dspark.bench.kernel_cases import Maker
from dspark.bench.kernel_time import GraphTimer, PlainTimer, ceilings
from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.modes import BenchMode
from dspark.bench.profile_trace import DRAFT, JUDGE, PLAN, STEP, Parts, read_parts
from dspark.bench.prompt_sets import load_set, take
from dspark.bench.tables import Column, Table
from dspark.errors import ConfigError
from dspark.types import Request

if TYPE_CHECKING:
    import torch

    from dspark import LLM
    from dspark.workers.verifier.engine import Engine

WARM_UP_STEPS = 8
CEILING_REPEATS = 5
COLUMNS = [
    Column("part", 32, is_text=True),
    Column("ms/step", 8),
    Column("share", 6),
    Column("limit ms", 8),
    Column("over ms", 8),
    Column("records", 7),
]


@dataclass(frozen=True, slots=True)
class ProfilePlan:
    """What to profile: ``steps`` rounds of pure decoding with ``concurrency`` streams in one mode."""

    mode: BenchMode
    folder: Path
    sets: tuple[str, ...]
    concurrency: int
    steps: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine reaches: bytes read and written a second by a copy, multiply-adds times two a second by a matrix product."""

    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What a mean step had to do, and how long it took without the profiler."""

    tokens: float
    rows: float
    context: float
    seconds: float


class Marked:
    """Stands for a part of an engine and marks calls of ``verbs`` (method name -> mark) in the profile."""

    def __init__(self, part: Any, verbs: Mapping[str, str]) -> None:
        self.__dict__["_part"], self.__dict__["_verbs"] = part, verbs

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        return partial(marked, self._verbs[name], value) if name in self._verbs else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._part, name, value)


def marked(mark: str, call: Callable[..., Any], *args: Any, **others: Any) -> Any:
    """Call under a mark."""
    from torch.profiler import record_function

    with record_function(mark):
        return call(*args, **others)


def run_profile(plan: ProfilePlan, llm: LLM, encode: Callable[[str], list[int]], out: TextIO | None) -> dict[str, Any]:
    """Profile, print the table and name the largest gap; returns (and writes) the record."""
    engine = llm.engine
    _fill(engine, plan, encode)
    load = _timed(engine, plan.steps)
    parts = _profiled(engine, plan.steps)
    ceiling = measure_ceilings(engine.target.device, engine.target.dtype)
    limits = limits_of(engine, load, ceiling)
    print(f"{describe_machine(plan.dtype)}; commit {source_commit()}; {plan.mode.label}, {plan.concurrency} streams, {plan.steps} steps")
    print(
        f"a step: {load.tokens:.1f} tokens, {load.rows:.1f} rows, {load.context:.0f} positions of context;"
        f" copy {ceiling.bytes_per_s / 1e12:.3f} TB/s, matrix product {ceiling.flop_per_s / 1e12:.1f} TFLOP/s\n"
    )
    record = as_record(plan, parts, limits, load, ceiling)
    print_parts(record)
    if out is not None:
        print(json.dumps(record), file=out, flush=True)
    return record


def as_record(plan: ProfilePlan, parts: Parts, limits: Mapping[str, float], load: Load, ceiling: Ceilings) -> dict[str, Any]:
    """One line of a result file; times are milliseconds a step."""
    busy = {part: us / parts.steps / 1e3 for part, us in parts.busy.items()}
    idle = {part: us / parts.steps / 1e3 for part, us in parts.idle.items()}
    return {
        "kind": "profile",
        "mode": plan.mode.name,
        "draft_len": plan.mode.draft_len,
        "concurrency": plan.concurrency,
        "steps": parts.steps,
        "step_ms": round(load.seconds * 1e3, 4),
        "profiled_step_ms": round(parts.total / parts.steps / 1e3, 4),
        "parts_ms": {part: round(ms, 4) for part, ms in sorted((busy | idle).items(), key=lambda item: -item[1])},
        "limits_ms": {part: round(1e3 * seconds, 4) for part, seconds in limits.items()},
        "records": {part: round(count / parts.steps, 1) for part, count in parts.records.items()},
        "tokens": round(load.tokens, 2),
        "rows": round(load.rows, 2),
        "context": round(load.context, 1),
        "copy_bytes_per_s": round(ceiling.bytes_per_s),
        "flop_per_s": round(ceiling.flop_per_s),
        "machine": describe_machine(plan.dtype),
        "commit": source_commit(),
    }


def print_parts(record: Mapping[str, Any]) -> None:
    """The table of a record, largest part first, and what is farthest from its limit."""
    table = Table(COLUMNS)
    whole, limits = record["profiled_step_ms"], record["limits_ms"]
    over = {part: ms - limits.get(part, 0.0) for part, ms in record["parts_ms"].items()}
    for part, ms in record["parts_ms"].items():
        table.row(
            part, f"{ms:.3f}", f"{100 * ms / whole:.1f}%", f"{limits.get(part, 0.0):.3f}", f"{over[part]:.3f}", record["records"].get(part)
        )
    limit, worst = sum(limits.values()), max(over, key=over.__getitem__)
    table.row("all", f"{whole:.3f}", "100.0%", f"{limit:.3f}", f"{whole - limit:.3f}", round(sum(record["records"].values()), 1))
    print(f"\na step takes {record['step_ms']:.3f} ms without the profiler, {record['step_ms'] / limit:.2f} x the limit of {limit:.3f} ms")
    print(f"largest gap to the limit: {worst}, {over[worst]:.3f} ms of {record['parts_ms'][worst]:.3f} ms a step")


def limits_of(engine: Engine, load: Load, ceiling: Ceilings) -> dict[str, float]:
    """Seconds that the parts of a mean step take at least."""
    target, drafter = engine.target, engine.drafter
    model: Any = target.model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layers = target.num_parameters - head.numel() - (0 if embedding is head else embedding.numel())

    def product(count: int, rows: float) -> float:
        return max(count * target.dtype.itemsize / ceiling.bytes_per_s, 2.0 * count * rows / ceiling.flop_per_s)

    limits = {
        "GEMM": product(layers, load.tokens),
        "head": product(head.numel(), load.tokens),
        "attention": load.context * target.kv_bytes_per_token / ceiling.bytes_per_s,
    }
    module: Any = getattr(drafter, "module", None)
    if module is not None and load.tokens > load.rows:  # it drafted
        read = sum(weight.numel() for name, weight in module.named_parameters() if "markov_w1" not in name) + module.draft_lm_head.numel()
        limits["draft"] = product(read, load.rows * drafter.block_size)
    return limits


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What the parts are held against, as ``dspark bench kernels`` measures it."""
    is_cuda = device.type == "cuda"
    timer = GraphTimer(CEILING_REPEATS) if is_cuda else PlainTimer(CEILING_REPEATS)
    return Ceilings(*ceilings(Maker(device, dtype), timer, is_cuda))


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fill(engine: Engine, plan: ProfilePlan, encode: Callable[[str], list[int]]) -> None:
    """Queue the streams and step until all of them decode."""
    for number, prompt in enumerate(_prompts(engine, plan, encode)):
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=engine.options.max_model_len)
        engine.add(Request(f"profile-{number}", tuple(prompt), sampling, speculation=plan.mode.speculation))
    while engine.scheduler.waiting or any(not sequence.output for sequence in engine.scheduler.running):
        engine.step()
    for _ in range(WARM_UP_STEPS):
        engine.step()


def _prompts(engine: Engine, plan: ProfilePlan, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """A prompt for every stream; ConfigError if they cannot all decode to the end of the profile, side by side."""
    most = engine.options.limits.max_num_seqs
    if plan.concurrency > most:
        raise ConfigError(f"--concurrency {plan.concurrency} is over the {most} streams of the engine")
    rounds = 2 * plan.steps + 2 * WARM_UP_STEPS + plan.concurrency  # at most one a stream until all of them decode
    growth = rounds * (1 + engine.drafter.block_size)
    prompts = [encode(prompt) for name in plan.sets for prompt in load_set(plan.folder, name)]
    fitting = [prompt for prompt in prompts if len(prompt) + growth <= engine.options.max_model_len]
    if not fitting:
        raise ConfigError(f"no prompt leaves room for {growth} tokens in {engine.options.max_model_len}: use fewer --steps")
    chosen = take(fitting, plan.concurrency)
    needed, held = sum(map(len, chosen)) + growth * plan.concurrency, engine.pool.num_blocks * engine.pool.block_size
    if needed > held:
        raise ConfigError(f"{plan.concurrency} streams may need KV for {needed} tokens, and there is room for {held}: raise --kv-tokens")
    return chosen


def _timed(engine: Engine, steps: int) -> Load:
    """The mean step, with nothing attached."""
    before, context = (engine.counters.steps, engine.counters.step_tokens, engine.counters.rounds), 0
    _synchronize(engine.target.device)
    begin = time.perf_counter()
    for _ in range(steps):
        context += sum(sequence.num_known for sequence in engine.scheduler.running)
        engine.step()
    _synchronize(engine.target.device)
    seconds = (time.perf_counter() - begin) / steps
    tokens, rows = engine.counters.step_tokens - before[1], engine.counters.rounds - before[2]
    return Load(tokens / steps, rows / steps, context / steps, seconds)


def _profiled(engine: Engine, steps: int) -> Parts:
    """The parts of as many steps, from the profiler's trace."""
    from torch.profiler import ProfilerActivity, profile

    drafter, judge, scheduler = engine.drafter, engine.judge, engine.scheduler
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if engine.target.device.type == "cuda" else [])
    engine.drafter = Marked(drafter, dict.fromkeys(("collect", "propose", "project"), DRAFT))
    engine.judge = partial(marked, JUDGE, judge)
    engine.scheduler = Marked(scheduler, dict.fromkeys(("choose", "plan"), PLAN))  # type: ignore[assignment]
    try:
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(steps):
                marked(STEP, engine.step)
            _synchronize(engine.target.device)
    finally:
        engine.drafter, engine.judge, engine.scheduler = drafter, judge, scheduler
        for request_id in list(engine.sequences):
            engine.abort(request_id)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: Sequence[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return read_parts(events)
