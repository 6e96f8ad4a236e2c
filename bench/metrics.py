"""Arithmetic of serving metrics on plain numbers: no clocks, no engines.

Definitions (all times of one answer are seconds on one clock):

============  =====================================================================
TTFT          first content chunk - sent; time in queues is part of it
E2E           last content chunk - sent
TPOT          (E2E - TTFT) / (tokens - 1); undefined for answers of one token
chunk ITL     gap between two content chunks of one answer
while full    tokens until a stream ends that no request follows / seconds until then
goodput       answers a second that met *every* limit; a failed request meets none
accepted len  1 + accepted drafted tokens / rounds that verified drafts
============  =====================================================================
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the parts of one answer arrived. ``num_tokens`` counts all its tokens, over all chunks."""

    sent_s: float
    chunk_s: tuple[float, ...]
    num_tokens: int

    def __post_init__(self) -> None:
        if not self.chunk_s or self.num_tokens < 1:
            raise ValueError("a timeline needs at least one chunk and one token")

    @property
    def ttft_s(self) -> float:
        return self.chunk_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.chunk_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None for answers of one token."""
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def gaps_s(self) -> tuple[float, ...]:
        return tuple(later - earlier for earlier, later in zip(self.chunk_s, self.chunk_s[1:], strict=False))


def rate_while_full(timelines: Sequence[Timeline], concurrency: int) -> float:
    """Tokens a second of a run with so many streams at once, until one of them ended for which no request waited.

    An answer that went on then counts by the share of its chunks that had come. ValueError for fewer answers than streams.
    """
    if len(timelines) < concurrency:
        raise ValueError(f"{len(timelines)} answers never kept {concurrency} streams busy")
    end_s = sorted(timeline.chunk_s[-1] for timeline in timelines)[len(timelines) - concurrency]
    tokens = sum(t.num_tokens * sum(chunk <= end_s for chunk in t.chunk_s) / len(t.chunk_s) for t in timelines)
    return tokens / (end_s - min(timeline.sent_s for timeline in timelines))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to count as good; None: no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def are_met(self, timeline: Timeline) -> bool:
        """Whether both limits hold; an answer of one token has no TPOT to miss."""
        if self.ttft_ms is not None and timeline.ttft_s * 1e3 > self.ttft_ms:
            return False
        return self.tpot_ms is None or timeline.tpot_s is None or timeline.tpot_s * 1e3 <= self.tpot_ms


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of one quantity in milliseconds; None where nothing was measured."""

    p50: float | None
    p90: float | None
    p99: float | None

    @staticmethod
    def of_seconds(values: Sequence[float]) -> Spread:
        if not values:
            return Spread(None, None, None)
        p50, p90, p99 = (round(percentile(values, percent) * 1e3, 3) for percent in (50, 90, 99))
        return Spread(p50, p90, p99)


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """One load test in numbers. Throughput and goodput are over ``seconds``, from the first request sent to the last byte."""

    requests: int
    errors: int
    seconds: float
    output_tokens: int
    tokens_per_s: float
    requests_per_s: float
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    tokens_per_chunk: float
    goodput_per_s: float
    goodput_share: float


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile with linear interpolation between the two nearest ranks; ValueError without values."""
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(values)} values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    return percentile(values, 50)


def accepted_length(accepted: int, drafted_rounds: int) -> float:
    """Tokens a round that verified drafts yields on average, the target's own included; 1.0 without drafts."""
    return 1.0 + accepted / drafted_rounds if drafted_rounds else 1.0


def poisson_arrivals(rate_per_s: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which ``count`` requests of a Poisson process arrive, the same for the same seed."""
    if rate_per_s <= 0:
        raise ValueError(f"the rate must be over 0, not {rate_per_s}")
    draw, clock, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        clock += draw.expovariate(rate_per_s)
        arrivals.append(clock)
    return arrivals


def summarize(answered: Sequence[tuple[Timeline, Limits]], errors: int, seconds: float) -> LoadSummary:
    """Sum up a load test of answered (each with the limits it should keep) and failed requests that took ``seconds``."""
    if seconds <= 0:
        raise ValueError(f"a load test takes time, not {seconds} s")
    timelines = [timeline for timeline, _ in answered]
    requests = len(timelines) + errors
    tokens = sum(timeline.num_tokens for timeline in timelines)
    chunks = sum(len(timeline.chunk_s) for timeline in timelines)
    good = sum(limits.are_met(timeline) for timeline, limits in answered)
    return LoadSummary(
        requests=requests,
        errors=errors,
        seconds=round(seconds, 4),
        output_tokens=tokens,
        tokens_per_s=round(tokens / seconds, 1),
        requests_per_s=round(len(timelines) / seconds, 3),
        ttft_ms=Spread.of_seconds([timeline.ttft_s for timeline in timelines]),
        tpot_ms=Spread.of_seconds([timeline.tpot_s for timeline in timelines if timeline.tpot_s is not None]),
        itl_ms=Spread.of_seconds([gap for timeline in timelines for gap in timeline.gaps_s]),
        tokens_per_chunk=round(tokens / chunks, 3) if chunks else 0.0,
        goodput_per_s=round(good / seconds, 3),
        goodput_share=round(good / requests, 4) if requests else 0.0,
    )
