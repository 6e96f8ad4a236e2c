"""The serving engine as a room for experiments: run many requests to their end, and see every round."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark.config import EngineConfig
from dspark.sampling import SamplingParams
from dspark.types import Drafter, DraftTree, DraftTurn, Request, StepOutcome
from dspark.workers.build import assemble
from dspark.workers.drafter.local import GraftedDrafter
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.memory import kv_capacity
from dspark.workers.verifier.targets import Target

MAX_DRAFT = 64  # more than any block: whatever is drafted is verified
KV_TOKENS_EACH = 2048  # of a request; where they do not do, some wait


@dataclass(frozen=True, slots=True)
class Round:
    """One verified round: what was drafted with which confidence and margin (none: empty), and how much of it stood."""

    confidence: tuple[float, ...]
    margin: tuple[float, ...]
    drafted: int
    accepted: int
    num_tokens: int


@dataclass(slots=True)
class Record:
    """Everything one request produced. Rounds that verified no draft count as rounds of one token."""

    tokens: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


class RecordingDrafter:
    """Passes everything on to ``inner`` and remembers the drafts of the present round."""

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.block_size = inner.block_size
        self.taps = inner.taps
        self.signals = inner.signals
        self.last: dict[str, DraftTree] = {}

    def project(self, taps: Any) -> Any:
        return self.inner.project(taps)

    def propose(self, turns: Sequence[DraftTurn]) -> None:
        self.inner.propose(turns)

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        self.last = self.inner.collect(want, wait_s)
        return self.last

    def close(self, request_ids: Sequence[str]) -> None:
        self.inner.close(request_ids)


def drafting_engine(target: Target, tokenizer: Any, drafter: str, max_num_seqs: int, law_width: int | None = None) -> Engine:
    """An engine that verifies every draft of ``drafter`` whole, and records its rounds; ``law_width`` None: the engine's default."""
    config = EngineConfig(
        drafter=drafter,
        speculation=f"static:{MAX_DRAFT}",
        profile=False,
        graph_tokens=0,  # crowds of whole blocks are larger than graphs
        kv_tokens=min(kv_capacity(None, target), max_num_seqs * KV_TOKENS_EACH),
        max_num_seqs=max_num_seqs,
        max_batch_tokens=16384,
        max_queued=65536,
    )
    if law_width is not None:
        config = config.model_copy(update={"draft_law_width": law_width})
    engine = assemble(target, tokenizer, config).engine
    engine.drafter = RecordingDrafter(engine.drafter)
    return engine


def has_head(drafter: Drafter) -> bool:
    """Whether the drafter's confidences are those of a trained head."""
    inner = drafter.inner if isinstance(drafter, RecordingDrafter) else drafter
    return isinstance(inner, GraftedDrafter) and inner.module.config.has_confidence


def run_requests(engine: Engine, requests: Sequence[Request], on_end: Callable[[], object] = lambda: None) -> list[Record]:
    """Run all requests to their end, in order; rounds are recorded if the engine's drafter records."""
    records = {request.id: Record() for request in requests}
    waiting = list(reversed(requests))
    room = engine.options.max_queued
    while waiting or engine.has_work:
        while waiting and len(engine.scheduler.waiting) < room:
            engine.add(waiting.pop())
        for outcome in engine.step():
            _note(engine, records[outcome.request_id], outcome)
            if outcome.finish is not None:
                on_end()
    return [records[request.id] for request in requests]


def _note(engine: Engine, record: Record, outcome: StepOutcome) -> None:
    record.tokens.extend(outcome.tokens)
    drafts = engine.drafter.last if isinstance(engine.drafter, RecordingDrafter) else {}
    tree = drafts.get(outcome.request_id) if outcome.drafted else None
    confidence, margin = ((), ()) if tree is None else (tree.confidence[: outcome.drafted], tree.margin[: outcome.drafted])
    record.rounds.append(Round(confidence, margin, outcome.drafted, outcome.accepted, len(outcome.tokens)))


class ServedGenerator:
    """Answers from the serving engine, without a drafter."""

    def __init__(self, target: Target, tokenizer: Any, config: EngineConfig, top_p: float, top_k: int) -> None:
        self.engine = assemble(target, tokenizer, config).engine
        self.sampling = SamplingParams(top_p=top_p, top_k=top_k)

    def generate(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], max_tokens: int, stop_ids: Sequence[int], seed: int
    ) -> list[list[int]]:
        """Answers of at most ``max_tokens`` tokens; they depend on the seed and nothing else."""
        requests = []
        for i, (prompt, temperature) in enumerate(zip(prompts, temperatures, strict=True)):
            sampling = dataclasses.replace(self.sampling, temperature=temperature, max_tokens=max_tokens, stop_token_ids=tuple(stop_ids))
            requests.append(Request(f"synthesize-{seed}-{i}", tuple(prompt), sampling, noise_seed=seed * 1_000_003 + i))
        return [record.tokens for record in run_requests(self.engine, requests)]
