"""Drafts copied from the request's own text: what followed the last time its latest tokens occurred.

Prompt lookup needs no training and no features. The draft is a function of the committed tokens only, so its law is
one-hot (``DraftTree.law`` None) and its confidence may look at anything in the history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark.types import DraftTree, DraftTurn
from dspark.workers.drafter.acceptance import AcceptanceEstimator
from dspark.workers.drafter.ngram_index import NgramIndex


@dataclass(frozen=True, slots=True)
class _Proposal:
    """What would follow ``base_len`` tokens. It is made even when nothing may be verified: what comes then teaches as much."""

    base_len: int
    bucket: int
    tokens: tuple[int, ...]
    confidence: tuple[float, ...]


@dataclass(slots=True)
class _State:
    index: NgramIndex
    proposal: _Proposal | None = None
    limit: int = 0
    last_accepted: int = -1  # accepted tokens of the last proposal whose outcome was seen; -1: none yet


class NgramDrafter:
    """Drafts by the longest suffix match in prompt and output; the latest occurrence wins among equals.

    ``block_size`` tokens are copied at most. Matches are ``min_ngram`` to ``max_ngram`` tokens long. A turn costs time
    proportional to its new tokens, memory is proportional to the tokens of requests that are not closed.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, block_size: int = 8, min_ngram: int = 2, max_ngram: int = 8) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        NgramIndex(min_ngram, max_ngram)  # refuses bad lengths here and not at the first request
        self.block_size = block_size
        self._min_ngram = min_ngram
        self._max_ngram = max_ngram
        self._states: dict[str, _State] = {}
        self._estimator = AcceptanceEstimator(_prior(min_ngram, max_ngram, block_size))

    def project(self, taps: Any) -> None:
        """No features: this drafter taps no layer."""

    def propose(self, turns: Sequence[DraftTurn]) -> None:
        """Take in committed tokens, learn from them how the last proposal fared, and look up the next one."""
        for turn in turns:
            state = self._advance(turn)
            if state is None:
                continue
            state.limit = turn.max_draft
            if state.proposal is None or state.proposal.base_len != turn.base_len:
                state.proposal = self._look_up(state, turn.base_len)

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """The copied tokens, at most ``want[id]`` of them; they are always ready."""
        trees = {}
        for request_id, limit in want.items():
            state = self._states.get(request_id)
            if state is None or state.proposal is None:
                continue
            count = min(limit, state.limit)
            tokens = state.proposal.tokens[:count] if count > 0 else ()
            if tokens:
                trees[request_id] = DraftTree.chain(request_id, state.proposal.base_len, tokens, state.proposal.confidence[:count])
        return trees

    def close(self, request_ids: Sequence[str]) -> None:
        """Forget requests that ended."""
        for request_id in request_ids:
            self._states.pop(request_id, None)

    def _advance(self, turn: DraftTurn) -> _State | None:
        """Bring the request's index up to ``turn``; None if tokens are missing, and then it drafts no more until it starts over."""
        state = self._states.get(turn.request_id)
        if state is None or len(state.index.tokens) + len(turn.tokens) != turn.base_len:
            self._states.pop(turn.request_id, None)
            if len(turn.tokens) != turn.base_len:
                return None
            state = self._states[turn.request_id] = _State(NgramIndex(self._min_ngram, self._max_ngram))
        if turn.tokens:
            if state.proposal is not None:
                state.last_accepted = self._learn(state.proposal, turn.tokens)
            state.index.extend(turn.tokens)
        return state

    def _learn(self, proposal: _Proposal, committed: Sequence[int]) -> int:
        """Count the outcomes that ``committed`` shows, up to the first mismatch; return how many tokens were right.

        A trimmed draft is observed as far as the committed tokens reach; what lies beyond them says nothing.
        """
        right = 0
        for position, (drafted, true) in enumerate(zip(proposal.tokens, committed, strict=False)):
            self._estimator.observe(proposal.bucket, position, drafted == true)
            if drafted != true:
                break
            right += 1
        return right

    def _look_up(self, state: _State, base_len: int) -> _Proposal | None:
        match = state.index.match
        if match is None:
            return None
        tokens = state.index.continuation(match.end, self.block_size)
        agrees = state.index.tokens[match.recent_end + 1] == tokens[0]
        bucket = _bucket(match.length - self._min_ngram, agrees, state.last_accepted)
        return _Proposal(base_len, bucket, tuple(tokens), self._estimator.estimate(bucket))


def _bucket(extra_length: int, agrees: bool, last_accepted: int) -> int:
    """Bucket number from the match's length over the minimum, the agreement of its places, and the request's last outcome."""
    history = 1 if last_accepted < 0 else 0 if last_accepted == 0 else 2
    return (extra_length * 2 + agrees) * 3 + history


def _prior(min_ngram: int, max_ngram: int, block_size: int) -> list[list[float]]:
    """Estimates before any traffic, by bucket: a longer match, agreeing places and a good last round speak for the draft.

    A draft token that follows ``k`` accepted ones continues a match that is ``k`` tokens longer, so it counts as such.
    """
    rows = []
    for length in range(min_ngram, max_ngram + 1):
        for odds in (0.6, 1.0):
            for history in (0.7, 1.0, 1.5):
                scale = 1.0 / (odds * history)
                rows.append([1.0 / (1.0 + scale * 2.0 * 0.75 ** (length + k - 1)) for k in range(block_size)])
    return rows
