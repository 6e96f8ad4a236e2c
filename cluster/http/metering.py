"""What one router replica measures, under our names and under those that vLLM's dashboards and scalers look for.

Families travel between router replicas as plain tuples, so that ``/metrics`` shows the sum of all of them whichever
replica answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric

from dspark.types import Finish
from dspark.workers.wire.codec import Status

Sample = tuple[str, dict[str, str], float]
Family = tuple[str, str, str, list[Sample]]  # name, type, help, samples

_SECONDS: Final = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_COUNTS: Final = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64)

# Ours → vLLM's. Counters are named without _total here, as the client library names families.
_TWINS: Final = {
    "dspark_requests": "vllm:request_success",
    "dspark_prompt_tokens": "vllm:prompt_tokens",
    "dspark_generation_tokens": "vllm:generation_tokens",
    "dspark_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "dspark_inter_chunk_latency_seconds": "vllm:inter_token_latency_seconds",
    "dspark_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "dspark_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "dspark_num_requests_running": "vllm:num_requests_running",
    "dspark_num_requests_waiting": "vllm:num_requests_waiting",
    "dspark_kv_cache_usage_perc": "vllm:kv_cache_usage_perc",
    "dspark_prefix_cache_queries": "vllm:prefix_cache_queries",
    "dspark_prefix_cache_hits": "vllm:prefix_cache_hits",
    "dspark_preemptions": "vllm:num_preemptions",
    "dspark_drafted_rounds": "vllm:spec_decode_num_drafts",
    "dspark_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "dspark_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "dspark_accepted_tokens_per_pos": "vllm:spec_decode_num_accepted_tokens_per_pos",
}
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
_OF_ROUTER: Final = {"generation_tokens_total"}  # counted here per request, by the engine per replica: one of them is enough


@dataclass(slots=True)
class Timing:
    """When things happened to one HTTP request, in seconds of one monotonic clock."""

    arrived: float
    first: float | None = None
    last: float | None = None
    num_tokens: int = 0
    finishes: list[Finish] = field(default_factory=list)


class Meter:
    """Histograms and counters of one router replica, labelled with the served model."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.registry = CollectorRegistry()
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first content chunk, queueing included.")
        self._chunk_s = self._histogram(
            "inter_chunk_latency_seconds", "Time between content chunks of one choice; a chunk is a verify round."
        )
        self._chunk_tokens = self._histogram("tokens_per_chunk", "Tokens of one content chunk.", _COUNTS)
        self._tpot = self._histogram("time_per_output_token_seconds", "(End - first token) / (tokens - 1) of a request.")
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to the end of the response.")
        self._requests = self._counter("requests", "Choices that ended, by reason.", "finished_reason")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens taken in.").labels(model_name)
        self._tokens = self._counter("generation_tokens", "Tokens generated.").labels(model_name)
        self._errors = self._counter("http_errors", "Error responses, by status.", "status")
        self._replays = self._counter("replays", "Requests continued on another verifier after theirs was lost.").labels(model_name)
        self._moves = self._counter("moves", "Requests continued on another verifier since theirs was shutting down.").labels(model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        histogram = Histogram(f"dspark_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
        return histogram.labels(self.model_name)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dspark_{name}", text, ["model_name", *labels], registry=self.registry)

    def follow(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a gauge whose value is asked for whenever metrics are read."""
        Gauge(f"dspark_{name}", text, ["model_name"], registry=self.registry).labels(self.model_name).set_function(value)

    def took(self, num_prompt_tokens: int) -> None:
        """A prompt was queued."""
        self._prompt_tokens.inc(num_prompt_tokens)

    def chunk(self, timing: Timing, now: float, previous: float | None, num_tokens: int) -> None:
        """A content chunk of one choice goes out; ``previous`` is when that choice's last one did."""
        if timing.first is None:
            timing.first = now
            self._ttft.observe(now - timing.arrived)
        if previous is not None:
            self._chunk_s.observe(now - previous)
        timing.last = now
        timing.num_tokens += num_tokens
        self._chunk_tokens.observe(num_tokens)
        self._tokens.inc(num_tokens)

    def ended(self, timing: Timing, now: float, finishes: Iterable[str], num_replays: int, num_moves: int) -> None:
        """A response is complete, or its client left."""
        for finish in finishes:
            self._requests.labels(self.model_name, finish).inc()
        self._replays.inc(num_replays)
        self._moves.inc(num_moves)
        self._e2e.observe(now - timing.arrived)
        if timing.first is not None and timing.last is not None and timing.num_tokens > 1:
            self._tpot.observe((timing.last - timing.first) / (timing.num_tokens - 1))

    def refused(self, status: int) -> None:
        """An error response goes out."""
        self._errors.labels(self.model_name, str(status)).inc()

    def families(self) -> list[Family]:
        """Everything measured, as plain values."""
        return [_plain(metric) for metric in self.registry.collect()]


def _plain(metric: Metric) -> Family:
    samples = [(s.name, dict(s.labels), s.value) for s in metric.samples if not s.name.endswith("_created")]
    return metric.name, metric.type, metric.documentation, samples


def engine_families(statuses: Iterable[Status], model_name: str) -> list[Family]:
    """The verifiers' own counters and gauges, one series a replica."""
    families: dict[str, Family] = {}
    for status in statuses:
        values = dict(status.stats) | {"healthy": float(status.healthy), "draining": float(status.view.draining)}
        for key, value in values.items():
            if key in _OF_ROUTER:
                continue
            key, own_labels = _split_labels(key)
            is_counter = key.endswith("_total")
            name = "dspark_" + key.removesuffix("_total")
            family = families.setdefault(name, (name, "counter" if is_counter else "gauge", f"{key} of each verifier.", []))
            labels = {"model_name": model_name, "replica": status.view.id} | own_labels
            family[3].append((name + "_total" if is_counter else name, labels, value))
    return list(families.values())


def _split_labels(key: str) -> tuple[str, dict[str, str]]:
    """The name and the labels of a statistic: ``rounds_total{drafts="3"}`` has one."""
    name, _, rest = key.partition("{")
    return name, dict(_LABEL.findall(rest))


def merged(parts: Iterable[Iterable[Family]]) -> list[Family]:
    """One family of each name, equal series added up."""
    kept: dict[str, Family] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in (family for part in parts for family in part):
        kept.setdefault(family[0], family)
        series = sums.setdefault(family[0], {})
        for sample_name, labels, value in family[3]:
            key = (sample_name, tuple(labels.items()))
            series[key] = series.get(key, 0.0) + value
    return [
        (name, kind, text, [(sample, dict(labels), value) for (sample, labels), value in sums[name].items()])
        for name, kind, text, _ in kept.values()
    ]


class _Families:
    """Families as a collector of the client library."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for name, kind, text, samples in self._families:
            for shown in (name, *([_TWINS[name]] if name in _TWINS else [])):
                metric = Metric(shown, text, kind)
                for sample_name, labels, value in samples:
                    metric.add_sample(shown + sample_name.removeprefix(name), labels, value)
                yield metric


def exposition(families: Sequence[Family]) -> bytes:
    """The families and their twins in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)
