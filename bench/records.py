"""What an offline benchmark leaves behind: one JSON line for each mode at each point."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.bench.metrics import accepted_length, median, rate_while_full
from dspark.bench.modes import BenchMode
from dspark.bench.runners import Counts, Run
from dspark.sampling import AcceptanceRule

WARM_UP_TOKENS = 16  # of each answer, before the first repeat
SYNTHETIC = "SYNTHETIC"  # marks every label of a contender whose acceptance was forced


@dataclass(frozen=True, slots=True)
class Point:
    """Where contenders are compared with each other."""

    prompt_set: str
    concurrency: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Work:
    """What every contender of a point has to do, ``repeats`` times.

    ``varies``: answers have from half of ``max_tokens`` to one and a half; ``steady``: all times are in steady seconds (``tempo.py``);
    ``while_full``: rates are of the time in which all streams were busy. ``warm_up``: tokens of each answer before the first repeat.
    ``sampling``: other fields of ``SamplingParams`` as JSON; empty: none.
    """

    requests: int
    max_tokens: int
    ignore_eos: bool
    repeats: int
    varies: bool = False
    steady: bool = False
    while_full: bool = False
    warm_up: int = WARM_UP_TOKENS
    sampling: str = ""


@dataclass(frozen=True, slots=True)
class Contender:
    """A mode under an acceptance rule; ``rule`` None where there is nothing to accept or both rules are one.

    ``synthetic``: the stated acceptance it was forced to, as the user wrote it; None: what the drafter really reaches.
    """

    mode: BenchMode
    rule: AcceptanceRule | None
    synthetic: str | None = None

    @property
    def label(self) -> str:
        label = f"{self.mode.label} {self.rule}" if self.rule else self.mode.label
        return f"{label} {SYNTHETIC}" if self.synthetic is not None else label


@dataclass(frozen=True, slots=True)
class Origin:
    """What measured, and where."""

    engine: str
    drafter: str
    block_size: int
    machine: str
    commit: str


@dataclass(frozen=True, slots=True)
class Identity:
    """What a record is the result of: two records that agree here are two measurements of one thing.

    ``draft_len`` is k of static:k, the upper limit of adaptive and shadow, the nodes of a tree, 0 without drafts. ``driver``
    is empty where the engine chose it. ``acceptance`` is the acceptance rule; empty at temperature 0, where both rules are
    one, and without drafts. ``synthetic_acceptance``: a stated curve or rate, forced; null: real.
    """

    engine: str
    mode: str
    draft_len: int
    driver: str
    drafter: str
    acceptance: str
    synthetic_acceptance: str | None
    temperature: float
    prompt_set: str
    concurrency: int
    requests: int
    max_tokens: int
    ignore_eos: bool
    repeats: int
    varies: bool
    steady: bool
    while_full: bool
    warm_up: int
    sampling: str
    machine: str
    commit: str

    @staticmethod
    def of(point: Point, work: Work, contender: Contender, origin: Origin) -> Identity:
        return Identity(
            engine=origin.engine,
            mode=contender.mode.name,
            draft_len=contender.mode.draft_len or origin.block_size,
            driver=contender.mode.driver,
            drafter=origin.drafter,
            acceptance=contender.rule or "",
            synthetic_acceptance=contender.synthetic,
            machine=origin.machine,
            commit=origin.commit,
            **dataclasses.asdict(point),
            **dataclasses.asdict(work),
        )


@dataclass(frozen=True, slots=True)
class OfflineRecord:
    """One mode at one point; medians if it was repeated.

    A round is a request's share of a step that yielded tokens. ``accepted_length`` counts rounds that verified drafts;
    ``acceptance_rate`` is accepted / verified. ``verified_per_step`` is drafted tokens verified in one forward over all its
    requests; ``budget_mean`` is drafted tokens verified a request and round, and ``window_histogram`` how many rounds
    verified how many. ``predicted_step_ms`` is what the cost table said of the steps that took ``measured_step_ms``, means,
    null where the engine does not tell. ``tokens_per_s_min`` and ``_max`` are over the repeats, ``_each`` has them in the order in
    which they ran, right after those of the other contenders.
    """

    identity: Identity
    output_tokens: int
    seconds: float
    tokens_per_s: float
    tokens_per_s_per_user: float
    accepted_length: float
    acceptance_rate: float
    verified_per_step: float
    budget_mean: float
    window_histogram: Mapping[int, int]
    predicted_step_ms: float | None
    measured_step_ms: float | None
    ttft_p50_ms: float
    tpot_p50_ms: float | None
    tokens_per_s_min: float
    tokens_per_s_max: float
    tokens_per_s_each: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """All fields on one level, as they are written."""
        fields = dataclasses.asdict(self)
        identity: dict[str, Any] = fields.pop("identity")
        return identity | fields


def make_record(identity: Identity, runs: Sequence[Run]) -> OfflineRecord:
    """The record of the repeats of one contender at one point."""
    rates = [rate_while_full(run.timelines, identity.concurrency) if identity.while_full else _tokens(run) / run.seconds for run in runs]
    timelines = [timeline for run in runs for timeline in run.timelines]
    per_token = [timeline.tpot_s for timeline in timelines if timeline.tpot_s is not None]
    counts = _sum([run.counts for run in runs])
    rate = median(rates)
    return OfflineRecord(
        identity=identity,
        output_tokens=round(median([_tokens(run) for run in runs])),
        seconds=round(median([run.seconds for run in runs]), 4),
        tokens_per_s=round(rate, 1),
        tokens_per_s_per_user=round(rate / identity.concurrency, 1),
        accepted_length=round(accepted_length(counts.accepted, counts.drafted_rounds), 3),
        acceptance_rate=round(counts.accepted / counts.verified, 3) if counts.verified else 0.0,
        verified_per_step=round(counts.verified / counts.steps, 3) if counts.steps else 0.0,
        budget_mean=round(counts.verified / counts.rounds, 3) if counts.rounds else 0.0,
        window_histogram=dict(sorted(counts.windows.items())),
        predicted_step_ms=_mean_ms(counts.predicted_s, counts.timed_steps),
        measured_step_ms=_mean_ms(counts.measured_s, counts.timed_steps),
        ttft_p50_ms=_ms([timeline.ttft_s for timeline in timelines]),
        tpot_p50_ms=_ms(per_token) if per_token else None,
        tokens_per_s_min=round(min(rates), 1),
        tokens_per_s_max=round(max(rates), 1),
        tokens_per_s_each=tuple(round(one, 2) for one in rates),
    )


def _sum(counts: Sequence[Counts]) -> Counts:
    windows: Counter[int] = Counter()
    for count in counts:
        windows.update(count.windows)
    return Counts(
        steps=sum(count.steps for count in counts),
        windows=windows,
        accepted=sum(count.accepted for count in counts),
        timed_steps=sum(count.timed_steps for count in counts),
        predicted_s=sum(count.predicted_s for count in counts),
        measured_s=sum(count.measured_s for count in counts),
    )


def _tokens(run: Run) -> int:
    return sum(timeline.num_tokens for timeline in run.timelines)


def _ms(seconds: Sequence[float]) -> float:
    return round(median(seconds) * 1e3, 3)


def _mean_ms(seconds: float, count: int) -> float | None:
    return round(1e3 * seconds / count, 3) if count else None
