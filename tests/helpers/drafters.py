"""Drafters with known behaviour, for tests of whatever sits on the other side of the seam."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dspark.types import BlockTables, DraftSignals, DraftTree, DraftTurn

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
    signals = DraftSignals()

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


class TreeOracle(OracleDrafter):
    """Proposes random trees in which a branch follows the true continuation, now and then with an error; chains where asked.

    It may tap the target: ``features[request id][position]`` are then the taps that it was given.
    """

    def __init__(
        self, truth: Mapping[str, Sequence[int]], block_size: int = 4, taps: tuple[int, ...] = (), vocab_size: int = 160, seed: int = 0
    ) -> None:
        super().__init__(truth, block_size, vocab_size=vocab_size, seed=seed)
        self.taps = taps
        self.features: dict[str, dict[int, Any]] = {}

    def project(self, taps: Any) -> Any:
        return taps

    def propose(self, turns: Sequence[DraftTurn]) -> None:
        super().propose(turns)
        for turn in turns:
            for offset, feature in enumerate(turn.features if turn.features is not None else ()):
                self.features.setdefault(turn.request_id, {})[turn.feature_start + offset] = feature

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        trees = {}
        for request_id, limit in want.items():
            turn = self._turns.get(request_id)
            if turn is not None and turn.max_draft:
                trees[request_id] = self._grown(turn, limit) if turn.max_nodes else self._chain(turn, limit)
                self.num_collected += 1
        return trees

    def _chain(self, turn: DraftTurn, limit: int) -> DraftTree:
        tokens = self._true(turn, min(limit, self.block_size, turn.max_draft))
        return DraftTree.chain(turn.request_id, turn.base_len, tokens, [0.9] * len(tokens))

    def _grown(self, turn: DraftTurn, limit: int) -> DraftTree:
        """Nodes in a random order; while the true branch can go on, every other node or so continues it."""
        levels = min(self.block_size, turn.max_draft)
        true = self._true(turn, levels)
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        tip = -1
        while len(tokens) < min(limit, turn.max_nodes):
            depth = 0 if tip < 0 else depths[tip] + 1
            continues = depth < len(true) and self._random.random() < 0.5
            parent = tip if continues else self._random.randrange(-1, len(tokens))
            parent = parent if parent < 0 or depths[parent] + 1 < levels else -1
            wrong = self._random.randrange(self._vocab_size)
            if continues and self._random.random() < 0.9:
                tip = len(tokens)
            tokens.append(true[depth] if continues and tip == len(tokens) else wrong)
            parents.append(parent)
            depths.append(0 if parent < 0 else depths[parent] + 1)
        confidence = tuple(self._random.uniform(0.6, 1.0) for _ in tokens)
        return DraftTree(turn.request_id, turn.base_len, tuple(tokens), tuple(parents), confidence)

    def _true(self, turn: DraftTurn, count: int) -> list[int]:
        return [int(token) for token in self._truth.get(turn.request_id, ())[turn.base_len : turn.base_len + count]]


class KnownTexts:
    """Continues whichever of some texts a request's tokens begin, with confidence 0.99; checks that its tables hold the context."""

    block_size = 4
    taps: tuple[int, ...] = ()
    signals = DraftSignals()

    def __init__(self, texts: Sequence[Sequence[int]], tables: BlockTables) -> None:
        self._texts = [tuple(text) for text in texts]
        self._tables = tables
        self._known: dict[str, tuple[int, ...]] = {}
        self._wanted: dict[str, int] = {}

    def project(self, taps: Any) -> None:
        """No features."""

    def propose(self, turns: Sequence[DraftTurn]) -> None:
        for turn in turns:
            known = self._known.get(turn.request_id, ())
            self._known[turn.request_id] = known[: turn.base_len - len(turn.tokens)] + turn.tokens
            self._wanted[turn.request_id] = turn.max_draft
            assert len(self._known[turn.request_id]) == turn.base_len

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        trees = {}
        for request_id, limit in want.items():
            known = self._known[request_id]
            assert len(self._tables.table(request_id)) * self._tables.block_size >= len(known) - 1
            text = next((text for text in self._texts if text[: len(known)] == known), ())
            tokens = text[len(known) : len(known) + min(limit, self._wanted[request_id], self.block_size)]
            if tokens:
                trees[request_id] = DraftTree.chain(request_id, len(known), tokens, [0.99] * len(tokens))
        return trees

    def close(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:  # one that was cancelled before its first turn is not known
            self._known.pop(request_id, None)
            self._wanted.pop(request_id, None)
