"""An engine on a thread of its own: thread-safe submit and cancel, outcomes handed out once a step.

Everything that touches the engine runs on that thread; callers leave requests and cancellations in an inbox.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from dspark.errors import BadRequest, DSparkError, WorkerLost
from dspark.kernels.device import use_device
from dspark.types import Finish, MeasuredDrafter, ReplicaView, Request, SpeculationState, StepOutcome
from dspark.workers.verifier.activity import RecentDrafts
from dspark.workers.verifier.engine import Engine, abort_outcome
from dspark.workers.verifier.sequence import Sequence as Waiting

log = logging.getLogger(__name__)

Sink = Callable[[Sequence[StepOutcome]], None]
MAX_PRIORITIES = 16  # told apart in a view
AT_ONCE = 16  # outcomes that the engine's thread hands out itself: waking another thread up takes longer
STALL_S = 60.0  # queued work without a finished step for this long is unhealthy


class EngineHost:
    """Runs ``Engine.step`` while there is work. A failed step ends every request with an error and the host for good."""

    def __init__(self, engine: Engine, stall_s: float = STALL_S) -> None:
        self.engine = engine
        self.stall_s = stall_s
        self._wake = threading.Condition(threading.RLock())
        self._inbox: deque[tuple[str, Request | None]] = deque()  # (request id, request to add or None to cancel)
        self._sinks: dict[str, Sink] = {}
        self._num_queued = 0  # submitted, not yet added to the engine
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()  # to be done between two steps
        self._closing = False
        self._draining = False
        self._failure: BaseException | None = None
        self._last_progress = time.monotonic()
        self._recent = RecentDrafts()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin serving; starting twice is fine."""
        with self._wake:
            if self._thread.ident is None:
                self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; its outcomes reach ``sink`` on the engine thread. Raises BadRequest, Overloaded or WorkerLost."""
        with self._wake:
            self._check_open()
            engine = self.engine
            engine.check(request)
            if request.id in self._sinks:
                raise BadRequest(f"request id {request.id!r} is in use", "request_id")
            engine.check_room(self._num_queued + len(engine.scheduler.waiting))
            if not self._sinks:
                self._last_progress = time.monotonic()
            self._sinks[request.id] = sink
            self._num_queued += 1
            self._inbox.append((request.id, request))
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """Drop a request; no further outcome of it reaches its sink. Unknown ids are fine."""
        with self._wake:
            if self._sinks.pop(request_id, None) is not None:
                self._inbox.append((request_id, None))
                self._wake.notify()

    def between_steps(self, errand: Callable[[], Any]) -> Future[Any]:
        """Do something with the engine on its thread, soon; the future fails with what it raises, or with WorkerLost."""
        done: Future[Any] = Future()
        with self._wake:
            try:
                self._check_alive()
            except WorkerLost as lost:
                done.set_exception(lost)
                return done
            self._errands.append((errand, done))
            self._wake.notify()
        return done

    def is_healthy(self) -> bool:
        """Whether work, if there is any, moves forward."""
        if self._failure is not None or self.engine.lost is not None or not self._thread.is_alive():
            return False
        return not self._sinks or time.monotonic() - self._last_progress < self.stall_s

    def tune(self, speculation_limit: float) -> None:
        """Let adaptive requests verify at most this share of their drafts, from the next step on."""
        self.engine.drafts.speculation_limit = speculation_limit

    def view(self, replica_id: str, address: str) -> ReplicaView:
        """What a router may know of this replica now."""
        engine = self.engine
        waiting, running = list(engine.scheduler.waiting), list(engine.scheduler.running)
        costs = None if engine.drafts.costs is None else engine.drafts.costs.table
        context = sum(s.num_known for s in running) / len(running) if running else 0.0
        depth = engine.drafter.block_size * engine.drafts.speculation_limit
        self._recent.update(engine)
        return ReplicaView(
            id=replica_id,
            address=address,
            queued=self._num_queued + len(waiting),
            running=len(running),
            max_running=engine.options.limits.max_num_seqs,
            queued_tokens=sum(s.num_pending for s in waiting) + sum(s.num_pending - 1 for s in running if s.num_pending > 1),
            free_blocks=engine.pool.num_free,
            num_blocks=engine.pool.num_blocks,
            draining=self._draining or self._closing,
            tokens_per_round=self._recent.tokens_per_round,
            step_costs=() if costs is None else tuple(zip(costs.verify.sizes, costs.verify.seconds, strict=True)),
            prefill_token_s=0.0 if costs is None else costs.prefill_s,
            context_row_s=0.0 if costs is None else costs.verify_context_s * context,
            draft_costs=()
            if costs is None
            else tuple((n, costs.draft_seconds(n, math.ceil(depth), int(n * context))) for n in costs.draft.sizes),
            drafted_per_round=self._recent.drafted_per_round,
            max_step_tokens=engine.options.limits.max_batch_tokens,
            waiting=_by_priority(waiting),
            speculation=self._recent.state(engine),
            speculation_limit=engine.drafts.speculation_limit,
        )

    def stats(self) -> dict[str, float]:
        """Counters and gauges for metrics."""
        engine = self.engine
        counters, scheduler, pool = engine.counters, engine.scheduler, engine.pool
        return {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": self._num_queued + len(scheduler.waiting),
            "num_blocks": pool.num_blocks,
            "num_free_blocks": pool.num_free,
            "kv_cache_usage_perc": 1.0 - pool.num_free / pool.num_blocks,
            "preemptions_total": scheduler.counters.preemptions,
            "prefix_cache_queries_total": scheduler.counters.prefix_queries,
            "prefix_cache_hits_total": scheduler.counters.prefix_hits,
            "steps_total": counters.steps,
            "step_tokens_total": counters.step_tokens,
            "rounds_total": counters.rounds,
            "drafted_rounds_total": counters.drafted_rounds,
            "draft_tokens_total": counters.drafted,
            "accepted_tokens_total": counters.accepted,
            "generation_tokens_total": counters.generated,
            "drafts_asked_total": counters.drafts_asked,
            "drafts_arrived_total": counters.drafts_arrived,
            "speculation_limit": engine.drafts.speculation_limit,
            "speculation_active": float(self._recent.state(engine) is SpeculationState.ACTIVE),
            "shadow_accepted_tokens_total": counters.shadow_accepted,
            "draft_budget_tokens_total": counters.budget,
            "left_out_rows_total": scheduler.counters.left_out,
            "timed_steps_total": counters.timed_steps,
            "step_seconds_total": counters.step_seconds,
            "predicted_seconds_total": counters.predicted_seconds,
            **(engine.drafter.stats() if isinstance(engine.drafter, MeasuredDrafter) else {}),
            **{f'verified_window_total{{drafts="{k}"}}': count for k, count in enumerate(counters.windows)},
            **counters.accepted_by_position(),
            **engine.survival.stats(),
            **(engine.target.ranks.stats() if engine.target.ranks is not None else {}),
        }

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; False if some are left after ``timeout_s``."""
        with self._wake:
            self._draining = True
        deadline = time.monotonic() + timeout_s
        while self._sinks and self._failure is None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Stop for good, the engine too; requests that still run end with ``abort``."""
        self.stop()
        self.engine.close()

    def stop(self) -> None:
        """Stop the thread; requests that still run end with ``abort``. The engine can go on under another host."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:  # a finalizer may run anywhere
            self._thread.join()

    def _check_open(self) -> None:
        self._check_alive()
        if self._draining:
            raise WorkerLost("this replica is shutting down")

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise WorkerLost(f"the engine failed: {self._failure}")
        if self.engine.lost is not None:
            raise WorkerLost(self.engine.lost)
        if self._closing:
            raise WorkerLost("this replica is shutting down")

    def _run(self) -> None:
        try:
            use_device(self.engine.target.device)
            while self._take_inbox():
                if self._do_errands() and not self.engine.has_work:
                    continue
                outcomes = self.engine.step()
                aside = self.engine.aside
                if self.engine.options.overlapped and (len(outcomes) > AT_ONCE or not aside.is_idle):
                    aside.run(partial(self._deliver, outcomes))  # or they would overtake those of the step before
                else:
                    self._deliver(outcomes)
                self._last_progress = time.monotonic()
            self.engine.aside.close()
            self._end_all(Finish.ABORT, None)
        except BaseException as failure:
            log.exception("the engine failed; all its requests end")
            self._failure = failure
            self._end_all(Finish.ERROR, f"{type(failure).__name__}: {failure}")

    def _take_inbox(self) -> bool:
        """Wait for work and move the inbox into the engine; False when closing."""
        with self._wake:
            while not (self._inbox or self._errands or self.engine.has_work or self._closing):
                self._wake.wait()
            if self._closing:
                return False
            while self._inbox:
                request_id, request = self._inbox.popleft()
                if request is None:
                    self.engine.abort(request_id)
                    continue
                self._num_queued -= 1
                if request_id in self._sinks:  # not cancelled meanwhile
                    self._add(request)
        return True

    def _do_errands(self) -> bool:
        """Do what was asked for since the last step; whether there was anything."""
        has_any = bool(self._errands)
        while self._errands:
            errand, done = self._errands.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(errand())
            except Exception as error:  # noqa: BLE001 - it is whoever asked who has to know
                done.set_exception(error)
        return has_any

    def _add(self, request: Request) -> None:
        """Hand a checked request to the engine; what it refuses all the same ends with an error, not the engine."""
        try:
            self.engine.add(request)
        except DSparkError as error:
            self._deliver([abort_outcome(request.id, 0, Finish.ERROR, str(error))])

    def _deliver(self, outcomes: Sequence[StepOutcome]) -> None:
        """One call a sink, whatever the number of its requests."""
        batches: dict[Sink, list[StepOutcome]] = {}
        for outcome in outcomes:
            sink = self._sinks.get(outcome.request_id)
            if sink is not None:
                batches.setdefault(sink, []).append(outcome)
                if outcome.finish is not None:
                    self._sinks.pop(outcome.request_id, None)
        for sink, batch in batches.items():
            try:
                sink(batch)
            except Exception:
                log.exception("a receiver failed; its %d requests are cancelled", len(batch))
                for outcome in batch:
                    self.cancel(outcome.request_id)

    def _end_all(self, finish: Finish, error: str | None) -> None:
        with self._wake:
            sinks, self._sinks = self._sinks, {}
            errands, self._errands = self._errands, deque()
            self._inbox.clear()
            self._num_queued = 0
        for _, done in errands:
            if done.set_running_or_notify_cancel():
                done.set_exception(WorkerLost(error or "this replica is shutting down"))
        for request_id, sink in sinks.items():
            sequence = self.engine.sequences.get(request_id)
            sink([abort_outcome(request_id, sequence.num_known if sequence else 0, finish, error)])


def _by_priority(waiting: Sequence[Waiting]) -> tuple[tuple[int, int, int], ...]:
    """(priority, requests, tokens) of the waiting requests, most urgent first; the least urgent ones share the last place."""
    counts: dict[int, tuple[int, int]] = {}
    for sequence in sorted(waiting, key=lambda s: s.request.priority):
        priority = sequence.request.priority
        if priority not in counts and len(counts) == MAX_PRIORITIES:
            priority = max(counts)
        requests, tokens = counts.get(priority, (0, 0))
        counts[priority] = (requests + 1, tokens + sequence.num_pending)
    return tuple((priority, requests, tokens) for priority, (requests, tokens) in counts.items())
