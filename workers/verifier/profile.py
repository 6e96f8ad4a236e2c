"""Measure the step-cost table at start, on scratch KV of an idle engine (DSpark section 3.2: SPS is profiled once)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from dspark.sampling import SamplingParams
from dspark.types import DraftTurn, PlanRow, Request, Speculation, VerifyPlan
from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.judge import JudgeItem, judge
from dspark.workers.verifier.sequence import Sequence

REPEATS = 5
CONTEXT = 256  # tokens a scratch request holds, where the pool has room for that
MAX_TOKENS = 128  # largest step and draft round that are measured; beyond, the last slope goes on
MAX_DRAFTING = 16
TOKENS_A_ROW = 4  # a step of B tokens is measured as B / 4 verifying requests


def measure_costs(engine: Engine, progress: Callable[[str], None]) -> CostTable:
    """Median seconds of verify steps by tokens, and of draft rounds by requests. Leaves no trace in the pool."""
    assert not engine.has_work, "the cost table is measured on an idle engine"
    limits, pool = engine.options.limits, engine.pool
    most_tokens = min(limits.max_batch_tokens, MAX_TOKENS)
    room = pool.num_free * TOKENS_A_ROW // most_tokens * pool.block_size - TOKENS_A_ROW
    bench = _Scratch(engine, max(1, min(CONTEXT, engine.options.max_model_len // 2, room)))
    verify = [(size, bench.verify_seconds(size)) for size in _sizes(min(most_tokens, bench.max_tokens))]
    draft = [(count, bench.draft_seconds(count)) for count in _sizes(min(limits.max_num_seqs, MAX_DRAFTING, bench.max_rows))]
    progress("step costs: " + ", ".join(f"{size} tokens {1e3 * s:.1f} ms" for size, s in verify))
    if engine.drafter.block_size:
        progress("draft costs: " + ", ".join(f"{count} requests {1e3 * s:.2f} ms" for count, s in draft))
    return CostTable(Curve.fit(verify), Curve.fit(draft))


def _sizes(limit: int) -> list[int]:
    sizes = [1]
    while sizes[-1] * 2 <= limit:
        sizes.append(sizes[-1] * 2)
    return sizes


class _Scratch:
    """Requests with made-up tokens whose blocks are taken for one measurement and given back."""

    def __init__(self, engine: Engine, context: int) -> None:
        self.engine = engine
        self.context = context
        self.max_rows = max(1, engine.pool.num_free // engine.pool.blocks_for(context + TOKENS_A_ROW))
        self.max_tokens = self.max_rows * TOKENS_A_ROW

    def verify_seconds(self, size: int) -> float:
        """Seconds of a step of ``size`` tokens: forward, and the judge on every row."""
        engine = self.engine
        lengths = [TOKENS_A_ROW] * (size // TOKENS_A_ROW) + ([size % TOKENS_A_ROW] if size % TOKENS_A_ROW else [])
        sequences = self._open(len(lengths))
        rows = tuple(PlanRow(s.id, self.context, n, 0, True) for s, n in zip(sequences, lengths, strict=True))
        plan = VerifyPlan(rows, size)
        by_id = {s.id: s for s in sequences}
        items = [JudgeItem(s.id, s.request.sampling, 0, (0,), (), None, i, ()) for i, s in enumerate(sequences)]

        def step() -> None:
            result = engine.runner.forward(plan, by_id)
            wide = result.logits.repeat_interleave(torch.tensor(lengths, device=result.logits.device), 0)
            judge(wide, items)

        seconds = _median_seconds(step)
        self._close(sequences)
        return seconds

    def draft_seconds(self, count: int) -> float:
        """Seconds of one draft round of ``count`` requests, feeding included."""
        drafter = self.engine.drafter
        if not drafter.block_size:
            return 0.0
        sequences = self._open(count)
        self._teach(sequences, 0, self.context)
        position = self.context

        def round_() -> None:
            self._teach(sequences, position, 1)
            drafter.collect({s.id: drafter.block_size for s in sequences}, 1.0)

        seconds = _median_seconds(round_)
        drafter.close([s.id for s in sequences])
        self._close(sequences)
        return seconds

    def _teach(self, sequences: list[Sequence], start: int, count: int) -> None:
        drafter, target = self.engine.drafter, self.engine.target
        features = None
        if drafter.taps:
            features = drafter.project(torch.zeros(count, len(drafter.taps) * target.hidden_size, dtype=target.dtype, device=target.device))
        is_last = start + count > self.context
        drafter.propose(
            [
                DraftTurn(
                    request_id=s.id,
                    base_len=start + count + 1,
                    tokens=tuple(s.tokens[: count + 1]) if start == 0 else (s.tokens[0],) * count,
                    feature_start=start,
                    features=features,
                    max_draft=drafter.block_size if is_last else 0,
                    sampling=s.request.sampling,
                    noise_seed=0,
                )
                for s in sequences
            ]
        )

    def _open(self, count: int) -> list[Sequence]:
        """``count`` scratch requests with ``context`` tokens of KV that nobody wrote."""
        pool, vocab = self.engine.pool, self.engine.target.vocab_size
        sequences = []
        for i in range(count):
            tokens = tuple((7 * j + i) % vocab for j in range(self.context + TOKENS_A_ROW))
            request = Request(f"scratch-{i}", tokens, SamplingParams(temperature=0.0, max_tokens=None))
            sequences.append(Sequence.of(request, Speculation(), len(tokens) + 1))
            pool.open(request.id, [])
            if not pool.grow(request.id, len(tokens)):
                raise AssertionError("the scratch requests do not fit the pool")
        return sequences

    def _close(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.engine.pool.release(sequence.id)


def _median_seconds(run: Callable[[], None]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        _synchronize()
        begin = time.perf_counter()
        run()
        _synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
