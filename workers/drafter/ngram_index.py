"""Longest repeated suffix of a growing token sequence, exact and incremental.

The index maps n-grams to the position of their last token in their latest occurrence. It is filled lazily: the
(n+1)-gram that ends at a position is only stored once the n-gram that ends there has been seen twice, because until
then the n-gram alone identifies the place. The answers are those of a complete index; on ordinary text it holds one to
two entries a token instead of one per n-gram length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOKEN_BITS = 32  # n-grams are keyed by their tokens packed into one integer behind a leading 1, so keys are exact


@dataclass(frozen=True, slots=True)
class SuffixMatch:
    """The longest suffix of the sequence that occurred before.

    ``length`` tokens match; ``end`` is the position of the last token of their latest earlier occurrence.
    ``recent_end`` is that of the shortest indexed suffix, so ``recent_end >= end``; the two disagree on what follows when the
    latest place that looks a little like this one is not the place that looks most like it.
    """

    length: int
    end: int
    recent_end: int


class NgramIndex:
    """All n-grams of ``min_ngram`` to ``max_ngram`` tokens of one sequence.

    A match looks at most ``max_ngram`` tokens back. Appending costs at most ``max_ngram - min_ngram + 1`` dictionary steps.
    Tokens are integers in [0, 2**32).
    """

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"n-gram lengths must satisfy 1 <= min <= max, not {min_ngram} and {max_ngram}")
        self.tokens: list[int] = []
        self.match: SuffixMatch | None = None
        self._min = min_ngram
        self._max = max_ngram
        self._last: dict[int, int] = {}

    def extend(self, new_tokens: Sequence[int]) -> None:
        """Append tokens; ``match`` then belongs to the new end of the sequence."""
        for token in new_tokens:
            self.tokens.append(token)
            self.match = self._insert(len(self.tokens) - 1)

    def continuation(self, end: int, count: int) -> list[int]:
        """The ``count`` tokens after position ``end``, copied as if the sequence went on repeating itself.

        Where the copy runs past the end of the sequence it reads what it has just written, so a period is continued.
        """
        tokens, start = self.tokens, end + 1
        period = len(tokens) - start
        return [tokens[start + i % period] for i in range(count)]

    def __len__(self) -> int:
        return len(self._last)

    def _insert(self, position: int) -> SuffixMatch | None:
        """Store the n-grams that end at ``position`` and return the longest that was there before."""
        tokens, last = self.tokens, self._last
        if position + 1 < self._min:
            return None
        key = _pack(tokens[position - self._min + 1 : position + 1])
        matched, end, recent = 0, -1, -1
        for length in range(self._min, self._max + 1):
            earlier = last.get(key, -1)
            last[key] = position
            if earlier < 0:
                break
            matched, end = length, earlier
            recent = max(recent, earlier)
            if length > earlier:
                break  # the latest place starts the sequence; earlier places have even less room for a longer match
            if length < self._max:
                last.setdefault(key << TOKEN_BITS | tokens[earlier - length], earlier)
                key = key << TOKEN_BITS | tokens[position - length]
        return SuffixMatch(matched, end, recent) if matched else None


def _pack(gram: Sequence[int]) -> int:
    key = 1
    for token in reversed(gram):
        key = key << TOKEN_BITS | token
    return key
