"""Which drafted tokens to verify: the hardware-aware prefix scheduler (DSpark section 3.2, Algorithm 1).

Pure functions of survival probabilities (``survival.py``) and a cost table. Tokens are admitted in order of survival while
they raise the expected throughput

    theta = (rows + sum of admitted survivals) / step_seconds(base_tokens + admitted)

Stopping at the first token that does not raise theta keeps the ratio rule lossless: the admission of a token then never
depends on the token itself (through the confidence of its successors). See ``can_look_ahead`` for when that cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MIN_GAIN = 0.01  # predicted relative gain below which a longer plan is noise
StepSeconds = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One request that could verify drafts this step: survival of its nodes in order, none above the one before it."""

    survival: tuple[float, ...]


def rank(candidates: Sequence[Candidate]) -> list[tuple[float, int, int]]:
    """(survival, position, request) of every drafted token, best first; ties by position, then request, never by value."""
    ranked = [(s, j, r) for r, candidate in enumerate(candidates) for j, s in enumerate(candidate.survival)]
    return sorted(ranked, key=lambda item: (-item[0], item[1], item[2]))


def schedule(
    candidates: Sequence[Candidate],
    base_tokens: int,
    num_rows: int,
    step_seconds: StepSeconds,
    max_extra: int,
    can_look_ahead: bool,
) -> list[int]:
    """How many drafted tokens of each candidate to verify.

    ``base_tokens``: tokens of the step without drafts; ``num_rows``: rows that yield a token anyway (all of them count in
    theta); ``max_extra``: most drafted tokens that fit. ``can_look_ahead`` allows the best prefix of the whole ranking
    instead of the first stop; only for requests whose text no schedule can bias (greedy, coupled, or drafts that are a
    function of the history alone).
    """
    lengths = [0] * len(candidates)
    ranked = rank(candidates)[:max_extra]
    best = _best_count(ranked, base_tokens, num_rows, step_seconds, can_look_ahead)
    for _, position, request in ranked[:best]:
        lengths[request] = max(lengths[request], position + 1)
    return lengths


def _best_count(
    ranked: Sequence[tuple[float, int, int]], base_tokens: int, num_rows: int, step_seconds: StepSeconds, can_look_ahead: bool
) -> int:
    seconds = step_seconds(base_tokens)
    plain = num_rows / seconds
    theta, count, expected = plain, 0, float(num_rows)
    for i, (survival, _, _) in enumerate(ranked, start=1):
        longer = step_seconds(base_tokens + i)
        expected += survival
        value = expected / longer
        if can_look_ahead:
            if value > theta:
                theta, count = value, i
        # the margin is asked of every token by itself: a margin on the sum would let c_2 decide about x_1
        elif survival > 0 and survival >= (1 + MIN_GAIN) * theta * (longer - seconds):
            theta, count, seconds = value, i, longer
        else:
            break
    return count if theta >= plain * (1 + MIN_GAIN) or not can_look_ahead else 0


class DraftGate:
    """Decides whether drafting pays at all, from the predicted gain of recent steps; closed means plain decoding.

    While closed it opens for one step now and then (at most every ``MAX_PAUSE`` steps) to see whether that changed.
    """

    MAX_PAUSE = 64

    def __init__(self, smoothing: float = 0.2) -> None:
        self._smoothing = smoothing
        self._gain = 1.0 + MIN_GAIN
        self._pause = 1
        self._closed_for = 0

    def observe(self, gain: float) -> None:
        """Take in a step's predicted gain: theta with drafting (its cost included) over plain theta."""
        was_open = self._gain >= 1.0
        self._gain += self._smoothing * (gain - self._gain)
        if self._gain >= 1.0:
            self._pause = 1
        elif not was_open:
            self._pause = min(2 * self._pause, self.MAX_PAUSE)
        self._closed_for = 0

    def is_open(self) -> bool:
        """Whether to draft for the next step."""
        if self._gain >= 1.0:
            return True
        self._closed_for += 1
        return self._closed_for > self._pause
