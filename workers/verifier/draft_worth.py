"""Whether drafting brings more tokens a second than plain decoding, found out by measuring both.

The draft policy predicts that from a cost table. Where the prediction is close, what the table leaves out decides: host work between
steps, drafting beside the device's work, plain steps that run ahead. So each level of load keeps the speed of both kinds of steps, wall
time from verdict to verdict, uses the kind that was faster, and tries the other one now and then. The choice is made before a
draft from steps that are over: it can bias no text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark.workers.verifier.speed import Speed

TRY_EVERY, TRY_FOR = 96, 6  # steps from one try of the other kind to the next, and its length
MOST_EVERY = 4 * TRY_EVERY
MIN_STEPS = 12.0  # of both kinds before one can replace the other
BETTER = 1.03
CLEAR_GAIN = 1.25  # predicted; above it plain decoding is not tried


@dataclass(slots=True)
class _Level:
    """One level of load: what it uses, and how both kinds fared there."""

    uses_drafts: bool = True
    drafting: Speed = field(default_factory=Speed)
    plain: Speed = field(default_factory=Speed)
    every: int = TRY_EVERY
    step: int = 0  # since the last try

    def next_drafts(self, is_close: bool) -> bool:
        self.step += 1
        tries = self.step > self.every - TRY_FOR
        if self.step == self.every:
            used, other = self._kinds
            is_clear = min(used.steps, other.steps) >= MIN_STEPS and used.tokens_per_s > BETTER * other.tokens_per_s
            self.step, self.every = 0, min(2 * self.every, MOST_EVERY) if is_clear else TRY_EVERY
        return not (tries and is_close) if self.uses_drafts else tries

    def settle(self) -> None:
        """Change to the other kind if it is clearly faster."""
        used, other = self._kinds
        if min(used.steps, other.steps) >= MIN_STEPS and other.tokens_per_s > BETTER * used.tokens_per_s:
            self.uses_drafts = not self.uses_drafts
            self.step, self.every = 0, TRY_EVERY

    @property
    def _kinds(self) -> tuple[Speed, Speed]:
        """The kind that is used, and the other one."""
        return (self.drafting, self.plain) if self.uses_drafts else (self.plain, self.drafting)


class DraftWorth:
    """Answers, for each level of load (streams to the next power of two), whether to draft."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}

    def allows_drafts(self, num_rows: int, predicted_gain: float) -> bool:
        """Whether the next step of so many streams may draft; ask once a step in which drafting is predicted to pay."""
        return self._level(num_rows).next_drafts(predicted_gain < CLEAR_GAIN)

    def observe(self, num_rows: int, was_drafting: bool, plain_s: float, seconds: float) -> None:
        """A decode step of ``num_rows`` streams, ``seconds`` after the one before, brought tokens that plain steps take ``plain_s`` for.

        By prediction, which need not be right: it makes steps of one level comparable that had other numbers of streams and contexts.
        """
        level = self._level(num_rows)
        (level.drafting if was_drafting else level.plain).add(plain_s, seconds)
        level.settle()

    def _level(self, num_rows: int) -> _Level:
        return self._levels.setdefault(num_rows.bit_length(), _Level())
