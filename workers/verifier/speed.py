"""Tokens, or what they are worth, and seconds of steps of one kind, as measured while serving."""

from __future__ import annotations

from dataclasses import dataclass

FADE = 1.0 - 1.0 / 256.0


@dataclass(slots=True)
class Speed:
    """Sums over the steps of one kind, old ones fading."""

    steps: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, num_tokens: float, seconds: float) -> None:
        """Take in one step."""
        self.steps = FADE * self.steps + 1.0
        self.tokens = FADE * self.tokens + num_tokens
        self.seconds = FADE * self.seconds + seconds

    def forget_half(self) -> None:
        """Let what was seen so far count half as much."""
        self.steps, self.tokens, self.seconds = self.steps / 2, self.tokens / 2, self.seconds / 2

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0
