"""Modes against each other on the same prompts, in process: throughput, latency and acceptance.

The modes of a point run right after each other, and in another order every repeat, because machines drift: a ratio
of two figures taken minutes apart says more about the machine than about the modes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.modes import BenchMode, rotated
from dspark.bench.prompt_sets import load_set, take
from dspark.bench.records import Contender, OfflineRecord, Origin, Point, make_record
from dspark.bench.report import print_report, rates_by_point
from dspark.bench.runners import Prompts, Run, Runner, Settings
from dspark.bench.tables import Column, Table
from dspark.errors import ConfigError
from dspark.sampling import AcceptanceRule

Encode = Callable[[str], list[int]]
Open = Callable[[Sequence[BenchMode], str], dict[BenchMode, Runner]]  # (modes, dtype) -> something that decodes for each
WARM_UP_TOKENS = 16
LOSSLESS_DTYPE = "float32"  # bf16 logits depend on how many rows a forward has; fp32 argmaxes do not
COLUMNS = [
    Column("set", 10, is_text=True),
    Column("conc", 4),
    Column("temp", 4),
    Column("mode", 18, is_text=True),
    Column("tok/s", 8),
    Column("min-max", 15),
    Column("x plain", 7),
    Column("/user", 7),
    Column("acc.len", 7),
    Column("acc.rate", 8),
    Column("verif/step", 10),
    Column("TTFT ms", 8),
    Column("TPOT ms", 8),
]


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """A whole run of ``dspark bench offline``. ``requests`` None: 8 at one stream, otherwise as many as streams;
    a number is rounded up to whole groups of streams."""

    modes: tuple[BenchMode, ...]
    dtype: str
    folder: Path
    sets: tuple[str, ...]
    levels: tuple[int, ...]
    temperatures: tuple[float, ...]
    rules: tuple[AcceptanceRule, ...]
    max_tokens: int
    requests: int | None = None
    repeats: int = 1
    max_prompt_tokens: int = 1200
    ignore_eos: bool = False


def run_offline(plan: OfflinePlan, open_runners: Open, encode: Encode, out: TextIO | None) -> list[OfflineRecord]:
    """Measure all points, print a row for every contender, write JSON lines as they come, print the ratios."""
    machine, commit = describe_machine(plan.dtype), source_commit()
    print(f"{machine}; commit {commit}; {plan.max_tokens} new tokens", flush=True)
    table, records = Table(COLUMNS), []
    with opened(open_runners, plan.modes, plan.dtype) as runners:
        for name in plan.sets:
            prompts = encoded_set(plan, name, encode)
            for point in [Point(name, level, temperature) for temperature in plan.temperatures for level in plan.levels]:
                runs = measure_point(plan, point, prompts, runners)
                found = []
                for contender, repeats in runs.items():
                    runner = runners[contender.mode]
                    origin = Origin(runner.engine, runner.drafter, runner.block_size, machine, commit)
                    found.append(make_record(point, contender, repeats, origin))
                _print_rows(table, list(runs), found)
                if out is not None:
                    out.writelines(record.to_json() + "\n" for record in found)
                    out.flush()
                records += found
    print()
    print_report(rates_by_point([dataclasses.asdict(record) for record in records]), "plain")
    return records


@contextmanager
def opened(open_runners: Open, modes: Sequence[BenchMode], dtype: str) -> Iterator[dict[BenchMode, Runner]]:
    """Runners for the length of a block."""
    runners = open_runners(modes, dtype)
    try:
        yield runners
    finally:
        for runner in runners.values():
            runner.close()


def encoded_set(plan: OfflinePlan, name: str, encode: Encode) -> list[list[int]]:
    """The prompts of a set as token ids, without those that are too long; ConfigError if none is left."""
    prompts = [ids for ids in map(encode, load_set(plan.folder, name)) if len(ids) <= plan.max_prompt_tokens]
    if not prompts:
        raise ConfigError(f"prompt set {name!r} has no prompt of at most {plan.max_prompt_tokens} tokens")
    return prompts


def contenders(plan: OfflinePlan, point: Point) -> list[Contender]:
    """Who runs at a point: every mode, once for each acceptance rule where the rule matters; baselines at one stream."""
    found: list[Contender] = []
    for mode in plan.modes:
        if mode.uses_drafter and point.temperature > 0:
            found += [Contender(mode, rule) for rule in plan.rules]
        elif mode.speculation is not None or point.concurrency == 1:
            found.append(Contender(mode, None))
    return found


def measure_point(
    plan: OfflinePlan, point: Point, prompts: Sequence[list[int]], runners: dict[BenchMode, Runner]
) -> dict[Contender, list[Run]]:
    """All repeats of all contenders at a point, interleaved, after a short warm-up of each."""
    wanted = plan.requests or (8 if point.concurrency == 1 else point.concurrency)
    work: Prompts = take(prompts, math.ceil(wanted / point.concurrency) * point.concurrency)
    everyone = contenders(plan, point)
    runs: dict[Contender, list[Run]] = {contender: [] for contender in everyone}
    for contender in everyone:
        warm = Settings(WARM_UP_TOKENS, point.temperature, contender.rule)
        runners[contender.mode].run(work[: point.concurrency], point.concurrency, warm)
    for repeat in range(plan.repeats):
        for contender in rotated(everyone, repeat):
            settings = Settings(plan.max_tokens, point.temperature, contender.rule, plan.ignore_eos)
            runs[contender].append(runners[contender.mode].run(work, point.concurrency, settings))
    return runs


def check_lossless(plan: OfflinePlan, open_runners: Open, encode: Encode) -> bool:
    """Whether greedy decoding gives the same tokens in every mode as in plain mode, in fp32; prints a line each."""
    level = max(plan.levels)
    settings = Settings(plan.max_tokens, ignore_eos=plan.ignore_eos)
    work = {name: take(encoded_set(plan, name, encode), max(8, level)) for name in plan.sets}
    modes = [mode for mode in plan.modes if mode.speculation is not None]
    plain = next((mode for mode in modes if mode.name == "plain"), None)
    if plain is None or len(modes) < 2:
        raise ConfigError("--check-lossless compares with plain: --modes needs plain and at least one mode that speculates")
    all_same = True
    with opened(open_runners, modes, LOSSLESS_DTYPE) as runners:
        for name, prompts in work.items():
            expected = runners[plain].run(prompts, level, settings)
            for mode in modes:
                if mode is not plain:
                    run = runners[mode].run(prompts, level, settings)
                    difference = first_difference(expected.token_ids, run.token_ids)
                    all_same &= difference is None
                    print(f"{name} {mode.label}: {difference or _same(run)}", flush=True)
    return all_same


def _same(run: Run) -> str:
    tokens = sum(map(len, run.token_ids))
    return f"identical to plain ({len(run.token_ids)} prompts, {tokens} tokens, {run.counts.accepted} of them drafted, greedy, fp32)"


def first_difference(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> str | None:
    """Where two lists of answers part, in words; None if they are equal."""
    for number, (ours, theirs) in enumerate(zip(expected, found, strict=True), start=1):
        if list(ours) != list(theirs):
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
            return f"NOT identical: prompt {number} differs from token {at + 1} on ({_token(ours, at)} in plain, {_token(theirs, at)} here)"
    return None


def _token(tokens: Sequence[int], at: int) -> Any:
    return tokens[at] if at < len(tokens) else "the end"


def _print_rows(table: Table, everyone: Sequence[Contender], records: Sequence[OfflineRecord]) -> None:
    plain = next((record.tokens_per_s for record in records if record.mode == "plain"), None)
    for contender, record in zip(everyone, records, strict=True):
        table.row(
            record.prompt_set,
            record.concurrency,
            f"{record.temperature:g}",
            contender.label,
            record.tokens_per_s,
            f"{record.tokens_per_s_min:g}-{record.tokens_per_s_max:g}",
            record.tokens_per_s / plain if plain else None,
            record.tokens_per_s_per_user,
            record.accepted_length,
            record.acceptance_rate,
            record.verified_per_step,
            record.ttft_p50_ms,
            record.tpot_p50_ms,
        )
