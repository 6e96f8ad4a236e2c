"""The draft workers that a verifier knows: opens a stream to each, and judges which of them can be relied on.

A worker that was waited for in vain is left alone for a pause that doubles with each miss in a row. So a slow or dead worker
costs a verifier one wait, then hardly anything, and comes back by itself. One that leaves a batch unanswered for too long is
connected to afresh, even if its process shows signs of life.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from dspark.drafting import DraftBatch, DraftLayout, DraftSession, DraftWorkerFacts, OpenSession, TurnBatch
from dspark.errors import DSparkError, ProtocolMismatch
from dspark.types import DraftTurn

MAX_PENDING: Final = 8  # batches without an answer; a worker with more is not sent any
STUCK_S: Final = 10.0  # a batch without an answer for this long ends its stream
PAUSE_S: Final = 0.25  # after the first miss
MAX_PAUSE_S: Final = 8.0
RETRY_S: Final = 0.1  # after the first failure to connect
MAX_RETRY_S: Final = 5.0
NEVER_S: Final = 1e6
STEADY_S: Final = 5.0  # a stream that lived this long did not fail at once

_log = logging.getLogger(__name__)

Clock = Callable[[], float]


@dataclass(slots=True)
class Trust:
    """Whether a worker keeps its time; outlives its streams."""

    misses: int = 0  # waits in vain since the last answer that came in time
    pause_until_s: float = 0.0

    def miss(self, now_s: float) -> None:
        """It was waited for in vain."""
        self.misses += 1
        self.pause_until_s = now_s + min(MAX_PAUSE_S, PAUSE_S * 2 ** (self.misses - 1))

    def keep(self) -> None:
        """An answer was there when it was wanted."""
        self.misses = 0


@dataclass(frozen=True, slots=True)
class Round:
    """One batch, from sending it to its answer, on the verifier's clock; ``worker_s`` is what computing took at the worker."""

    worker_id: str
    num_drafting: int
    sent_s: float
    answered_s: float
    worker_s: float


@dataclass(slots=True)
class RoundTimes:
    """How long rounds take by the number of requests that are drafted for: a line through recent ones, older ones fading."""

    KEEP = 0.98

    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of 1, n, n², t, n·t

    def observe(self, num_requests: int, seconds: float) -> None:
        """Take in one round."""
        terms = (1.0, num_requests, num_requests**2, seconds, num_requests * seconds)
        self._sums = [self.KEEP * total + term for total, term in zip(self._sums, terms, strict=True)]

    def __call__(self, num_requests: int) -> float:
        """Predicted seconds; never less for more requests, at most in proportion to them. 0 before the first round."""
        weight = self._sums[0]
        if not weight:
            return 0.0
        mean_n, mean_nn, mean_t, mean_nt = (total / weight for total in self._sums[1:])
        variance = mean_nn - mean_n**2
        slope = max(0.0, mean_nt - mean_n * mean_t) / variance if variance > 1e-6 else 0.0
        return mean_t + min(slope, mean_t / mean_n) * (num_requests - mean_n)


class DraftLink:
    """One open stream to a worker, and what it still owes. Hears the transport; read by the engine's thread."""

    def __init__(self, worker_id: str, trust: Trust, changed: threading.Condition, clock: Clock) -> None:
        self.worker_id = worker_id
        self.trust = trust
        self.session: DraftSession | None = None
        self.is_draining = False
        self.lost_reason: str | None = None
        self.pending: dict[int, tuple[float, int]] = {}  # batch number -> when it was sent, and for how many drafts
        self._answers: deque[tuple[DraftBatch, Round]] = deque()
        self._changed = changed
        self._clock = clock
        self._next_seq = 0
        self._missed_seq = -1  # the newest batch that was waited for in vain

    @property
    def is_open(self) -> bool:
        return self.session is not None and self.lost_reason is None

    def is_usable(self, now_s: float) -> bool:
        """Whether it may be sent a batch: open, not too far behind, and not to be left alone after a miss."""
        if not self.is_open or len(self.pending) >= MAX_PENDING or self.is_overdue:
            return False
        return not self.trust.misses or now_s >= self.trust.pause_until_s

    @property
    def is_overdue(self) -> bool:
        """Whether it still owes what was waited for in vain. Nobody waits for it again before that has come: it may be dead."""
        return next(iter(list(self.pending)), self._next_seq) <= self._missed_seq

    def miss(self, seq: int, now_s: float) -> None:
        """Batch ``seq`` was waited for in vain."""
        self._missed_seq = max(self._missed_seq, seq)
        self.trust.miss(now_s)

    def end_if_stuck(self, now_s: float) -> None:
        """End the stream if a batch has waited too long for its answer."""
        oldest_s, _ = next(iter(list(self.pending.values())), (now_s, 0))
        if now_s - oldest_s > STUCK_S and self.session is not None:
            self.session.end()

    @property
    def next_seq(self) -> int:
        """The number that the next batch will have."""
        return self._next_seq

    def send(self, turns: Sequence[DraftTurn], wait_ready: Callable[[], None]) -> int:
        """Send turns; returns the number of their batch."""
        assert self.session is not None
        seq = self._next_seq
        self._next_seq += 1
        with self._changed:
            self.pending[seq] = (self._clock(), sum(turn.max_draft > 0 for turn in turns))
        self.session.send(TurnBatch(seq, tuple(turns), wait_ready))
        return seq

    def close_requests(self, request_ids: Sequence[str]) -> None:
        """Let the worker forget requests."""
        if self.session is not None:
            self.session.close_requests(request_ids)

    def take(self) -> list[tuple[DraftBatch, Round]]:
        """Answers since the last call, and how they came about."""
        with self._changed:
            answers = list(self._answers)
            self._answers.clear()
        return answers

    def arrived(self, batch: DraftBatch) -> None:
        with self._changed:
            sent_s, count = self.pending.get(batch.seq, (self._clock(), 0))
            self._answers.append((batch, Round(self.worker_id, count, sent_s, self._clock(), batch.seconds)))
            for seq in [seq for seq in self.pending if seq <= batch.seq]:  # streams keep order: an older one is lost
                del self.pending[seq]
            self._changed.notify_all()

    def drains(self) -> None:
        self.is_draining = True

    def lost(self, reason: str) -> None:
        with self._changed:
            self.lost_reason = self.lost_reason or reason
            self.pending.clear()
            self._changed.notify_all()


@dataclass(slots=True)
class _Worker:
    """A worker and the stream to it. ``is_named``: it shall be used and connected to again; otherwise until its stream ends.

    ``refusal``: why it and this verifier do not fit.
    """

    facts: DraftWorkerFacts
    trust: Trust = field(default_factory=Trust)
    link: DraftLink | None = None
    is_named: bool = True
    refusal: str | None = None


class DraftLinks:
    """Streams to all workers that ``set_workers`` named, one thread each that keeps its stream open."""

    def __init__(self, layout: DraftLayout, open_session: OpenSession, clock: Clock = time.perf_counter) -> None:
        self.layout = layout
        self.clock = clock
        self.num_lost = 0
        self._ended_bytes = [0, 0]  # sent and received on streams that have ended
        self._open_session = open_session
        self._changed = threading.Condition()
        self._workers: dict[str, _Worker] = {}
        self._is_closed = False

    def set_workers(self, facts: Iterable[DraftWorkerFacts]) -> None:
        """Use these workers from now on; others only while there are none of these, and until their streams end."""
        wanted = {fact.worker_id: fact for fact in facts}
        with self._changed:
            for name, worker in self._workers.items():
                worker.is_named = wanted.get(name) == worker.facts
            known = {name for name, worker in self._workers.items() if worker.is_named}
            fresh = [_Worker(fact) for name, fact in wanted.items() if name not in known and not self._is_closed]
            self._workers.update({worker.facts.worker_id: worker for worker in fresh})
            self._changed.notify_all()
        for worker in fresh:
            threading.Thread(target=self._keep, args=(worker,), name=f"draft-worker-{worker.facts.worker_id}", daemon=True).start()

    def close(self) -> None:
        """End every stream, for good."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @property
    def links(self) -> list[DraftLink]:
        """Open streams."""
        with self._changed:
            return [worker.link for worker in self._workers.values() if worker.link is not None and worker.link.is_open]

    def usable(self) -> dict[str, DraftLink]:
        """Streams that may be sent turns now, by worker; those that drain only if there are no others."""
        now_s = self.clock()
        for link in self.links:
            link.end_if_stuck(now_s)
        with self._changed:
            workers = [worker for worker in self._workers.values() if worker.link is not None and worker.link.is_usable(now_s)]
        found = {worker.facts.worker_id: worker.link for worker in workers if worker.link is not None}
        staying = {worker.facts.worker_id for worker in workers if worker.is_named}
        return {name: link for name, link in found.items() if name in staying and not link.is_draining} or found

    def wait_connected(self, timeout_s: float) -> str | None:
        """Return when there is an open stream; otherwise say why not, after ``timeout_s`` or when every worker refused."""
        with self._changed:
            if self._changed.wait_for(lambda: self.links or self._refusals(), timeout_s) and self.links:
                return None
            return next(iter(self._refusals()), f"none within {timeout_s:g} s")

    def _refusals(self) -> list[str]:
        """Why no worker fits, if none does."""
        found = [worker.refusal for worker in self._workers.values()]
        return [refusal for refusal in found if refusal is not None] if None not in found else []

    def wait_answered(self, awaited: Collection[tuple[DraftLink, int]], timeout_s: float) -> None:
        """Return when all these batches are answered or their streams lost, or after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: not any(seq in link.pending for link, seq in awaited), timeout_s)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes of messages sent and received so far."""
        sessions = [link.session for link in self.links if link.session is not None]
        sent, received = (sum(s.bytes_sent for s in sessions), sum(s.bytes_received for s in sessions))
        return self._ended_bytes[0] + sent, self._ended_bytes[1] + received

    def _keep(self, worker: _Worker) -> None:
        """Keep one worker connected as long as it is named and does not refuse for good."""
        retry_s = RETRY_S
        while self._is_wanted(worker):
            link = DraftLink(worker.facts.worker_id, worker.trust, self._changed, self.clock)
            opened_s = self.clock()
            try:
                link.session = self._open_session(worker.facts, self.layout, link)
            except ProtocolMismatch as error:
                _log.error("draft worker %s is not used: %s", worker.facts.worker_id, error)
                with self._changed:
                    worker.refusal, retry_s = str(error), NEVER_S
                    self._changed.notify_all()
            except DSparkError as error:
                _log.info("draft worker %s cannot be reached: %s", worker.facts.worker_id, error)
            else:
                self._hold(worker, link)
                retry_s = RETRY_S if self.clock() - opened_s > STEADY_S else retry_s
            with self._changed:
                self._changed.wait_for(lambda: not worker.is_named or self._is_closed, retry_s)
            retry_s = min(2 * retry_s, MAX_RETRY_S)

    def _is_wanted(self, worker: _Worker) -> bool:
        """Whether to connect to a worker; one that is not named any more is forgotten."""
        with self._changed:
            is_wanted = worker.is_named and not self._is_closed
            if not is_wanted and self._workers.get(worker.facts.worker_id) is worker:
                del self._workers[worker.facts.worker_id]
        return is_wanted

    def _hold(self, worker: _Worker, link: DraftLink) -> None:
        """Offer an open stream until it is lost."""
        assert link.session is not None
        with self._changed:
            worker.link = link
            self._changed.notify_all()
            self._changed.wait_for(lambda: link.lost_reason is not None or self._is_closed or self._is_replaced(worker))
            worker.link = None
        link.session.end()
        self._ended_bytes[0] += link.session.bytes_sent
        self._ended_bytes[1] += link.session.bytes_received
        if link.lost_reason is not None:
            self.num_lost += 1
            _log.warning("lost draft worker %s: %s", worker.facts.worker_id, link.lost_reason)
        link.lost("closed")

    def _is_replaced(self, worker: _Worker) -> bool:
        """Another process goes by its id now."""
        return self._workers.get(worker.facts.worker_id) is not worker
