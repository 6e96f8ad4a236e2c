"""How many drafted tokens each row of a step verifies, and what is drafted for the next one.

The planner (pure) is asked here with what the engine knows: costs as they are now, survival of the drafts at hand, latency budgets.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from dspark.types import DraftTree, Mode
from dspark.workers.verifier.costs import Floats, LiveCosts
from dspark.workers.verifier.draft_policy import LOOK_ROWS, DraftPolicy, Outlook
from dspark.workers.verifier.draft_worth import DraftWorth
from dspark.workers.verifier.planner import Pace, Ranking, best_count, count_within, early_stop, pack, rank
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.survival import SurvivalEstimator

ROW_RATE = 0.1  # of the running mean of drafts a row
LAG = 2  # steps between the confidences that a budget comes from and the step that it is for (DSpark section 5.2)


@dataclass(slots=True)
class Share:
    """One request's part of the step being planned. ``num_commit``: drafted tokens that may be committed (shadow: not all)."""

    sequence: Sequence
    num_known: int
    num_draft: int = 0
    num_commit: int = 0
    limit_s: float = math.inf  # seconds a token that keep its latency budget

    @property
    def samples(self) -> bool:
        return self.num_known == self.sequence.num_pending


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the cost of a step hangs on, drafts not counted: ``decode_tokens`` and ``prefill_tokens`` over ``context`` positions."""

    decode_tokens: int
    prefill_tokens: int
    context: int

    @staticmethod
    def of(shares: Seq[Share]) -> StepShape:
        decode = tokens = context = 0
        for share in shares:
            known = share.num_known
            tokens += known
            context += share.sequence.num_computed + known
            if known == 1:
                decode += 1
        return StepShape(decode, tokens - decode, context)

    def seconds(self, costs: LiveCosts, max_extra: int, with_padding: bool = True) -> Floats:
        """Seconds [k + 1] of the step with 0 .. k drafted tokens."""
        decode = costs.extra_seconds(self.decode_tokens, self.context, max_extra, with_padding)
        return decode + costs.table.prefill_s * self.prefill_tokens


@dataclass(slots=True)
class DraftPlanner:
    """Plans drafts by a live cost table; without one everything that was drafted is verified.

    ``looks_back``: take the budget of requests whose text a schedule could bias from confidences ``LAG`` steps old and search
    the whole cost curve (the overlapped driver); otherwise stop early on fresh ones (Algorithm 1).
    ``speculation_limit`` is the share of the longest draft that the cluster allows, from 0 to 1.
    """

    policy: DraftPolicy
    survival: SurvivalEstimator
    costs: LiveCosts | None = None
    looks_back: bool = False
    runs_ahead: bool = False  # steps are launched before their turn
    max_launched: int = 0  # tokens that such a step has at most
    speculation_limit: float = 1.0
    worth: DraftWorth = field(default_factory=DraftWorth)
    budget: int = 0  # drafted tokens that the last plan admitted
    is_paused: bool = False  # whether adaptive requests decode plainly now
    _drafts_a_row: float = 0.0  # running mean
    _last_depth: int = 0
    _history: deque[Ranking] = field(default_factory=lambda: deque(maxlen=LAG))

    def plan(self, shares: Seq[Share], left: int, draft_s: float) -> None:
        """Set ``num_draft`` of every share that has a draft, over at most ``left`` tokens. Drafting it took ``draft_s``."""
        trimmed: list[Share] = []
        for share in shares:
            sequence = share.sequence
            if sequence.draft is None or not num_drafted(sequence) or not share.samples:
                continue
            if self.costs is None or sequence.speculation.mode is Mode.STATIC:
                self._take_all(share, left)
                left -= share.num_draft
            else:
                trimmed.append(share)
        if self.costs is None:
            return
        self._trim(self.costs, trimmed, shares, left, draft_s)
        for share in trimmed:
            sequence = share.sequence
            sequence.rest.note(share.num_commit)
            if sequence.speculation.mode is Mode.SHADOW:
                share.num_draft = min(num_drafted(sequence), share.num_draft + left)
                left -= share.num_draft - share.num_commit

    def note_chains(self, confidence: Floats, margin: Floats) -> None:
        """A step verifies these chains [R, n] whole, without a plan: what they say of themselves is kept as that of planned ones is."""
        self.budget = confidence.size
        if self.costs is not None and self.policy.wants_survival and confidence.size:
            survival = self.survival.survival_of_chains(confidence, margin)
            self._history.append(rank(survival))
            self.policy.observe(survival)
        else:
            self.policy.pass_over()

    def observe_round(self, num_rows: int, depth: int, num_tokens: int, context: int, seconds: float) -> None:
        """A round of whole chains of ``depth``, launched before its turn, brought ``num_tokens``, ``seconds`` after the one before."""
        self.worth.observe(num_rows, True, num_tokens, seconds)
        if self.costs is not None:
            self.costs.observe_flown(num_rows, depth, context, seconds)

    def depth(self, sequences: Seq[Sequence]) -> int:
        """How deep to draft for the next step of these requests, those with adaptive verification; 0: not at all."""
        most = math.ceil(self.speculation_limit * self.policy.block_size)
        rows = [s for s in sequences if s.num_pending == 1]
        drafting = [s for s in rows if s.speculation.mode is Mode.ADAPTIVE]
        costs = self.costs
        if costs is None or not drafting or not most:
            self.is_paused = not most
            return most
        if self.runs_ahead:  # blocks that a graph does not hold are not launched ahead, and would be slower than shorter ones that are
            most = min(most, max(1, self.max_launched // len(rows) - 1))
        depth = min(most, self.policy.depth(lambda: self._outlook(costs, rows, len(drafting))))
        self._last_depth = depth if depth and self.worth.allows_drafts(len(rows), self.policy.gain) else 0
        self.is_paused = not self._last_depth
        return self._last_depth

    @property
    def most_drafting(self) -> int | None:
        """How many adaptive requests are to draft for the next step at most; None: all of them. A look at acceptance needs but a few.

        Not where steps run ahead: those are rounds in which all draft alike.
        """
        return LOOK_ROWS if self.policy.is_look and not self.runs_ahead else None

    def _outlook(self, costs: LiveCosts, rows: Seq[Sequence], num_drafting: int) -> Outlook:
        """What the next step of these requests costs, plain and with drafts for ``num_drafting`` of them."""
        context = sum(s.num_computed for s in rows)
        seconds = StepShape(len(rows), 0, context).seconds(costs, num_drafting * self.policy.block_size)
        plain_s, factor = float(seconds[0]), None
        if self.runs_ahead:  # the host's work lies under such steps
            plain_s, factor = costs.plain_seconds(len(rows), context), costs.flown_factor(len(rows))
        if factor is None:
            host_s = costs.host_seconds(len(rows))
            seconds, factor = seconds + host_s, 1.0
            plain_s = plain_s if self.runs_ahead else plain_s + host_s
        drafted_context = context * num_drafting // len(rows)
        drafting = [costs.table.draft_seconds(num_drafting, depth, drafted_context) for depth in range(1, self.policy.block_size + 1)]
        return Outlook(len(rows), num_drafting, plain_s, seconds * factor, np.array(drafting) * factor)

    def typical_seconds(self, num_rows: int, context: int) -> float:
        """Seconds of drafting and verifying for that many requests with as many drafts each as the last steps had; 0 without a table."""
        if self.costs is None or not num_rows:
            return 0.0
        return self.verify_seconds(num_rows, context) + self.costs.table.draft_seconds(num_rows, self._last_depth, context)

    def verify_seconds(self, num_rows: int, context: int) -> float:
        """The verification alone."""
        if self.costs is None:
            return 0.0
        return self.costs.table.step_seconds(round(num_rows * (1.0 + self._drafts_a_row)), context)

    def _take_all(self, share: Share, left: int) -> None:
        share.num_draft = share.num_commit = min(num_drafted(share.sequence), left)

    def _trim(self, costs: LiveCosts, trimmed: Seq[Share], shares: Seq[Share], left: int, draft_s: float) -> None:
        trees = [s.sequence.draft for s in trimmed if s.sequence.draft is not None]
        survival = self.survival.survival(trees)
        ranking = rank(survival)
        num_rows = sum([s.samples for s in shares])
        shape = StepShape.of(shares)
        fixed = sum([s.num_draft for s in shares])
        can_look_ahead = all(_cannot_be_biased(s.sequence) for s in trimmed)
        # an early stop would stop in front of every stair
        seconds = shape.seconds(costs, fixed + min(left, survival.size), can_look_ahead or self.looks_back)[fixed:]
        seconds = seconds + costs.host_seconds(num_rows)
        count = self._count(ranking, num_rows, seconds, can_look_ahead)
        if trimmed and min([s.limit_s for s in shares]) < math.inf:
            pace = _pace(trimmed, shares)
            count = self._count_within(ranking, survival, num_rows, seconds + draft_s, pace, count, trimmed)
        for share, length in zip(trimmed, ranking.lengths(count).tolist() if trimmed else (), strict=True):
            share.num_draft = share.num_commit = length
        self.budget = count + fixed
        self._drafts_a_row += ROW_RATE * (self.budget / max(num_rows, 1) - self._drafts_a_row)
        self._history.append(ranking)
        if any(s.sequence.drafts_wanted > s.sequence.draft_depth for s in trimmed):
            survival = pack([_branch_survival(tree, row) for tree, row in zip(trees, survival.tolist(), strict=True)])
        self.policy.observe(survival)

    def _count(self, ranking: Ranking, num_rows: int, seconds: Floats, can_look_ahead: bool) -> int:
        """How many drafted tokens are worth verifying."""
        if can_look_ahead:
            return best_count(ranking, num_rows, seconds)
        if not self.looks_back:
            return early_stop(ranking, num_rows, seconds)
        if len(self._history) < LAG:
            return len(seconds) - 1  # nothing is known yet: as if every confidence were 1
        return best_count(self._history[0], num_rows, seconds)

    def _count_within(
        self, ranking: Ranking, survival: Floats, num_rows: int, seconds: Floats, pace: Pace, count: int, trimmed: Seq[Share]
    ) -> int:
        """The count that keeps latency budgets; where a text could be biased, only counts that fresh confidences do not choose."""
        if all(_cannot_be_biased(s.sequence) for s in trimmed):
            return count_within(ranking, survival, num_rows, seconds, pace, len(seconds) - 1)
        if len(self._history) < LAG:
            return count
        old = self._history[0]
        expected = 1.0 + float(old.survival.sum()) / max(old.num_requests, 1)  # tokens a request and step, if all are verified
        tightest = min(float(pace.allowed.min(initial=math.inf)), pace.others)
        keeps = np.flatnonzero(seconds <= tightest * expected)
        return min(count, int(keeps[-1]) if len(keeps) else 0)


def num_drafted(sequence: Sequence) -> int:
    """Drafted tokens at hand that may be verified now."""
    draft = sequence.draft
    if draft is None or draft.base_len != len(sequence.tokens):
        return 0
    return min(len(draft.tokens), sequence.drafts_wanted)


def _branch_survival(tree: DraftTree, survival: Seq[float]) -> list[float]:
    """Survival of the branch of best candidates: of a tree, what a chain would be, so that the two teach the policy alike."""
    branch: list[float] = []
    tip = -1
    for node, parent in enumerate(tree.parents):
        if parent == tip:
            branch.append(survival[node])
            tip = node
    return branch


def _pace(trimmed: Seq[Share], shares: Seq[Share]) -> Pace:
    ranked = {id(share) for share in trimmed}
    others = min((s.limit_s for s in shares if id(s) not in ranked), default=math.inf)
    return Pace(np.array([s.limit_s for s in trimmed]), others)


def _cannot_be_biased(sequence: Sequence) -> bool:
    """Whether no schedule can change the law of the text: greedy, coupled, or drafts fixed by the history."""
    return (sequence.draft is not None and sequence.draft.law is None) or sequence.request.sampling.is_exact
