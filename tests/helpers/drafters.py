"""Drafters with known behaviour, for tests of whatever sits on the other side of the seam."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dspark.types import DraftTree, DraftTurn

Fault = Literal["none", "drop", "stale", "adversarial", "random"]


class OracleDrafter:
    """Proposes the true continuation with confidence 0.99, or spoils it in one of four ways.

    ``truth`` maps a request id to all its tokens, prompt included. Requests that are not in it get no drafts (except under
    ``random``). ``fault``:

    ``drop``         ``rate`` of the drafts are lost
    ``stale``        ``rate`` of the drafts carry another ``base_len``
    ``adversarial``  every token is wrong, at confidence 0.99
    ``random``       every token and confidence is random
    """

    taps: tuple[int, ...] = ()

    def __init__(
        self,
        truth: Mapping[str, Sequence[int]],
        block_size: int = 4,
        fault: Fault = "none",
        rate: float = 0.5,
        vocab_size: int = 256,
        seed: int = 0,
    ) -> None:
        self.block_size = block_size
        self.num_collected = 0
        self._truth = truth
        self._fault = fault
        self._rate = rate
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._turns: dict[str, DraftTurn] = {}

    def project(self, taps: Any) -> None:
        """No features."""

    def propose(self, turns: Sequence[DraftTurn]) -> None:
        for turn in turns:
            self._turns[turn.request_id] = turn

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        trees = {}
        for request_id, limit in want.items():
            turn = self._turns.get(request_id)
            count = min(limit, self.block_size, turn.max_draft) if turn else 0
            if turn is None or count <= 0:
                continue
            tree = self._tree(turn, count)
            if tree is not None and tree.tokens:
                trees[request_id] = tree
                self.num_collected += 1
        return trees

    def close(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._turns.pop(request_id, None)

    def _tree(self, turn: DraftTurn, count: int) -> DraftTree | None:
        tokens = [int(token) for token in self._truth.get(turn.request_id, ())[turn.base_len : turn.base_len + count]]
        confidence = [0.99] * len(tokens)
        base_len = turn.base_len
        if self._fault == "adversarial":
            tokens = [(token + 1) % self._vocab_size for token in tokens]
        elif self._fault == "random":
            tokens = [self._random.randrange(self._vocab_size) for _ in range(count)]
            confidence = [self._random.uniform(0.01, 0.99) for _ in range(count)]
        elif self._fault == "drop" and self._random.random() < self._rate:
            return None
        elif self._fault == "stale" and self._random.random() < self._rate:
            base_len += self._random.choice((-1, 1, 3))
        return DraftTree.chain(turn.request_id, base_len, tokens, confidence)
