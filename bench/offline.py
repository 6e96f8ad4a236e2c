"""Modes against each other on the same prompts, in process: throughput, latency and acceptance.

The modes of a point run right after each other, and in another order every repeat, because machines drift: a ratio
of two figures taken minutes apart says more about the machine than about the modes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.modes import BenchMode, rotated
from dspark.bench.prompt_sets import load_set, take
from dspark.bench.records import SYNTHETIC, WARM_UP_TOKENS, Contender, Identity, OfflineRecord, Origin, Point, Work, make_record
from dspark.bench.report import report
from dspark.bench.runners import Prompts, Run, Runner, Settings
from dspark.bench.sweep import Held, Level, Remaining, as_time
from dspark.bench.synthetic import SyntheticAcceptance
from dspark.bench.tables import Column, Table
from dspark.errors import ConfigError
from dspark.sampling import AcceptanceRule

Encode = Callable[[str], list[int]]
Open = Callable[[Sequence[BenchMode], str], dict[BenchMode, Runner]]  # (modes, dtype) -> something that decodes for each
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
    Column("budget", 6),
    Column("verif/step", 10),
    Column("pred. ms", 8),
    Column("step ms", 8),
    Column("TTFT ms", 8),
    Column("TPOT ms", 8),
]


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """A whole run of ``dspark bench offline``.

    ``synthetic``: the acceptance forced on all that draft; None: what they reach. ``varies``: answers have from half of a level's
    tokens to one and a half. ``steady``: the runners tell steady seconds (``tempo.py``). ``while_full``: rates are of the time in which
    all streams were busy. ``warm_up``: tokens of each answer of the warm-up. ``sampling``: other fields of ``SamplingParams``.
    """

    modes: tuple[BenchMode, ...]
    dtype: str
    folder: Path
    sets: tuple[str, ...]
    levels: tuple[Level, ...]
    temperatures: tuple[float, ...]
    rules: tuple[AcceptanceRule, ...]
    repeats: int = 1
    max_prompt_tokens: int = 1200
    ignore_eos: bool = False
    synthetic: SyntheticAcceptance | None = None
    varies: bool = False
    steady: bool = False
    while_full: bool = False
    warm_up: int = WARM_UP_TOKENS
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def points(self) -> list[tuple[Level, Point]]:
        """All points in the order in which they are measured."""
        return [
            (level, Point(name, level.concurrency, temperature))
            for name in self.sets
            for temperature in self.temperatures
            for level in self.levels
        ]

    def work(self, level: Level) -> Work:
        # Forced text ends nowhere in particular: only answers of one length cost the same in all modes.
        ignores_eos = self.ignore_eos or self.synthetic is not None
        sampling = json.dumps(dict(sorted(self.sampling.items()))) if self.sampling else ""
        return Work(
            level.requests,
            level.max_tokens,
            ignores_eos,
            self.repeats,
            self.varies,
            self.steady,
            self.while_full,
            self.warm_up,
            sampling,
        )


def run_offline(
    plan: OfflinePlan, open_runners: Open, encode: Encode, out: TextIO | None, held: Held | None = None
) -> list[Mapping[str, Any]]:
    """Measure all points that are not ``held``, print a row for every contender, write JSON lines as they come, print the ratios.

    Returns all records, held ones included.
    """
    machine, commit = describe_machine(plan.dtype), source_commit()
    lengths = ", ".join(map(str, dict.fromkeys(level.max_tokens for level in plan.levels)))
    print(f"{machine}; commit {commit}; {lengths} new tokens", flush=True)
    if plan.synthetic is not None:
        print(f"{SYNTHETIC}: acceptance is not the drafter's, it is forced to {plan.synthetic.text}; the text is worthless", flush=True)
    table, remaining = Table(COLUMNS), Remaining([level for level, _ in plan.points])
    prompts: dict[str, list[list[int]]] = {}
    records: list[Mapping[str, Any]] = []
    with opened(open_runners, plan.modes, plan.dtype) as runners:
        for level, point in plan.points:
            identities = identify(plan, level, point, runners, machine, commit)
            if held is not None and (earlier := held.find(list(identities.values()))) is not None:
                print(f"{point.prompt_set} at {point.concurrency}: held", file=sys.stderr, flush=True)
                records += earlier
                remaining.skip()
                continue
            if point.prompt_set not in prompts:
                prompts[point.prompt_set] = encoded_set(plan, point.prompt_set, encode)
            started = time.perf_counter()
            runs = measure_point(plan, level, point, prompts[point.prompt_set], runners)
            remaining.took(time.perf_counter() - started)
            found = [make_record(identities[contender], repeats) for contender, repeats in runs.items()]
            _print_rows(table, list(runs), found)
            written = [record.as_dict() for record in found]
            if out is not None:  # all at once: a point that is there is there whole
                out.write("".join(json.dumps(record) + "\n" for record in written))
                out.flush()
            records += written
            if left_s := remaining.seconds():
                print(f"about {as_time(left_s)} left", file=sys.stderr, flush=True)
    print()
    report(records)
    return records


def identify(
    plan: OfflinePlan, level: Level, point: Point, runners: Mapping[BenchMode, Runner], machine: str, commit: str
) -> dict[Contender, Identity]:
    """What the records of a point's contenders will be the result of."""
    found = {}
    for contender in contenders(plan, point):
        runner = runners[contender.mode]
        origin = Origin(runner.engine, runner.drafter, runner.block_size, machine, commit)
        found[contender] = Identity.of(point, plan.work(level), contender, origin)
    return found


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
        if mode.uses_drafter:
            synthetic = plan.synthetic.text if plan.synthetic is not None else None
            found += [Contender(mode, rule, synthetic) for rule in (plan.rules if point.temperature > 0 else (None,))]
        elif mode.speculation is not None or point.concurrency == 1:
            found.append(Contender(mode, None))
    return found


def measure_point(
    plan: OfflinePlan,
    level: Level,
    point: Point,
    prompts: Sequence[list[int]],
    runners: Mapping[BenchMode, Runner],
) -> dict[Contender, list[Run]]:
    """All repeats of all contenders at a point, interleaved, after a short warm-up of each."""
    work: Prompts = take(prompts, level.requests)
    everyone = contenders(plan, point)
    runs: dict[Contender, list[Run]] = {contender: [] for contender in everyone}
    for contender in everyone:
        warm = Settings(plan.warm_up, point.temperature, contender.rule, plan.ignore_eos, more=plan.sampling)
        runners[contender.mode].run(work[: level.concurrency], level.concurrency, warm)
    for repeat in range(plan.repeats):
        for contender in rotated(everyone, repeat):
            ignores_eos = plan.work(level).ignore_eos
            settings = Settings(level.max_tokens, point.temperature, contender.rule, ignores_eos, plan.varies, plan.sampling)
            runs[contender].append(runners[contender.mode].run(work, level.concurrency, settings))
    return runs


def check_lossless(plan: OfflinePlan, open_runners: Open, encode: Encode) -> bool:
    """Whether greedy decoding gives the same tokens in every mode as in plain mode, in fp32; prints a line each."""
    level = max(level.concurrency for level in plan.levels)
    settings = Settings(max(level.max_tokens for level in plan.levels), ignore_eos=plan.ignore_eos)
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
    plain = {record.identity.driver: record.tokens_per_s for record in records if record.identity.mode == "plain"}
    for contender, record in zip(everyone, records, strict=True):
        identity = record.identity
        base = plain.get(identity.driver)
        table.row(
            identity.prompt_set,
            identity.concurrency,
            f"{identity.temperature:g}",
            contender.label,
            record.tokens_per_s,
            f"{record.tokens_per_s_min:g}-{record.tokens_per_s_max:g}",
            record.tokens_per_s / base if base else None,
            record.tokens_per_s_per_user,
            record.accepted_length,
            record.acceptance_rate,
            record.budget_mean,
            record.verified_per_step,
            record.predicted_step_ms,
            record.measured_step_ms,
            record.ttft_p50_ms,
            record.tpot_p50_ms,
        )
