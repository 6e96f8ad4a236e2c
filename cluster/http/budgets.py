"""Latency budgets as the client sees them: each choice from arrival to its last token, against what it was promised."""

from __future__ import annotations

from collections import deque
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry, Counter

from dspark.router.classes import Terms
from dspark.router.samples import Sample, tpot_met, ttft_met

MAX_SAMPLES: Final = 10_000  # kept for scaling between two looks


class Stopwatch:
    """Times of one choice, in seconds of one monotonic clock."""

    __slots__ = ("arrived_s", "first_s", "last_s", "num_tokens", "terms")

    def __init__(self, terms: Terms, arrived_s: float) -> None:
        self.terms = terms
        self.arrived_s = arrived_s
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.num_tokens = 0

    def chunk(self, now_s: float, num_tokens: int) -> None:
        """Tokens go out."""
        if self.first_s is None:
            self.first_s = now_s
        self.last_s = now_s
        self.num_tokens += num_tokens

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """(Last token - first) / (tokens - 1); None with fewer than two tokens."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


class Placed(Protocol):
    """Something that runs at a verifier."""

    @property
    def replica_id(self) -> str: ...


class Ledger:
    """Counts which budgets were met, by service class, and keeps the choices of late for scaling.

    A choice without a first token whose ``ttft_ms`` has passed missed its budget, whether or not its client still waits.
    One whose client left before that says nothing. A choice that failed met nothing.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model = model_name

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"dspark_{name}", text, ["model_name", "service_class", *more], registry=registry)

        self._budgets = counter("budget_requests", "Choices with a latency budget, by whether it was met.", "budget", "met")
        self._good = counter("goodput_requests", "Choices that met all of their latency budgets.")
        self._by_replica = Counter(
            "dspark_replica_budget_requests",
            "Choices with a latency budget, by verifier and by whether all of it was met.",
            ["model_name", "replica", "met"],
            registry=registry,
        )
        self._late = counter("late_rejections", "Requests refused since no verifier could keep their latency budget.")
        self._open: dict[Stopwatch, Placed] = {}
        self._ended: deque[Sample] = deque(maxlen=MAX_SAMPLES)

    def opened(self, watch: Stopwatch, generation: Placed) -> None:
        """A choice was queued."""
        self._open[watch] = generation

    def closed(self, watch: Stopwatch, now_s: float, finished: bool, failed: bool) -> None:
        """A choice finished, failed, or its client left."""
        replica_id = self._open.pop(watch).replica_id
        budget = watch.terms.budget
        by_ttft, by_tpot = ttft_met(budget, watch.ttft_s), tpot_met(budget, watch.tpot_s)
        if watch.first_s is None and ttft_met(budget, now_s - watch.arrived_s) is False:
            by_ttft = False
        if failed:
            by_ttft = None if budget.ttft_ms is None else bool(by_ttft)
            by_tpot = None if budget.tpot_ms is None else False
        for name, met in (("ttft", by_ttft), ("tpot", by_tpot)):
            if met is not None:
                self._budgets.labels(self._model, watch.terms.service_class, name, str(met).lower()).inc()
        if by_ttft is not None or by_tpot is not None:
            kept = by_ttft is not False and by_tpot is not False
            self._by_replica.labels(self._model, replica_id, str(kept).lower()).inc()
            if kept and finished:
                self._good.labels(self._model, watch.terms.service_class).inc()
        if finished:
            self._ended.append(Sample(replica_id, watch.arrived_s, budget, watch.ttft_s, watch.tpot_s))

    def refused_late(self, service_class: str) -> None:
        """A request was refused because its budget could not be kept."""
        self._late.labels(self._model, service_class).inc()

    def take(self, now_s: float) -> list[Sample]:
        """Choices that finished since the last call, and those that still wait for their first token."""
        ended = list(self._ended)
        self._ended.clear()
        waiting = [
            Sample(generation.replica_id, watch.arrived_s, watch.terms.budget, now_s - watch.arrived_s, ended=False)
            for watch, generation in self._open.items()
            if watch.first_s is None
        ]
        return ended + waiting


def shown(watches: list[Stopwatch]) -> dict[str, Any]:
    """The response's ``metrics.latency_budget``: promises, and what the slowest choice measured. Empty without a budget."""
    terms = watches[0].terms
    budget = terms.budget
    if budget.ttft_ms is None and budget.tpot_ms is None:
        return {}
    ttft_s = max((watch.ttft_s for watch in watches if watch.ttft_s is not None), default=None)
    tpot_s = max((watch.tpot_s for watch in watches if watch.tpot_s is not None), default=None)
    return {
        "latency_budget": {
            "service_class": terms.service_class or None,
            "ttft_ms": budget.ttft_ms,
            "tpot_ms": budget.tpot_ms,
            "measured_ttft_ms": _ms(ttft_s),
            "measured_tpot_ms": _ms(tpot_s),
            "met": ttft_met(budget, ttft_s) is not False and tpot_met(budget, tpot_s) is not False,
        }
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
