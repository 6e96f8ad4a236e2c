"""A stand-in for ``EngineHost``: a thread that emits tokens which depend on the tokens before them, and on nothing else."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dspark.errors import BadRequest, Overloaded
from dspark.types import Finish, ReplicaView, Request, StepOutcome, TokenLogprob

VOCAB = 64
BLOCK = 16


def next_token(known: Sequence[int]) -> int:
    """The token after ``known``: a pure function, so that a replay must continue the same text."""
    return hashlib.sha256(repr(tuple(known[-8:])).encode()).digest()[0] % VOCAB


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What a request with this prompt must yield."""
    known = list(prompt)
    for _ in range(count):
        known.append(next_token(known))
    return known[len(prompt) :]


@dataclass
class _Run:
    request: Request
    sink: Callable[[Sequence[StepOutcome]], None]
    known: list[int] = field(default_factory=list)

    @property
    def num_output(self) -> int:
        return len(self.known) - self.request.num_prompt_tokens


class ScriptedHost:
    """Emits ``per_step`` tokens a step and request, ``step_s`` apart; ``gate`` holds it between steps when cleared."""

    def __init__(
        self, step_s: float = 0.002, per_step: int = 2, max_running: int = 8, max_queued: int = 8, num_blocks: int = 256, vocab: int = VOCAB
    ) -> None:
        self.step_s, self.per_step, self.vocab = step_s, per_step, vocab
        self.max_running, self.max_queued, self.num_blocks = max_running, max_queued, num_blocks
        self.gate = threading.Event()
        self.gate.set()
        self.healthy = True
        self.fail_with: Exception | None = None
        self.seen: list[Request] = []
        self.cancelled: list[str] = []
        self.speculation_limit = 1.0
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Condition()
        self._stop = False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Callable[[Sequence[StepOutcome]], None]) -> None:
        if self.fail_with is not None:
            raise self.fail_with
        with self._lock:
            if any(token >= self.vocab for token in request.prompt_token_ids):
                raise BadRequest(f"token ids must be under {self.vocab}", "prompt")
            if len(self._runs) >= self.max_running + self.max_queued:
                raise Overloaded("the queue is full", 2.0)
            self.seen.append(request)
            self._runs[request.id] = _Run(request, sink, list(request.prompt_token_ids))
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self.cancelled.append(request_id)
            self._runs.pop(request_id, None)

    def view(self, replica_id: str, address: str) -> ReplicaView:
        with self._lock:
            running = min(len(self._runs), self.max_running)
            queued = len(self._runs) - running
            tokens = sum(len(run.known) for run in list(self._runs.values())[running:])
            return ReplicaView(
                replica_id, address, queued, running, self.max_running, tokens, self.num_blocks - self._held(), self.num_blocks
            )

    def stats(self) -> dict[str, float]:
        with self._lock:
            return {"running": float(len(self._runs)), "free_blocks": float(self.num_blocks - self._held())}

    def tune(self, speculation_limit: float) -> None:
        self.speculation_limit = speculation_limit

    def is_healthy(self) -> bool:
        return self.healthy

    def drain(self, timeout_s: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: not self._runs, timeout_s)

    def close(self) -> None:
        with self._lock:
            self._stop = True
            self._lock.notify_all()
        self.gate.set()
        self._thread.join(5)

    def _held(self) -> int:
        return sum(-(-len(run.known) // BLOCK) for run in list(self._runs.values())[: self.max_running])

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: bool(self._runs) or self._stop)
            self.gate.wait()
            if self._stop:
                return
            with self._lock:
                batches = self._step()
                self._lock.notify_all()
            for sink, outcomes in batches.values():
                sink(outcomes)
            threading.Event().wait(self.step_s)

    def _step(self) -> dict[int, tuple[Callable[[Sequence[StepOutcome]], None], list[StepOutcome]]]:
        batches: dict[int, tuple[Callable[[Sequence[StepOutcome]], None], list[StepOutcome]]] = {}
        for run in list(self._runs.values())[: self.max_running]:
            outcome = self._advance(run)
            if outcome.finish is not None:
                del self._runs[run.request.id]
            # bound methods are equal, not identical: one batch for each object they belong to
            batches.setdefault(hash(run.sink), (run.sink, []))[1].append(outcome)
        return batches

    def _advance(self, run: _Run) -> StepOutcome:
        limit = run.request.sampling.max_tokens or 1024
        tokens = continuation(run.known, min(self.per_step, limit - run.num_output))
        run.known.extend(tokens)
        top = run.request.sampling.logprobs
        logprobs = None if top is None else tuple(TokenLogprob(t, -0.5, 1, tuple((i, -1.0 - i) for i in range(top))) for t in tokens)
        wanted = run.request.sampling.prompt_logprobs
        scored: tuple[TokenLogprob | None, ...] | None = None
        if wanted is not None and run.num_output == len(tokens):
            prompt = run.request.prompt_token_ids
            scored = (None, *(TokenLogprob(t, -2.0, 3, tuple((i, -1.0 - i) for i in range(wanted))) for t in prompt[1:]))
        finish = Finish.LENGTH if run.num_output >= limit else None
        return StepOutcome(
            run.request.id, len(run.known), tuple(tokens), len(tokens) - 1, self.per_step, logprobs, scored, finish, num_cached_tokens=1
        )
