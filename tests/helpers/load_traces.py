"""A cluster that is only arithmetic: arrivals in, replicas with a cost table, requests and their latencies out.

Every verifier is a queue in front of ``places`` places whose token rate falls with the rows in a step. Deterministic but for
``noise``, which is seeded.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from dspark.router.samples import Sample
from dspark.router.scaling import Decision, Report, VerifierScaler
from dspark.types import LatencyBudget, ReplicaView

OUTPUT_TOKENS = 60.0
STEP_S = 0.1
TABLE = tuple((rows, 0.020 + 0.001 * rows) for rows in range(1, 129))


@dataclass
class Running:
    arrived_s: float
    left: float = OUTPUT_TOKENS
    first_s: float | None = None


@dataclass
class Replica:
    id: str
    since_s: float
    ready_s: float
    requests: list[Running] = field(default_factory=list)
    draining: bool = False


@dataclass
class Trace:
    """Moves in steps of ``STEP_S`` and decides once a second; ``arrivals(t)`` requests a second go to the shortest queue."""

    scaler: VerifierScaler
    arrivals: Callable[[float], float]
    replicas: int = 1
    places: int = 16
    budget: LatencyBudget = field(default_factory=lambda: LatencyBudget(1000, 35))
    start_s: float = 3.0
    capacity: int = 1000  # replicas that can be scheduled
    slow_start_s: float = 0.0  # a new replica's steps take ``slow_factor`` times as long for a while
    slow_factor: float = 2.0
    noise: float = 0.0
    drafted: float = 0.0
    accepted: float = 0.0
    silent: Callable[[float], bool] = lambda t: False
    now_s: float = 0.0
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(1)
        self._due = 0.0
        self._number = 0
        self._all = [self._new(ready_s=0.0) for _ in range(self.replicas)]
        for replica in self._all:
            replica.since_s = -1000.0

    def run(self, seconds: int) -> list[int]:
        """Ready replicas after each second."""
        return [self._tick() for _ in range(seconds)]

    def _new(self, ready_s: float) -> Replica:
        self._number += 1
        return Replica(f"v{self._number}", self.now_s, ready_s)

    @property
    def _ready(self) -> list[Replica]:
        return [r for r in self._all if r.ready_s <= self.now_s and not r.draining]

    def _tick(self) -> int:
        samples: list[Sample] = []
        for _ in range(round(1 / STEP_S)):
            self.now_s += STEP_S
            self._due += self.arrivals(self.now_s) * STEP_S
            while self._due >= 1.0:
                self._due -= 1.0
                min(self._ready, key=lambda r: len(r.requests)).requests.append(Running(self.now_s))
            samples += [sample for replica in self._all for sample in self._serve(replica)]
        samples += [
            Sample(replica.id, request.arrived_s, self.budget, self.now_s - request.arrived_s, ended=False)
            for replica in self._all
            for request in replica.requests[self.places :]
        ]
        self._all = [r for r in self._all if not (r.draining and not r.requests)]
        reports = [Report(self._view(r), True, self.now_s - r.ready_s if r.since_s >= 0 else 1e6) for r in self._ready]
        decision = self.scaler.decide(self.now_s, reports, samples)
        self.decisions.append(decision)
        self._obey(decision.wanted)
        return len(self._ready)

    def _obey(self, wanted: int) -> None:
        """What Serve does with the wanted count."""
        kept = [r for r in self._all if not r.draining]
        for replica in sorted(kept, key=lambda r: -r.ready_s)[: max(len(kept) - wanted, 0)]:
            replica.draining = True
        for _ in range(wanted - len(kept)):
            schedulable = len([r for r in self._all if not r.draining]) < self.capacity
            self._all.append(self._new(self.now_s + self.start_s if schedulable else math.inf))

    def _serve(self, replica: Replica) -> list[Sample]:
        """One step of one replica: the requests that end in it."""
        running = replica.requests[: self.places]
        limit = self.scaler.limit
        drafted = self.drafted * limit
        step_s = 0.020 + 0.001 * len(running) * (1 + drafted)
        if replica.since_s >= 0 and self.now_s - replica.ready_s < self.slow_start_s:
            step_s *= self.slow_factor
        tpot_s = step_s / (1 + self.accepted * (1 - (1 - limit) ** 2)) * (1 + self.noise * (2 * self._random.random() - 1))
        samples = []
        for request in running:
            if request.first_s is None:
                request.first_s = self.now_s
            request.left -= STEP_S / tpot_s
            if request.left <= 0:
                ttft_s = request.first_s - request.arrived_s + 2 * step_s
                per_token_s = (self.now_s - request.first_s + STEP_S) / OUTPUT_TOKENS
                samples.append(Sample(replica.id, request.arrived_s, self.budget, ttft_s, per_token_s))
        replica.requests = [request for request in replica.requests if request.left > 0]
        return samples

    def _view(self, replica: Replica) -> ReplicaView:
        count = len(replica.requests)
        limit = self.scaler.limit
        return dataclasses.replace(
            ReplicaView(replica.id, "x", 0, 0, self.places, 0, 1000, 1000, step_costs=TABLE, max_step_tokens=128),
            running=min(count, self.places),
            queued=max(count - self.places, 0),
            queued_tokens=50 * max(count - self.places, 0),
            drafted_per_round=self.drafted * limit,
            tokens_per_round=1 + self.accepted * (1 - (1 - limit) ** 2),
            speculation_limit=limit,
            age_s=60.0 if self.silent(self.now_s) else 0.1,
        )
