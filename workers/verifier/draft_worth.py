"""Whether drafting brings more tokens a second than plain decoding, found out by measuring both.

The draft policy predicts that from a cost table and from recent drafts. Where the prediction is close, what they leave out decides: host
work between steps, drafting beside the device's work, plain steps that run ahead, estimates that are not yet calibrated. So each level of
load keeps the speed of both kinds of steps, wall time from verdict to verdict, uses the kind that was faster (as long as one was hardly
measured: the kind that was predicted), and tries the other one now and then. The choice is made before a draft from steps that are over:
it can bias no text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark.workers.verifier.speed import Speed

TRY_EVERY, TRY_FOR = 96, 6  # steps from one try of the other kind to the next, and its length
MOST_EVERY = 4 * TRY_EVERY
MIN_STEPS = 12.0  # of both kinds before they are compared
BETTER = 1.03
NOISE = 0.4  # of one step's tokens, relative
CLEAR_GAIN = 1.25  # predicted; above it plain decoding is not tried
CLEAR_LOSS = 0.9  # predicted; below it drafting is not tried


@dataclass(slots=True)
class _Level:
    """One level of load: what it uses, and how both kinds fared there."""

    uses_drafts: bool = True
    drafting: Speed = field(default_factory=Speed)
    plain: Speed = field(default_factory=Speed)
    every: int = TRY_EVERY
    step: int = 0  # since the last try

    def next_drafts(self, is_predicted: bool, is_clear: bool) -> bool:
        """Whether to draft; ``is_clear``: it is predicted to be far ahead."""
        if self._num_steps < MIN_STEPS:
            self.uses_drafts = is_predicted
        used, other = self._kinds
        self.step += 1
        if self.step == self.every - TRY_FOR + 1 and is_clear and not self.uses_drafts:
            other.forget_half()  # it was slower with other text than there is now
        tries = self.step > self.every - TRY_FOR
        if self.step == self.every:
            is_settled = self._num_steps >= MIN_STEPS and used.tokens_per_s > (BETTER + NOISE * self._num_steps**-0.5) * other.tokens_per_s
            self.step, self.every = 0, min(2 * self.every, MOST_EVERY) if is_settled else TRY_EVERY
        return not (tries and not is_clear) if self.uses_drafts else tries

    def settle(self) -> None:
        """Change to the other kind if it is clearly faster."""
        used, other = self._kinds
        if self._num_steps >= MIN_STEPS and other.tokens_per_s > BETTER * used.tokens_per_s:
            self.uses_drafts = not self.uses_drafts
            self.step, self.every = 0, TRY_EVERY

    @property
    def _kinds(self) -> tuple[Speed, Speed]:
        """The kind that is used, and the other one."""
        return (self.drafting, self.plain) if self.uses_drafts else (self.plain, self.drafting)

    @property
    def _num_steps(self) -> float:
        """Of the kind that was measured less."""
        return min(self.drafting.steps, self.plain.steps)


class DraftWorth:
    """Answers, for each level of load (streams to the next power of two), whether to draft."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}

    def allows_drafts(self, num_rows: int, gain: float, is_predicted: bool) -> bool:
        """Whether the next step of so many streams may draft; ask once a step.

        ``gain``: predicted tokens a second of drafting to those of plain decoding; ``is_predicted``: the policy would draft for that.
        """
        return gain > CLEAR_LOSS and self._level(num_rows).next_drafts(is_predicted, gain >= CLEAR_GAIN)

    def observe(self, num_rows: int, was_drafting: bool, plain_s: float, seconds: float) -> None:
        """A decode step of ``num_rows`` streams, ``seconds`` after the one before, brought tokens that plain steps take ``plain_s`` for.

        By prediction, which need not be right: it makes steps of one level comparable that had other numbers of streams and contexts.
        """
        level = self._level(num_rows)
        (level.drafting if was_drafting else level.plain).add(plain_s, seconds)
        level.settle()

    def _level(self, num_rows: int) -> _Level:
        return self._levels.setdefault(num_rows.bit_length(), _Level())
