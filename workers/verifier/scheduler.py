"""Who runs this step, with how many tokens: one scheduler without phases.

Every request catches up its computed tokens with its known tokens. A prefill chunk, a prefix hit, a decode step, a
resumed request and a verify step differ only in how many tokens are pending. When blocks run out the last request in
line gives its blocks back and is computed again later (most of it from the prefix cache).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from dspark.types import Mode, PlanRow, VerifyPlan
from dspark.workers.verifier.blocks import BlockPool
from dspark.workers.verifier.costs import CostTable
from dspark.workers.verifier.planner import Candidate, DraftGate, schedule
from dspark.workers.verifier.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold."""

    max_num_seqs: int
    max_batch_tokens: int
    prefix_cache: bool = True


@dataclass(slots=True)
class Share:
    """One request's part of the step being planned."""

    sequence: Sequence
    num_known: int
    num_draft: int = 0

    @property
    def samples(self) -> bool:
        return self.num_known == self.sequence.num_pending


@dataclass(slots=True)
class SchedulerCounters:
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # prompt tokens found there


@dataclass(slots=True)
class Scheduler:
    """Waiting and running requests; ``plan`` reserves the KV of everything it returns."""

    pool: BlockPool
    limits: Limits
    costs: CostTable | None = None
    gate: DraftGate = field(default_factory=DraftGate)
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    counters: SchedulerCounters = field(default_factory=SchedulerCounters)
    _order: dict[str, tuple[int, int]] = field(default_factory=dict)
    _arrivals: int = 0

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

    def plan(self) -> VerifyPlan:
        """Choose the step's rows and reserve their blocks; drafts come last, they only fill what is left."""
        shares: list[Share] = []
        left = self.limits.max_batch_tokens
        preempted = self.counters.preemptions
        for sequence in list(self.running):
            take = min(sequence.num_pending, left)
            if take and sequence in self.running and self._reserve(sequence, sequence.num_computed + take):
                shares.append(Share(sequence, take))
                left -= take
        if preempted == self.counters.preemptions:
            left = self._admit(shares, left)
        self._plan_drafts(shares, left)
        rows = tuple(PlanRow(s.sequence.id, s.sequence.num_computed, s.num_known, s.num_draft, s.samples) for s in shares)
        return VerifyPlan(rows, sum(row.num_tokens for row in rows))

    def commit(self, sequence: Sequence, num_computed: int) -> None:
        """Note that positions ``< num_computed`` hold committed KV; blocks beyond go back, full ones become findable."""
        size = self.pool.block_size
        before, sequence.num_computed = sequence.num_computed, num_computed
        self.pool.shrink(sequence.id, num_computed)
        if self.limits.prefix_cache and num_computed // size > before // size:
            hashes = sequence.hashes(size, num_computed // size)
            for index in range(before // size, num_computed // size):
                self.pool.register(sequence.id, index, hashes[index])

    def _key(self, sequence: Sequence) -> tuple[int, int]:
        return self._order[sequence.id]

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Room for ``num_tokens`` positions, taking blocks from the last in line; False if it was itself the last."""
        while not self.pool.grow(sequence.id, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.id)
        sequence.num_computed = 0
        sequence.draft = None
        self.counters.preemptions += 1
        insort(self.waiting, sequence, key=self._key)

    def _admit(self, shares: list[Share], left: int) -> int:
        """Let waiting requests in while tokens, places and blocks last; returns the tokens left."""
        while self.waiting and left and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            if not self._open(sequence):
                break
            self.waiting.pop(0)
            insort(self.running, sequence, key=self._key)
            take = min(sequence.num_pending, left)
            shares.append(Share(sequence, take))
            left -= take
        return left

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

    def _plan_drafts(self, shares: list[Share], left: int) -> None:
        """Decide how many drafted tokens each sampling row verifies, and reserve their blocks."""
        sampling = [s for s in shares if s.samples]
        open_shares = [s for s in sampling if _draft_len(s.sequence)]
        for share in open_shares:
            if share.sequence.speculation.mode is Mode.STATIC or self.costs is None:
                share.num_draft = min(_draft_len(share.sequence), left)
                left -= share.num_draft
        adaptive = [s for s in open_shares if s.sequence.speculation.mode is Mode.ADAPTIVE]
        if adaptive and self.costs is not None:
            self._plan_adaptive(adaptive, sum(s.num_known + s.num_draft for s in shares), len(sampling), left)
        for share in open_shares:
            base = share.sequence.num_computed + share.num_known
            while share.num_draft and not self.pool.grow(share.sequence.id, base + share.num_draft):
                share.num_draft -= 1  # drafts never take blocks from anybody

    def _plan_adaptive(self, shares: list[Share], base_tokens: int, num_rows: int, left: int) -> None:
        assert self.costs is not None
        step_seconds = self.costs.verify
        candidates = [Candidate(s.sequence.survival[: _draft_len(s.sequence)]) for s in shares]
        lengths = schedule(candidates, base_tokens, num_rows, step_seconds, left, all(_cannot_be_biased(s.sequence) for s in shares))
        expected = float(num_rows)
        for share, candidate, length in zip(shares, candidates, lengths, strict=True):
            share.num_draft = length
            expected += sum(candidate.survival[:length])
        drafting = self.costs.step_seconds(base_tokens + sum(lengths), len(shares))
        self.gate.observe(expected / drafting * step_seconds(base_tokens) / num_rows)


def _draft_len(sequence: Sequence) -> int:
    """Drafted tokens at hand that may be verified now."""
    draft = sequence.draft
    if draft is None or draft.base_len != sequence.num_known:
        return 0
    return min(len(draft.tokens), sequence.drafts_wanted)


def _cannot_be_biased(sequence: Sequence) -> bool:
    """Whether no schedule can change the law of the text: greedy, coupled, or drafts fixed by the history."""
    sampling = sequence.request.sampling
    return sampling.is_greedy or sampling.rule == "coupled" or (sequence.draft is not None and sequence.draft.law is None)
