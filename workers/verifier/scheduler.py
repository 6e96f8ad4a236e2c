"""Who runs this step, with how many tokens: one scheduler without phases.

Every request catches up its computed tokens with its known tokens. A prefill chunk, a prefix hit, a decode step, a
resumed request and a verify step differ only in how many tokens are pending. When blocks run out the last request in
line gives its blocks back and is computed again later (most of it from the prefix cache). Latency budgets (``latency.py``) decide
who goes first, who sits a step out, and how much prefill a step takes in.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from dspark.types import PlanRow, VerifyPlan
from dspark.workers.blocks import BlockPool
from dspark.workers.verifier.draft_planner import DraftPlanner
from dspark.workers.verifier.latency import Prefill, Stake, choose_rows, chunk_tokens, line_key, stake
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.shares import Shares


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold."""

    max_num_seqs: int
    max_batch_tokens: int
    prefix_cache: bool = True


@dataclass(slots=True)
class SchedulerCounters:
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # prompt tokens found there
    left_out: int = 0  # request x step pairs that sat out for somebody's latency budget


@dataclass(slots=True)
class Scheduler:
    """Waiting and running requests; ``plan`` reserves the KV of everything it returns."""

    pool: BlockPool
    limits: Limits
    drafts: DraftPlanner
    padded: Callable[[int], int] = int  # the token count that a step of so many is padded to
    largest_captured: int = 0  # tokens of the largest step that runs from a graph; 0: none does
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    counters: SchedulerCounters = field(default_factory=SchedulerCounters)
    chosen: list[Sequence] = field(default_factory=list)  # running requests that take part in this step
    _order: dict[str, tuple[int, int]] = field(default_factory=dict)
    _arrivals: int = 0
    _is_by_deadline: bool = False  # how ``waiting`` is ordered

    def add(self, sequence: Sequence) -> None:
        """Queue a new request by priority (low first), then arrival."""
        self._arrivals += 1
        self._order[sequence.id] = (sequence.request.priority, self._arrivals)
        insort(self.waiting, sequence, key=self._key)

    def remove(self, sequence: Sequence) -> None:
        """Forget a request that ended; its blocks go back."""
        del self._order[sequence.id]
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.release(sequence.id)
        else:
            self.waiting.remove(sequence)

    def choose(self, now_s: float) -> None:
        """Decide which running requests take part in the next step (``chosen``) and who is next in line."""
        self.chosen = list(self.running)
        has_deadlines = any(s.request.latency_budget.ttft_ms is not None for s in self.waiting)
        if has_deadlines:
            token_s = 0.0 if self.drafts.costs is None else self.drafts.costs.table.prefill_s
            self.waiting.sort(key=lambda s: (*self._line_key(s, now_s, token_s), self._order[s.id]))
        elif self._is_by_deadline:
            self.waiting.sort(key=self._key)
        self._is_by_deadline = has_deadlines
        if self.drafts.costs is None:
            return
        decoding = [s for s in self.running if s.num_pending == 1]
        stakes = [_stake(s, now_s) for s in decoding]
        for sequence, taken in zip(decoding, stakes, strict=True):
            sequence.limit_s = taken.allowed_s
        takes_part = choose_rows(stakes, self.drafts.typical_seconds)
        out = {s.id for s, is_in in zip(decoding, takes_part, strict=True) if not is_in}
        for sequence in decoding:
            sequence.left_out = sequence.left_out + 1 if sequence.id in out else 0
        self.counters.left_out += len(out)
        self.chosen = [s for s in self.running if s.id not in out]

    def plan(self, now_s: float, draft_s: float, whole_prompts: bool = False) -> VerifyPlan:
        """The rows of the step and their blocks; drafts come last, they only fill what is left. Drafting took ``draft_s``.

        ``whole_prompts``: nobody is let in of whose prompt something would be left for a later step.
        """
        shares = Shares()
        left = self.limits.max_batch_tokens
        preempted = self.counters.preemptions
        left -= self._share_out([s for s in self.chosen if s.num_pending == 1], shares, left, preempted)
        behind = [s for s in self.chosen if s.num_pending > 1]
        chunk = self._chunk_tokens(behind, shares, left, now_s)
        chunk -= self._share_out(behind, shares, chunk, preempted)
        if preempted == self.counters.preemptions:
            self._admit(shares, chunk, whole_prompts)
        self.drafts.plan(shares, self._room_for_drafts(shares.num_tokens), draft_s)
        rows: list[PlanRow] = []
        num_tokens = shares.num_tokens
        columns = (shares.sequences, shares.num_known, shares.samples, shares.num_draft, shares.num_commit)
        for sequence, num_known, samples, num_draft, num_commit in zip(*columns, strict=True):
            name, start = sequence.request.id, sequence.num_computed
            while num_draft and not self.pool.grow(name, start + num_known + num_draft):
                num_draft -= 1  # drafts never take blocks from anybody
            rows.append(PlanRow(name, start, num_known, num_draft, samples, min(num_commit, num_draft)))
            num_tokens += num_draft
        return VerifyPlan(tuple(rows), self.padded(num_tokens))

    def _room_for_drafts(self, num_known: int) -> int:
        """Drafted tokens that fit beside so many known ones; drafts alone never take a step out of the sizes with graphs."""
        is_captured = num_known <= self.largest_captured
        return (min(self.limits.max_batch_tokens, self.largest_captured) if is_captured else self.limits.max_batch_tokens) - num_known

    def commit(self, sequence: Sequence, num_computed: int) -> None:
        """Note that positions ``< num_computed`` hold committed KV; blocks beyond go back, full ones become findable."""
        size = self.pool.block_size
        before, sequence.num_computed = sequence.num_computed, num_computed
        self.pool.shrink(sequence.id, max(num_computed, sequence.num_reserved))
        if self.limits.prefix_cache and num_computed // size > before // size:
            hashes = sequence.hashes(size, num_computed // size)
            for index in range(before // size, num_computed // size):
                self.pool.register(sequence.id, index, hashes[index])

    def commit_ahead(self, sequence: Sequence) -> None:
        """``commit`` of all but the last known token, where a step that was launched ahead keeps the blocks beyond."""
        num_computed, size = len(sequence.tokens) - 1, self.pool.block_size
        if num_computed // size == sequence.num_computed // size:
            sequence.num_computed = num_computed
        else:
            self.commit(sequence, num_computed)

    def _key(self, sequence: Sequence) -> tuple[int, int]:
        return self._order[sequence.id]

    def _line_key(self, sequence: Sequence, now_s: float, token_s: float) -> tuple[int, float]:
        """Place of a waiting request; one that was preempted goes before all that have not run."""
        request = sequence.request
        if sequence.admitted:
            return request.priority, -math.inf
        return line_key(request.priority, sequence.arrived_s, request.latency_budget.ttft_ms, now_s, token_s * sequence.num_pending)

    def _share_out(self, sequences: list[Sequence], shares: Shares, left: int, preempted: int) -> int:
        """Give requests their pending tokens, in order, while ``left`` lasts; returns how many were given.

        They were running when ``preempted`` preemptions had been counted.
        """
        given = 0
        for sequence in sequences:
            take = min(sequence.num_pending, left - given)
            is_running = self.counters.preemptions == preempted or sequence in self.running
            if take and is_running and self._reserve(sequence, sequence.num_computed + take, shares):
                shares.add(sequence, take, sequence.limit_s)
                given += take
        return given

    def _chunk_tokens(self, behind: list[Sequence], shares: Shares, left: int, now_s: float) -> int:
        """How many prompt tokens this step takes in, at most ``left``."""
        costs = self.drafts.costs
        if costs is None or not shares.num_limited:
            return left
        limit_s = min([limit * s.tokens_per_round for s, limit in zip(shares.sequences, shares.limits, strict=True)])
        decode_s = costs.table.step_seconds(shares.decode_tokens, shares.context)
        prefills = [Prefill(s.num_pending, _ttft_left_s(s, now_s)) for s in (*behind, *self.waiting)]
        return chunk_tokens(prefills, decode_s, limit_s, costs.table.prefill_s, left)

    def _reserve(self, sequence: Sequence, num_tokens: int, shares: Shares) -> bool:
        """Room for ``num_tokens`` positions, taking blocks from the last in line; False if it was itself the last."""
        while not self.pool.grow(sequence.id, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            shares.drop(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.id)
        sequence.num_computed = sequence.num_reserved = 0
        sequence.draft = None
        self.counters.preemptions += 1
        insort(self.waiting, sequence, key=self._key)

    def _admit(self, shares: Shares, left: int, whole_prompts: bool) -> None:
        """Let waiting requests in while tokens, places and blocks last."""
        while self.waiting and left and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            if (whole_prompts and sequence.num_known > left) or not self._open(sequence):
                break
            self.waiting.pop(0)
            insort(self.running, sequence, key=self._key)
            take = min(sequence.num_pending, left)
            shares.add(sequence, take, math.inf)
            left -= take

    def let_in(self, num_tokens: int) -> list[Sequence]:
        """Let waiting requests in whose whole prompts are at most so many tokens."""
        shares = Shares()
        self._admit(shares, num_tokens, whole_prompts=True)
        return shares.sequences

    def _open(self, sequence: Sequence) -> bool:
        """Reserve blocks for all known tokens and one more, cached prefix shared; False, unchanged, if they don't fit."""
        pool, size = self.pool, self.pool.block_size
        use_cache = self.limits.prefix_cache and not sequence.wants_prompt_logprobs
        # the last known token is always computed: its row yields the next one
        hashes = sequence.hashes(size, (sequence.num_known - 1) // size) if use_cache else []
        hits = pool.open(sequence.id, hashes)
        if not pool.grow(sequence.id, sequence.num_known + 1):
            pool.release(sequence.id)
            return False
        sequence.num_computed = hits * size
        if not sequence.admitted:
            sequence.admitted = True
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            if use_cache:
                self.counters.prefix_queries += sequence.num_prompt
                self.counters.prefix_hits += sequence.num_cached
        return True


def _stake(sequence: Sequence, now_s: float) -> Stake:
    tpot_ms = sequence.request.latency_budget.tpot_ms
    since = 0.0 if sequence.first_s is None else now_s - sequence.first_s
    return stake(sequence.num_known, tpot_ms, sequence.num_after_first, since, sequence.tokens_per_round, sequence.left_out)


def _ttft_left_s(sequence: Sequence, now_s: float) -> float:
    """Seconds to the deadline of its first token; inf without one, once it came, or if it is missed."""
    ttft_ms = sequence.request.latency_budget.ttft_ms
    if ttft_ms is None or sequence.first_s is not None:
        return math.inf
    left = sequence.arrived_s + ttft_ms / 1e3 - now_s
    return left if left > 0 else math.inf
