"""What an offline benchmark leaves behind: one JSON line for each mode at each point."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from dspark.bench.metrics import accepted_length, median
from dspark.bench.modes import BenchMode
from dspark.bench.runners import Run
from dspark.sampling import AcceptanceRule


@dataclass(frozen=True, slots=True)
class OfflineRecord:
    """One mode at one point; medians if it was repeated.

    ``draft_len`` is k of static:k, the upper limit of adaptive, 0 without drafts. ``acceptance`` is the acceptance
    rule; empty at temperature 0, where both rules are one, and without drafts. ``accepted_length`` counts rounds that
    verified drafts; ``verified_per_step`` is drafted tokens verified in one forward over all its requests;
    ``acceptance_rate`` is accepted / verified. ``tokens_per_s_min`` and ``_max`` are over the repeats.
    """

    engine: str
    mode: str
    draft_len: int
    drafter: str
    acceptance: str
    temperature: float
    prompt_set: str
    concurrency: int
    requests: int
    output_tokens: int
    seconds: float
    tokens_per_s: float
    tokens_per_s_per_user: float
    accepted_length: float
    acceptance_rate: float
    verified_per_step: float
    ttft_p50_ms: float
    tpot_p50_ms: float | None
    repeats: int
    tokens_per_s_min: float
    tokens_per_s_max: float
    machine: str
    commit: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True, slots=True)
class Point:
    """Where contenders are compared with each other."""

    prompt_set: str
    concurrency: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Contender:
    """A mode under an acceptance rule; ``rule`` None where there is nothing to accept or both rules are one."""

    mode: BenchMode
    rule: AcceptanceRule | None

    @property
    def label(self) -> str:
        return f"{self.mode.label} {self.rule}" if self.rule else self.mode.label


@dataclass(frozen=True, slots=True)
class Origin:
    """What measured, and where."""

    engine: str
    drafter: str
    block_size: int
    machine: str
    commit: str


def make_record(point: Point, contender: Contender, runs: Sequence[Run], origin: Origin) -> OfflineRecord:
    """The record of the repeats of one contender at one point."""
    rates = [_tokens(run) / run.seconds for run in runs]
    counts = [run.counts for run in runs]
    timelines = [timeline for run in runs for timeline in run.timelines]
    per_token = [timeline.tpot_s for timeline in timelines if timeline.tpot_s is not None]
    verified, steps = sum(count.verified for count in counts), sum(count.steps for count in counts)
    accepted = sum(count.accepted for count in counts)
    rate = median(rates)
    return OfflineRecord(
        engine=origin.engine,
        mode=contender.mode.name,
        draft_len=contender.mode.draft_len or origin.block_size,
        drafter=origin.drafter,
        acceptance=contender.rule or "",
        **dataclasses.asdict(point),
        requests=len(runs[0].timelines),
        output_tokens=round(median([_tokens(run) for run in runs])),
        seconds=round(median([run.seconds for run in runs]), 4),
        tokens_per_s=round(rate, 1),
        tokens_per_s_per_user=round(rate / point.concurrency, 1),
        accepted_length=round(accepted_length(accepted, sum(count.drafted_rounds for count in counts)), 3),
        acceptance_rate=round(accepted / verified, 3) if verified else 0.0,
        verified_per_step=round(verified / steps, 3) if steps else 0.0,
        ttft_p50_ms=_ms([timeline.ttft_s for timeline in timelines]),
        tpot_p50_ms=_ms(per_token) if per_token else None,
        repeats=len(runs),
        tokens_per_s_min=round(min(rates), 1),
        tokens_per_s_max=round(max(rates), 1),
        machine=origin.machine,
        commit=origin.commit,
    )


def _tokens(run: Run) -> int:
    return sum(timeline.num_tokens for timeline in run.timelines)


def _ms(seconds: Sequence[float]) -> float:
    return round(median(seconds) * 1e3, 3)
