"""Measure the step-cost table at start, on scratch KV of an idle engine (DSpark section 3.2: SPS is profiled once)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from dspark.kernels.buckets import pays
from dspark.sampling import SamplingParams
from dspark.types import Continuations, ContinuesSteps, DraftTree, DraftTurn, PlanRow, Request, Speculation, VerifyPlan
from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.judge import JudgeItem, judge
from dspark.workers.verifier.scheduler import Limits
from dspark.workers.verifier.sequence import Sequence

NEAR, FAR = 8, 320  # positions that scratch requests hold, where the pool has room for that
# The largest verify step and the most drafting requests that are measured; beyond, the last slope goes on. A GPU waits for memory up to
# hundreds of tokens and for its matrix units beyond: the slope of small steps would make drafts of many requests look free.
MAX_TOKENS, MAX_TOKENS_GPU = 256, 2048
MAX_DRAFTING, MAX_DRAFTING_GPU = 64, 256
ROW_TOKENS = 4  # a step of B tokens is measured as B / 4 rows of an anchor and 3 drafts
PREFILL_TOKENS = 256
SLOW_S = 0.05  # a step that takes longer is repeated less often
REPEATS, SLOW_REPEATS = 5, 3
TRUSTED = 1.5  # a cached table is measured again if single steps differ from it by more than this factor


def measure_costs(engine: Engine, progress: Callable[[str], None]) -> CostTable:
    """Median seconds of verify steps by tokens and context, and of draft rounds by requests and depth. No trace is left."""
    assert not engine.has_work, "the cost table is measured on an idle engine"
    begin = time.perf_counter()
    scratch = _Scratch(engine)
    warm_up(engine)
    verify, verify_context_s = _measure_verify(scratch)
    prefill_s = scratch.prefill_token_seconds()
    table = CostTable(verify, verify_context_s=verify_context_s, prefill_s=prefill_s)
    if engine.drafter.block_size:
        first, deeper, draft_context_s = _measure_draft(scratch)
        table = CostTable(verify, first, verify_context_s, prefill_s, deeper, draft_context_s)
    for line in describe(table):
        progress(line)
    progress(f"measured in {time.perf_counter() - begin:.1f} s")
    return table


def reach(device: torch.device, limits: Limits) -> tuple[int, int]:
    """The largest verify step and the most drafting requests that are measured on this device."""
    is_gpu = device.type == "cuda"
    tokens = MAX_TOKENS_GPU if is_gpu else MAX_TOKENS
    return min(tokens, limits.max_batch_tokens), min(MAX_DRAFTING_GPU if is_gpu else MAX_DRAFTING, limits.max_num_seqs)


def warm_up(engine: Engine) -> None:
    """Run every size that steps are padded to once, so that no request waits for a kernel to be compiled."""
    if not pays(engine.target.device, engine.target.dtype):
        return
    scratch = _Scratch(engine)
    most = min(scratch.most_tokens, scratch.max_rows * ROW_TOKENS)
    for size in sorted({engine.scheduler.padded(n) for n in range(1, most + 1)}):
        scratch.run_once(size)


def describe(table: CostTable) -> list[str]:
    """The table in a few lines."""
    verify = ", ".join(f"{size} tokens {1e3 * s:.1f} ms" for size, s in zip(table.verify.sizes, table.verify.seconds, strict=True))
    lines = [
        f"step costs: {verify}, {1e6 * table.verify_context_s:.2f} us a position of context, {1e3 * table.prefill_s:.2f} ms a prompt token"
    ]
    if table.draft.seconds[-1] > 0:
        draft = ", ".join(f"{size} requests {1e3 * s:.2f} ms" for size, s in zip(table.draft.sizes, table.draft.seconds, strict=True))
        last = table.draft_deeper.seconds[-1]
        lines.append(f"draft costs: {draft}, and {1e3 * last:.2f} ms each further position of {table.draft_deeper.sizes[-1]} requests")
    return lines


def still_holds(engine: Engine, table: CostTable) -> bool:
    """Whether steps and draft rounds of two sizes take about what the table says. Warms the engine up."""
    warm_up(engine)
    scratch = _Scratch(engine)
    for num_tokens in (1, 16):
        if num_tokens > scratch.max_rows * ROW_TOKENS:
            continue
        measured = scratch.verify_seconds(num_tokens, NEAR)
        if not _is_near(measured, table.step_seconds(num_tokens, NEAR * -(-num_tokens // ROW_TOKENS))):
            return False
    depth = (1 + engine.drafter.block_size) // 2
    counts = {1, min(4, scratch.max_rows)} if engine.drafter.block_size else set()
    return all(_is_near(scratch.draft_seconds(count, depth, NEAR), table.draft_seconds(count, depth, count * NEAR)) for count in counts)


def _is_near(measured_s: float, predicted_s: float) -> bool:
    return predicted_s / TRUSTED < measured_s < predicted_s * TRUSTED


def _measure_verify(scratch: _Scratch) -> tuple[Curve, float]:
    """Seconds by tokens at no context, and seconds a position of context: least squares over two contexts a size."""
    sizes = _sizes(min(scratch.most_tokens, scratch.max_rows * ROW_TOKENS))
    measured = [(size, -(-size // ROW_TOKENS), scratch.verify_seconds(size, NEAR)) for size in sizes]
    spans, more = [], []
    for size, rows, seconds in measured:
        far = scratch.room_for(rows)
        if far > NEAR:
            spans.append(rows * (far - NEAR))
            more.append(scratch.verify_seconds(size, far) - seconds)
    context_s = _slope(spans, more)
    return Curve.fit([(size, max(seconds - context_s * rows * NEAR, 1e-9)) for size, rows, seconds in measured]), context_s


def _measure_draft(scratch: _Scratch) -> tuple[Curve, Curve, float]:
    """Seconds of the first position by requests, of each further one, and of a position of context."""
    engine = scratch.engine
    counts = _sizes(min(scratch.most_drafting, scratch.max_rows))
    gamma = engine.drafter.block_size
    first = Curve.fit([(count, scratch.draft_seconds(count, 1, NEAR)) for count in counts])
    whole = Curve.fit([(count, scratch.draft_seconds(count, gamma, NEAR)) for count in counts])
    steps = max(gamma - 1, 1)
    deeper = Curve.fit([(count, max(0.0, whole(count) - first(count)) / steps) for count in counts])
    far = [(count, room) for count in counts[-2:] if (room := scratch.room_for(count)) > NEAR]
    more = [scratch.draft_seconds(count, gamma, room) - whole(count) for count, room in far]
    return first, deeper, _slope([count * (room - NEAR) for count, room in far], more)


def _slope(x: list[int], y: list[float]) -> float:
    """Least squares through the origin, not below 0."""
    return max(0.0, sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)) if x else 0.0


def _sizes(limit: int) -> list[int]:
    sizes = [1]
    while sizes[-1] * 2 <= limit:
        sizes.append(sizes[-1] * 2)
    return sizes


class _Scratch:
    """Requests with made-up tokens whose blocks are taken for one measurement and given back."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.most_tokens, self.most_drafting = reach(engine.target.device, engine.options.limits)
        rows = min(max(1, self.most_tokens // ROW_TOKENS), engine.options.limits.max_num_seqs)
        self.max_rows = max(1, min(rows, engine.pool.num_free // engine.pool.blocks_for(NEAR + ROW_TOKENS)))

    def room_for(self, num_rows: int) -> int:
        """Positions of context, up to ``FAR``, that so many requests can hold."""
        pool = self.engine.pool
        return min(FAR, self.engine.options.max_model_len // 2, pool.num_free // num_rows * pool.block_size - ROW_TOKENS)

    def run_once(self, size: int) -> None:
        """A step of ``size`` tokens, and as many rows for the drafter."""
        self.verify_seconds(size, NEAR, _seconds)
        engine, taps = self.engine, self.engine.drafter.taps
        if taps:
            _use(engine.drafter.project(torch.zeros(size, len(taps) * engine.target.hidden_size, dtype=engine.target.dtype)))

    def verify_seconds(self, size: int, context: int, measure: Callable[[Callable[[], None]], float] | None = None) -> float:
        """Seconds of a step of ``size`` tokens in rows of anchor and drafts: forward, and the judge on every row.

        Of steps that can be launched before their turn what they take then: the device's time, from the launch to its best tokens.
        """
        engine = self.engine
        lengths = [ROW_TOKENS] * (size // ROW_TOKENS) + ([size % ROW_TOKENS] if size % ROW_TOKENS else [])
        sequences = self._open(len(lengths), context)
        rows = tuple(PlanRow(s.id, context, 1, n - 1, True, n - 1) for s, n in zip(sequences, lengths, strict=True))
        plan = VerifyPlan(rows, size)
        by_id = {s.id: s for s in sequences}

        launch = engine.runner.launcher(plan, by_id) if engine.ahead.can_run and size <= engine.runner.max_launched else None

        def step() -> None:
            if launch is not None:
                launch().read()
                return
            result = engine.runner.forward(plan, by_id)
            judge(result.logits, [_item(s, row, first) for s, row, first in zip(sequences, rows, result.first_row, strict=True)])

        seconds = (measure or _median_seconds)(step)
        self._close(sequences)
        return seconds

    def prefill_token_seconds(self) -> float:
        """Seconds of one token of a long prompt chunk."""
        engine = self.engine
        room = min(engine.pool.num_free * engine.pool.block_size, engine.options.max_model_len) - 2 * ROW_TOKENS
        size = min(PREFILL_TOKENS, engine.options.limits.max_batch_tokens, room)
        if size < 2:
            return 0.0
        (sequence,) = self._open(1, size)
        plan = VerifyPlan((PlanRow(sequence.id, 0, size, 0, False, 0),), size)
        seconds = _median_seconds(lambda: _use(engine.runner.forward(plan, {sequence.id: sequence}).logits))
        self._close([sequence])
        return seconds / size

    def draft_seconds(self, count: int, depth: int, context: int) -> float:
        """Seconds of drafting ``depth`` tokens for ``count`` requests; of a drafter that continues steps what a block takes behind one."""
        drafter = self.engine.drafter
        sequences = self._open(count, context)
        ids = [s.id for s in sequences]
        if self.engine.ahead.can_run and isinstance(drafter, ContinuesSteps):
            rows = Continuations(ids, np.full(count, context), np.zeros(count, np.int64), np.arange(count))
            seconds = _median_seconds(partial(_continue, drafter, rows))
            self._close(sequences)
            return seconds
        self._teach(sequences, 0, context)
        self._teach(sequences, context, 1)
        seconds = _median_seconds(lambda: _use(drafter.collect(dict.fromkeys(ids, depth), 1.0)))
        drafter.close(ids)
        self._close(sequences)
        return seconds

    def _teach(self, sequences: list[Sequence], start: int, count: int) -> None:
        drafter, target = self.engine.drafter, self.engine.target
        features = None
        if drafter.taps:
            features = drafter.project(torch.zeros(count, len(drafter.taps) * target.hidden_size, dtype=target.dtype, device=target.device))
        is_last = start > 0
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

    def _open(self, count: int, context: int) -> list[Sequence]:
        """``count`` scratch requests with ``context`` tokens of KV that nobody wrote, and a draft."""
        pool, vocab = self.engine.pool, self.engine.target.vocab_size
        sequences = []
        for i in range(count):
            tokens = tuple((7 * j + i) % vocab for j in range(context + 1))
            request = Request(f"scratch-{i}", tokens, SamplingParams(temperature=0.0, max_tokens=None))
            sequence = Sequence.of(request, Speculation(), len(tokens) + 1)
            drafted = [(11 * j + i) % vocab for j in range(ROW_TOKENS - 1)]
            sequence.draft = DraftTree.chain(request.id, len(tokens), drafted, [0.5] * len(drafted))
            sequences.append(sequence)
            pool.open(request.id, [])
            if not pool.grow(request.id, context + ROW_TOKENS):
                raise AssertionError("the scratch requests do not fit the pool")
        return sequences

    def _close(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.engine.pool.release(sequence.id)


def _item(sequence: Sequence, row: PlanRow, first_row: int) -> JudgeItem:
    draft = sequence.draft.first(row.num_draft) if sequence.draft is not None and row.num_draft else None
    return JudgeItem(sequence.id, sequence.request.sampling, 0, (0,), (), draft, first_row, ())


def _continue(drafter: ContinuesSteps, rows: Continuations) -> None:
    drafter.continue_step(rows)
    drafter.continued()


def _use(result: object) -> None:
    """The measured call is made for its time."""


def _median_seconds(run: Callable[[], None]) -> float:
    run()
    seconds = [_seconds(run)]
    while len(seconds) < (SLOW_REPEATS if seconds[0] > SLOW_S else REPEATS):
        seconds.append(_seconds(run))
    return statistics.median(seconds)


def _seconds(run: Callable[[], None]) -> float:
    _synchronize()
    begin = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
