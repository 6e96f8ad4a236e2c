"""Requests on their way through an engine's thread: submitted here, their outcomes collected here."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dspark.errors import DSparkError, Overloaded
from dspark.outputs import Collector, Delta, RequestOutput, make_output
from dspark.types import StepOutcome

if TYPE_CHECKING:
    from types import TracebackType

    from dspark.workers.verifier.host import EngineHost


class Flight:
    """Requests of one caller. ``owner`` is kept alive while they run: its end would stop the engine.

    ``wakes_at_end``: the caller is woken only by steps that end a request, because every thread that wakes up takes time from the engine's.
    """

    def __init__(self, host: EngineHost, owner: object, wakes_at_end: bool = False) -> None:
        self._host = host
        self._owner = owner
        self._wakes_at_end = wakes_at_end
        self._arrived: deque[tuple[float, Sequence[StepOutcome]]] = deque()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for every time that it is worth looking there
        self._running: dict[str, Collector] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, collector: Collector) -> None:
        """Start a request; BadRequest, Overloaded or WorkerLost if the engine does not take it."""
        request = collector.request
        self._running[request.id] = collector
        collector.submitted_at = time.perf_counter()
        try:
            self._host.submit(request, self._sink)
        except DSparkError:
            del self._running[request.id]
            raise

    def receive(self) -> list[Delta]:
        """Wait for steps that concern these requests and return what they added."""
        return [collector.take(outcome, arrived_at) for collector, outcome, arrived_at in self._next()]

    def note(self) -> None:
        """``receive`` without the text, which is made with the last outcome's."""
        for collector, outcome, arrived_at in self._next():
            collector.note(outcome, arrived_at)

    def _next(self) -> Iterator[tuple[Collector, StepOutcome, float]]:
        """Everything that has arrived, once it is worth looking, with the time when it did."""
        self._wake.get()
        while self._arrived:
            arrived_at, outcomes = self._arrived.popleft()
            for collector, outcome in self._of_ours(outcomes):
                yield collector, outcome, arrived_at

    def _of_ours(self, outcomes: Sequence[StepOutcome]) -> Iterator[tuple[Collector, StepOutcome]]:
        """The outcomes of requests that were not cancelled while these were on their way."""
        for outcome in outcomes:
            collector = self._running.get(outcome.request_id)
            if collector is None:
                continue
            if outcome.finish is not None:
                del self._running[outcome.request_id]
            yield collector, outcome

    def cancel(self) -> None:
        """Stop whatever still runs; a ``receive`` that waits in another thread returns."""
        running, self._running = self._running, {}
        for request_id in running:
            self._host.cancel(request_id)
        self._wake.put(None)

    def _sink(self, outcomes: Sequence[StepOutcome]) -> None:
        self._arrived.append((time.perf_counter(), outcomes))
        if not self._wakes_at_end or any(outcome.finish is not None for outcome in outcomes):
            self._wake.put(None)


def run_all(flight: Flight, collectors: Sequence[Collector], max_concurrency: int) -> None:
    """Run requests to their end, at most ``max_concurrency`` at once and no more than the engine takes."""
    pending = deque(collectors)
    try:
        while pending or flight.num_running:
            while pending and flight.num_running < max_concurrency:
                try:
                    flight.submit(pending[0])
                except Overloaded:
                    if not flight.num_running:  # others fill the queue, and nothing of ours will make room
                        raise
                    break
                pending.popleft()
            flight.note()
    finally:
        flight.cancel()


class TokenStream:
    """Deltas of one prompt as they come. Closing it, or dropping it, aborts what still runs.

    For one thread at a time; ``output`` is the whole result once the stream has ended.
    """

    def __init__(self, flight: Flight, collectors: Sequence[Collector]) -> None:
        self._flight = flight
        self._collectors = collectors
        self._ready: deque[Delta] = deque()
        self._in_use = threading.Lock()
        try:
            for collector in collectors:
                flight.submit(collector)
        except DSparkError:
            flight.cancel()
            raise

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Delta:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("another thread is reading this stream")
        try:
            while not self._ready:
                if not self._flight.num_running:
                    raise StopIteration
                self._ready.extend(self._flight.receive())
            return self._ready.popleft()
        except DSparkError:
            self.close()
            raise
        finally:
            self._in_use.release()

    @property
    def output(self) -> RequestOutput:
        """The whole result; RuntimeError while tokens are still to come."""
        if self._ready or any(collector.finish is None for collector in self._collectors):
            raise RuntimeError("the stream has not ended: read it to its end first")
        return make_output(self._collectors)

    def close(self) -> None:
        """Abort the request if it still runs; no delta comes any more."""
        self._flight.cancel()
        self._ready.clear()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_in_use"):  # not when __init__ failed before it held anything
            self.close()
