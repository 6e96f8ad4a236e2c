"""Host time of a step's decisions about drafts: what they cost while the device could be computing.

For R decoding requests with γ drafted tokens each, made up as one call of a drafter would leave them; nothing of a model runs. One
row an estimator, medians in microseconds::

    share      the scheduler's part: noting who takes part, with which tokens, draft and limit, while it gives out tokens (``Shares``)
    estimate   survival of every drafted token
    rank       their order
    schedule   seconds of every count, the best count, what it means for each request
    plan       the three before it as the scheduler asks for them once a step, the planner's own bookkeeping included
    learn      afterwards, beside the next step: noting R judged drafts and learning from them
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

import numpy as np

from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.metrics import median
from dspark.bench.tables import Column, Table
from dspark.sampling import SamplingParams
from dspark.types import DraftSignals, DraftTree, Request, SignalRows, Speculation

if TYPE_CHECKING:
    from dspark.workers.verifier.draft_planner import DraftPlanner
    from dspark.workers.verifier.sequence import Sequence as Running

CONTEXT = 256  # tokens of each request
WARM_UP = 20
STAGES = ("share", "estimate", "rank", "schedule", "plan", "learn")
COLUMNS = [
    Column("requests", 8),
    Column("positions", 9),
    Column("estimator", 9, is_text=True),
    *(Column(f"{stage} us", 11) for stage in STAGES),
]


@dataclass(frozen=True, slots=True)
class PlannerRecord:
    """Medians of ``repeats`` steps in microseconds, ``estimate_us`` and so on."""

    requests: int
    positions: int
    estimator: str
    medians: dict[str, float]
    repeats: int
    machine: str
    commit: str
    kind: str = "planner"


def run_planner(requests: Sequence[int], positions: int, estimators: Sequence[str], repeats: int, out: TextIO | None) -> None:
    """Measure every estimator at every number of requests, print a table, append JSON lines to ``out``."""
    machine, commit = describe_machine(), source_commit()
    print(f"{machine}; {commit}; medians of {repeats} steps")
    table = Table(COLUMNS)
    for count in requests:
        for name in estimators:
            times = measure(count, positions, name, repeats)
            table.row(count, positions, name, *(times[stage] for stage in STAGES))
            medians = {f"{stage}_us": round(times[stage], 2) for stage in STAGES}
            record = PlannerRecord(count, positions, name, medians, repeats, machine, commit)
            if out is not None:
                print(json.dumps(dataclasses.asdict(record)), file=out, flush=True)


def measure(num_requests: int, positions: int, estimator: str, repeats: int) -> dict[str, float]:
    """Median microseconds of every stage."""
    step = _Step(num_requests, positions, estimator)
    stages: dict[str, Callable[[], object]] = {stage: getattr(step, stage) for stage in STAGES}
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for repeat in range(WARM_UP + repeats):
        for stage, run in stages.items():
            start = time.perf_counter()
            run()
            if repeat >= WARM_UP:
                seconds[stage].append(time.perf_counter() - start)
    return {stage: 1e6 * median(values) for stage, values in seconds.items()}


class _Step:
    """The decisions of one step, each stage on what the one before it left."""

    def __init__(self, num_requests: int, positions: int, estimator: str) -> None:
        self.planner = _make_planner(num_requests, positions, estimator)
        draw = np.random.default_rng(0)
        size = (num_requests, positions)
        signals = SignalRows(draw.uniform(0.2, 0.99, size), draw.normal(1.0, 2.0, size))
        self.running = [self._sequence(i, signals) for i in range(num_requests)]
        self.most = num_requests * positions

    def _sequence(self, row: int, signals: SignalRows) -> Running:
        from dspark.workers.verifier.sequence import Sequence as Running

        name = f"r{row}"
        sure, margin = signals.confidence[row].tolist(), signals.margin[row].tolist()
        positions = len(sure)
        request = Request(name, tuple(range(CONTEXT)), SamplingParams(temperature=0.0))
        sequence = Running.of(request, Speculation(), 2 * CONTEXT)
        sequence.num_computed, sequence.drafts_wanted, sequence.draft_depth = CONTEXT - 1, positions, positions
        sequence.draft = DraftTree.chain(name, CONTEXT, [1] * positions, sure, None, margin, signals, row)
        return sequence

    def share(self) -> None:
        from dspark.workers.verifier.shares import Shares

        self.shares = Shares()
        for sequence in self.running:
            self.shares.add(sequence, 1, math.inf)

    def estimate(self) -> None:
        self.survival = self.planner.survival.survival(self.shares.drafts)

    def rank(self) -> None:
        from dspark.workers.verifier.planner import rank

        self.ranking = rank(self.survival)

    def schedule(self) -> list[int]:
        from dspark.workers.verifier.planner import best_count

        assert self.planner.costs is not None
        seconds = self.shares.seconds(self.planner.costs, self.most)
        lengths: list[int] = self.ranking.lengths(best_count(self.ranking, len(self.running), seconds)).tolist()
        return lengths

    def plan(self) -> None:
        self.planner.plan(self.shares, self.most, 0.001)

    def learn(self) -> None:
        for tree in self.shares.drafts:
            self.planner.survival.observe(tree, len(tree.tokens), range(len(tree.tokens) // 2))
        self.planner.survival.learn()


def _make_planner(num_requests: int, positions: int, estimator: str) -> DraftPlanner:
    from dspark.workers.verifier.costs import CostTable, Curve, LiveCosts
    from dspark.workers.verifier.draft_planner import DraftPlanner
    from dspark.workers.verifier.draft_policy import DraftPolicy
    from dspark.workers.verifier.survival import make_estimator

    most = num_requests * (positions + 1)
    verify = Curve((1, num_requests + 1, most + 1), (0.005, 0.008, 0.02))
    survival = make_estimator(estimator, positions, DraftSignals(True, (0.6,), (0.05,)))
    return DraftPlanner(DraftPolicy(positions), survival, LiveCosts(CostTable(verify), most))
