"""Whether to draft for the next step, how deep, and for whom; decided from steps that are over, so no text can be biased.

Plain decoding is depth 0, a normal answer: it comes when no depth is predicted to pay for its drafting and verification at the
present load, and it ends by itself when the load falls. What only changes with the text (acceptance) cannot be seen while
nothing is drafted, so now and then a step drafts all the same, more and more rarely. The same holds for a request whose drafts
are never admitted: it sits out more and more rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dspark.workers.verifier.costs import Floats
from dspark.workers.verifier.planner import rank

KEPT_ROWS = 256  # recent drafts that stand for the next ones
DECIDE_EVERY, DECIDE_S = 4, 0.01  # steps, and seconds of plain ones, from one decision to the next: it costs more than a plan
LONGEST_PAUSE = 64  # steps between two looks at acceptance while nothing is drafted
LOOK_ROWS = 2  # requests that draft in such a look
LOOK_WEIGHT = 8  # rows that each of them stands for
LOOK_DEEPER_EVERY = 32  # steps between two looks at whole blocks while drafts are shorter
MAX_REST = 16  # rounds a request sits out at most
MIN_GAIN = 0.03  # predicted: the best of many predictions is too good by about as much
RETURN_GAIN = 0.08  # the same to come back from plain steps: what is known then comes from a few looks
DEEPER_GAIN = 0.03  # of the best depth over a smaller one, which is taken otherwise: the deeper, the more is predicted that does not come
LEARN = 0.02  # of a mean confidence, for each draft seen


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a step of ``num_rows`` requests costs, of which ``num_drafting`` may draft.

    ``plain_s`` without drafts; ``seconds`` [k + 1] with 0 .. k drafted tokens to verify; ``drafting`` [γ] of depths 1 .. γ.
    ``verifies_all``: no plan will choose among the drafts, all of them are verified.
    """

    num_rows: int
    num_drafting: int
    plain_s: float
    seconds: Floats
    drafting: Floats
    verifies_all: bool = False


@dataclass(slots=True)
class DraftPolicy:
    """Chooses the depth of the next drafts from the survival of recent ones and from what drafting and verifying cost.

    ``block_size`` γ is the largest depth.
    """

    block_size: int
    _recent: Floats = field(init=False)  # [k, γ] survival of the last drafts, a best guess where a draft was shorter
    _conditional: Floats = field(init=False)  # [γ] mean confidence of each position given the one before
    gain: float = 1.0  # predicted tokens a second of the best depth over 0 to those of plain decoding, as of the last decision
    best: int = field(init=False)  # that depth
    is_look: bool = False  # whether the last depth was no decision for drafts but a look at acceptance
    _oldest: int = 0
    _depth: int = field(init=False)
    _steps: int = 0
    _decides_at: int = 1  # steps
    _closed_for: int = 0
    _pause: int = 1
    _num_observed: int = 0

    def __post_init__(self) -> None:
        self._recent = np.ones((0, self.block_size))
        self._conditional = np.ones(self.block_size)
        self._depth = self.best = self.block_size

    @property
    def wants_survival(self) -> bool:
        """Whether ``observe`` would look at the chains of the next step."""
        return self.is_look or self._num_observed % DECIDE_EVERY == 0 or not len(self._recent)

    def pass_over(self) -> None:
        """``observe`` of a step whose chains it would not look at."""
        self._num_observed += 1

    def observe(self, survival: Floats) -> None:
        """Take in the survival [R, n] of the chains of one step; a row of zeros is a request without a draft."""
        is_wanted = self.wants_survival
        self.pass_over()
        if not is_wanted:
            return
        drafted = survival[:, : self.block_size] if survival.shape[1] else survival[:0]
        if not (is_drafted := drafted[:, :1].ravel() > 0).all():
            drafted = drafted[is_drafted]
        if not len(drafted):
            return
        if self.is_look and len(drafted) <= LOOK_ROWS:
            drafted = np.repeat(drafted, LOOK_WEIGHT, axis=0)
        full = np.zeros((self.block_size, len(drafted)))
        full[: drafted.shape[1]] = drafted.T
        before = np.ones(len(drafted))
        for position, here in enumerate(full):
            seen = here > 0
            if count := np.count_nonzero(seen):
                gained, of = (here, before) if count == len(here) else (here[seen], before[seen])
                mean = min(float(gained.sum() / of.sum()), 1.0)
                self._conditional[position] += min(1.0, LEARN * count) * (mean - self._conditional[position])
            if count < len(here):
                here[~seen] = before[~seen] * self._conditional[position]
            before = here
        self._keep(full.T[-KEPT_ROWS:])

    def depth(self, outlook: Callable[[], Outlook]) -> int:
        """How deep to draft for the next step; 0: not at all. ``outlook`` is asked when a decision is due."""
        self.is_look = False
        if not len(self._recent):
            return self.block_size
        self._steps += 1
        if self._steps >= self._decides_at:
            seen = outlook()
            self._depth = self._best_depth(seen)
            self._decides_at = self._steps + max(DECIDE_EVERY, round(DECIDE_S / seen.plain_s))
        if self._depth:
            self._pause, self._closed_for = 1, 0
            return self.block_size if self._steps % LOOK_DEEPER_EVERY == 0 else self._depth
        self._closed_for += 1
        if self._closed_for <= self._pause:
            return 0
        self._pause, self._closed_for = min(2 * self._pause, LONGEST_PAUSE), 0
        self.is_look = True
        return self.block_size

    def _keep(self, rows: Floats) -> None:
        if len(self._recent) < KEPT_ROWS:
            self._recent = np.concatenate([self._recent, rows])[-KEPT_ROWS:]
            return
        places = (self._oldest + np.arange(len(rows))) % KEPT_ROWS
        self._recent[places] = rows
        self._oldest = int(places[-1] + 1) % KEPT_ROWS

    def _best_depth(self, outlook: Outlook) -> int:
        """The depth with the most predicted tokens a second, its drafting paid for; 0 if that is not enough more than plain ones."""
        ranking, share = rank(self._recent), outlook.num_drafting / len(self._recent)
        num_rows, seconds = outlook.num_rows, outlook.seconds
        found: list[float] = []
        for depth in range(1, self.block_size + 1):
            expected = num_rows + _accepted(ranking.down_to(depth).survival, share)[: len(seconds)]
            values = expected / (seconds[: len(expected)] + outlook.drafting[depth - 1])
            found.append(float(values[-1] if outlook.verifies_all else values.max()))
        best = max(found)
        self.best = 1 + next(i for i, value in enumerate(found) if value >= best * (1 - DEEPER_GAIN))
        self.gain = best * outlook.plain_s / num_rows
        return self.best if self.gain > 1 + (MIN_GAIN if self._depth else RETURN_GAIN) else 0


def _accepted(survival: Floats, share: float) -> Floats:
    """Expected accepted tokens [n + 1] of the best 0 .. n drafted ones where ``share`` times as many requests draft alike."""
    total = np.concatenate([[0.0], np.cumsum(survival)])
    counts = np.arange(round(len(survival) * share) + 1)
    accepted: Floats = share * np.interp(counts / share, np.arange(len(total)), total)
    return accepted


@dataclass(slots=True, eq=False)
class Rest:
    """How long one request sits out: twice as many rounds after each round in which none of its drafts was admitted."""

    _length: int = 0
    _left: int = 0

    def after(self, num_admitted: int) -> Rest:
        """What follows a planned round that drafted for it."""
        if num_admitted:
            return RESTED
        rest = Rest() if self is RESTED else self
        rest._length = rest._left = min(max(1, 2 * self._length), MAX_REST)
        return rest

    def is_due(self) -> bool:
        """Whether to draft for it now; ask once a round."""
        if self._left:
            self._left -= 1
            return False
        return True


RESTED = Rest()  # of all requests whose last drafts were admitted
