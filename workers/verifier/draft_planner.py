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
from dspark.workers.verifier.draft_policy import LOOK_ROWS, RESTED, DraftPolicy, Outlook
from dspark.workers.verifier.draft_worth import DraftWorth
from dspark.workers.verifier.planner import Pace, Ranking, best_count, count_within, early_stop, pack, rank
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.shares import Shares, num_drafted
from dspark.workers.verifier.survival import SurvivalEstimator

ROW_RATE = 0.1  # of the running mean of drafts a row
LAG = 2  # steps between the confidences that a budget comes from and the step that it is for (DSpark section 5.2)


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

    def plan(self, shares: Shares, left: int, draft_s: float) -> None:
        """Decide ``num_draft`` and ``num_commit`` of every row, over at most ``left`` tokens. Drafting took ``draft_s``."""
        costs = self.costs
        shares.num_draft = shares.num_commit = [0] * len(shares.sequences)
        num_whole = 0
        for place in shares.whole if costs is not None else sorted(shares.whole + shares.places):
            num_draft = shares.num_draft[place] = min(num_drafted(shares.sequences[place]), left - num_whole)
            num_whole += num_draft
        if costs is None:
            return
        left -= num_whole
        survival = self.survival.survival(shares.drafts)
        self._trim(costs, shares, survival, num_whole, left, draft_s)
        if shares.shadows:
            self._add_shadows(shares, left)
        if self.policy.wants_survival:
            self.policy.observe(_branches(shares, survival))
        else:
            self.policy.pass_over()

    def note_chains(self, confidence: Floats, margin: Floats) -> None:
        """A step verifies these chains [R, n] whole, without a plan: what they say of themselves is kept as that of planned ones is."""
        self.budget = confidence.size
        if self.costs is not None and self.policy.wants_survival and confidence.size:
            survival = self.survival.survival_of_chains(confidence, margin)
            self._history.append(rank(survival))
            self.policy.observe(survival)
        else:
            self.policy.pass_over()

    def observe_step(self, num_rows: int, was_drafting: bool, num_tokens: int, context: int, seconds: float) -> None:
        """A decode step of these rows over ``context`` positions brought ``num_tokens``, ``seconds`` after the one before."""
        if self.costs is not None:
            plain_s = num_tokens * self.costs.plain_seconds(num_rows, context) / num_rows
            self.worth.observe(num_rows, was_drafting, plain_s, seconds)

    def observe_round(self, num_rows: int, depth: int, num_tokens: int, context: int, seconds: float, is_chosen: bool) -> None:
        """A round of whole chains of ``depth``, launched before its turn, brought ``num_tokens``, ``seconds`` after the one before.

        ``is_chosen``: the policy chose the depth.
        """
        if is_chosen:
            self.observe_step(num_rows, True, num_tokens, context, seconds)
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
        policy = self.policy
        depth = policy.depth(lambda: self._outlook(costs, rows, len(drafting)))
        if not policy.is_look:
            depth = (depth or policy.best) if self.worth.allows_drafts(len(rows), policy.gain, is_predicted=depth > 0) else 0
        self._last_depth = min(most, depth)
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
        seconds = costs.extra_seconds(len(rows), context, num_drafting * self.policy.block_size)
        plain_s, factor = float(seconds[0]), None
        if self.runs_ahead:  # the host's work lies under such steps
            plain_s, factor = costs.plain_seconds(len(rows), context), costs.flown_factor(len(rows))
        if factor is None:
            seconds, factor = seconds + costs.host_seconds(len(rows), drafted=True), 1.0
            plain_s = plain_s if self.runs_ahead else plain_s + costs.host_seconds(len(rows), drafted=False)
        drafted_context = context * num_drafting // len(rows)
        drafting = [costs.table.draft_seconds(num_drafting, depth, drafted_context) for depth in range(1, self.policy.block_size + 1)]
        return Outlook(len(rows), num_drafting, plain_s, seconds * factor, np.array(drafting) * factor, verifies_all=self.runs_ahead)

    def plain_seconds(self, num_rows: int, context: int) -> float | None:
        """Seconds of a step of so many requests without drafts; None without a table."""
        return None if self.costs is None else self.costs.plain_seconds(num_rows, context)

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

    def _trim(self, costs: LiveCosts, shares: Shares, survival: Floats, num_whole: int, left: int, draft_s: float) -> None:
        """Choose among the drafts of ``survival`` [R, n] beside ``num_whole`` tokens that are verified in any case."""
        ranking = rank(survival)
        num_rows = shares.samples.count(True)
        # an early stop would stop in front of every stair
        with_padding = shares.is_unbiased or self.looks_back
        seconds = shares.seconds(costs, num_whole + min(left, survival.size), with_padding)[num_whole:]
        seconds += costs.host_seconds(num_rows, drafted=True)
        count = self._count(ranking, num_rows, seconds, shares.is_unbiased)
        if shares.num_limited and shares.places:
            count = self._count_within(ranking, survival, num_rows, seconds + draft_s, _pace(shares, costs), count, shares.is_unbiased)
        if shares.places:
            self._admit(shares, ranking.lengths(count).tolist())
        self.budget = count + num_whole
        self._drafts_a_row += ROW_RATE * (self.budget / max(num_rows, 1) - self._drafts_a_row)
        self._history.append(ranking)

    def _admit(self, shares: Shares, lengths: list[int]) -> None:
        """Give the rows with drafts so many each; requests of which none was admitted rest."""
        sequences = shares.sequences
        if len(lengths) == len(sequences):
            shares.num_draft = shares.num_commit = lengths
        else:
            sequences = [sequences[place] for place in shares.places]
            for place, length in zip(shares.places, lengths, strict=True):
                shares.num_draft[place] = length
        for sequence, length in zip(sequences, lengths, strict=True):
            if not length or sequence.rest is not RESTED:
                sequence.rest = sequence.rest.after(length)

    def _add_shadows(self, shares: Shares, left: int) -> None:
        """Verify all that was drafted in shadow mode, as far as ``left`` goes."""
        shares.num_commit = shares.num_draft.copy()
        for place in shares.shadows:
            num_admitted = shares.num_commit[place]
            shares.num_draft[place] = min(num_drafted(shares.sequences[place]), num_admitted + left)
            left -= shares.num_draft[place] - num_admitted

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
        self, ranking: Ranking, survival: Floats, num_rows: int, seconds: Floats, pace: Pace, count: int, can_look_ahead: bool
    ) -> int:
        """The count that keeps latency budgets; where a text could be biased, only counts that fresh confidences do not choose."""
        if can_look_ahead:
            return count_within(ranking, survival, num_rows, seconds, pace, len(seconds) - 1)
        if len(self._history) < LAG:
            return count
        old = self._history[0]
        expected = 1.0 + float(old.survival.sum()) / max(old.num_requests, 1)  # tokens a request and step, if all are verified
        tightest = min(float(pace.allowed.min(initial=math.inf)), pace.others)
        keeps = np.flatnonzero(seconds - pace.prompt_s <= tightest * expected)
        return min(count, int(keeps[-1]) if len(keeps) else 0)


def _branches(shares: Shares, survival: Floats) -> Floats:
    """Survival of the branches of best candidates: of trees, what chains would be, so that the two teach the policy alike."""
    sequences = map(shares.sequences.__getitem__, shares.places)
    if not [s for s in sequences if s.drafts_wanted > s.draft_depth]:
        return survival
    return pack([_branch_survival(tree, row) for tree, row in zip(shares.drafts, survival.tolist(), strict=True)])


def _branch_survival(tree: DraftTree, survival: Seq[float]) -> list[float]:
    branch: list[float] = []
    tip = -1
    for node, parent in enumerate(tree.parents):
        if parent == tip:
            branch.append(survival[node])
            tip = node
    return branch


def _pace(shares: Shares, costs: LiveCosts) -> Pace:
    ranked, usual = set(shares.places), [sequence.tokens_per_round for sequence in shares.sequences]
    others = min((limit_s * usual[place] for place, limit_s in enumerate(shares.limits) if place not in ranked), default=math.inf)
    return Pace(
        allowed=np.array([shares.limits[place] for place in shares.places]),
        others=others,
        usual=np.array([usual[place] for place in shares.places]),
        prompt_s=costs.table.prefill_s * (shares.num_tokens - shares.decode_tokens),
    )
