"""The thread that drafts: takes the batches of all sessions, answers what has gathered in one round."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from dspark.drafting import DraftBatch, DraftLayout, Held, TurnBatch
from dspark.errors import WorkerLost
from dspark.workers.drafter.worker import DraftWorker

STALL_S: Final = 30.0  # a queued batch without an answer for this long is unhealthy
MAX_FAILURES: Final = 3  # rounds in a row that raise, after which the worker gives up

_log = logging.getLogger(__name__)

Answer = Callable[[DraftBatch], None]


@dataclass(frozen=True, slots=True)
class _Batch:
    session: str
    batch: TurnBatch
    answer: Answer


@dataclass(frozen=True, slots=True)
class _Close:
    """Requests of a session to forget; None: all of them."""

    session: str
    request_ids: Sequence[str] | None


class DraftWorkerHost:
    """A ``DraftHost`` around a ``DraftWorker``. A round that raises costs its requests their drafts, and the worker its memory."""

    def __init__(self, worker: DraftWorker, layout: DraftLayout, stall_s: float = STALL_S) -> None:
        self.worker = worker
        self.layout = layout
        self._stall_s = stall_s
        self._wake = threading.Condition()
        self._inbox: deque[_Batch | _Close] = deque()
        self._is_closing = False
        self._is_busy = False
        self._failures = 0
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="draft", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; batches that wait are not answered."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, session: str, batch: TurnBatch, answer: Answer) -> None:
        if self._failures >= MAX_FAILURES or self._is_closing:
            raise WorkerLost("this draft worker has ended")
        self._put(_Batch(session, batch, answer))

    def close_requests(self, session: str, request_ids: Sequence[str]) -> None:
        self._put(_Close(session, request_ids))

    def end_session(self, session: str) -> None:
        self._put(_Close(session, None))

    def is_healthy(self) -> bool:
        if self._failures >= MAX_FAILURES or not self._thread.is_alive():
            return False
        return not (self._inbox or self._is_busy) or time.monotonic() - self._last_progress < self._stall_s

    def stats(self) -> dict[str, float]:
        counters, pool = self.worker.counters, self.worker.pool
        return {
            "num_requests": self.worker.num_requests,
            "num_blocks": pool.num_blocks,
            "num_free_blocks": pool.num_free,
            "rounds_total": counters.rounds,
            "batches_total": counters.batches,
            "turns_total": counters.turns,
            "trees_total": counters.trees,
            "drafted_tokens_total": counters.drafted_tokens,
            "stored_positions_total": counters.stored_positions,
            "found_positions_total": counters.found_positions,
            "refused_turns_total": counters.refused,
            "draft_seconds_total": counters.seconds,
        }

    def _put(self, item: _Batch | _Close) -> None:
        with self._wake:
            if not (self._inbox or self._is_busy):
                self._last_progress = time.monotonic()
            self._inbox.append(item)
            self._wake.notify()

    def _run(self) -> None:
        while (work := self._gather()) is not None:
            batches, closes = work
            if batches:
                self._answer(batches)
            for close in closes:
                self._forget(close)
            with self._wake:
                self._is_busy = False
                self._last_progress = time.monotonic()

    def _gather(self) -> tuple[list[_Batch], list[_Close]] | None:
        """Wait for work, and take all of it that can be one round: what is closed in it must not come again in it. None: end."""
        with self._wake:
            while not (self._inbox or self._is_closing):
                self._wake.wait()
            if self._is_closing:
                return None
            self._is_busy = True
            batches: list[_Batch] = []
            closes: list[_Close] = []
            while self._inbox:
                item = self._inbox[0]
                if isinstance(item, _Batch) and any(close.session == item.session for close in closes):
                    break
                self._inbox.popleft()
                if isinstance(item, _Batch):
                    batches.append(item)
                else:
                    closes.append(item)
            return batches, closes

    def _answer(self, batches: Sequence[_Batch]) -> None:
        try:
            answers = self.worker.answer([(item.session, item.batch) for item in batches])
        except Exception:  # noqa: BLE001 - whatever a library raises must not end the other sessions
            self._failures += 1
            _log.exception("drafting failed (%d in a row); everything that was held is forgotten", self._failures)
            self.worker.reset()
            answers = [DraftBatch(item.batch.seq, held=_nothing(item.batch)) for item in batches]
        else:
            self._failures = 0
        for item, batch in zip(batches, answers, strict=True):
            item.answer(batch)

    def _forget(self, close: _Close) -> None:
        if close.request_ids is None:
            self.worker.end_session(close.session)
        else:
            self.worker.close_requests(close.session, close.request_ids)


def _nothing(batch: TurnBatch) -> tuple[Held, ...]:
    return tuple(Held(turn.request_id, 0, 0) for turn in batch.turns)
