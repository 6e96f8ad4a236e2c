"""The tree builder written down once more, naively: one node at a time from a heap, each token drawn when its turn has come.

It cannot look at a token before the node is listed, so a builder that gives the same trees does not either.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.kernels.draft_draw import child_salt
from dspark.kernels.keyed_random import DRAFT, TOKEN, exponential
from dspark.types import DraftLaw, DraftTree
from dspark.workers.drafter.tree_draw import COUPLED_FLATTENING, FADE, MAX_CANDIDATES, SECOND_DRAW

Path = tuple[int, ...]
LawOf = Callable[[Path], tuple[Tensor, Tensor]]  # tokens drafted before -> (ids, probs) [w]


@dataclass(frozen=True)
class Wish:
    """What tree is wanted. ``rule``: greedy, coupled or ratio."""

    rule: str
    num_nodes: int
    num_levels: int
    seed: int
    base_len: int


@dataclass
class _Candidates:
    """What may follow a node, in the order of the rule; the chance of the next one is known before the one itself is looked at."""

    path: Path
    ids: Tensor
    probs: Tensor
    order: list[int]
    weights: list[float]
    sure: float
    salt: int
    turn: int = 0
    last: float = 1.0
    fallen: float = 1.0

    def next_chance(self, rule: str) -> float:
        if rule == "ratio":
            draw = self.sure * (1.0 if not self.turn else SECOND_DRAW * (2 / (self.turn + 1)) ** FADE)
            chance = draw * self.fallen
            self.fallen *= 1.0 - draw
        else:
            weight = self.weights[self.order[self.turn]] / math.fsum(self.weights)
            chance = math.sqrt(weight * self.sure) if not self.turn else weight
        self.last = min(self.last, chance)
        return self.last

    def law(self) -> Tensor:
        """The law of the candidate whose turn it is: without those before it."""
        left = self.probs.clone()
        left[self.order[: self.turn]] = 0.0
        return left / left.sum()


def naive_tree(wish: Wish, law: LawOf, confidence: Callable[[Path], float]) -> DraftTree:
    """The best ``num_nodes`` nodes, best first."""

    def after(path: Path, salt: int) -> _Candidates:
        ids, probs = law(path)
        keys = probs
        if wish.rule != "greedy":
            purpose, key_salt = (TOKEN, 0) if wish.rule == "coupled" else (DRAFT, salt)
            seed, position = torch.tensor(wish.seed), torch.tensor(wish.base_len + len(path))
            keys = probs / exponential(seed, position, purpose, ids, key_salt)
        weights = keys if wish.rule == "greedy" else keys ** (1 / COUPLED_FLATTENING)
        order = [i for i in keys.argsort(descending=True, stable=True).tolist() if keys[i] > 0][:MAX_CANDIDATES]
        return _Candidates(path, ids, probs, order, weights.tolist(), confidence(path), salt)

    heap: list[tuple[float, int, int, int, float, float, _Candidates]] = []

    def offer(candidates: _Candidates, parent: int, survival: float) -> None:
        if candidates.turn < len(candidates.order) and len(candidates.path) < wish.num_levels:
            chance = candidates.next_chance(wish.rule)
            heapq.heappush(heap, (-survival * chance, len(candidates.path), parent, candidates.turn, survival, chance, candidates))

    offer(after((), wish.base_len), -1, 1.0)
    tokens: list[int] = []
    parents: list[int] = []
    chances: list[float] = []
    laws: list[tuple[Tensor, Tensor]] = []
    while heap and len(tokens) < wish.num_nodes:
        worth, _, parent, turn, survival, chance, candidates = heapq.heappop(heap)
        token = int(candidates.ids[candidates.order[turn]])
        laws.append((candidates.ids, candidates.law()))
        tokens.append(token)
        parents.append(parent)
        chances.append(chance)
        candidates.turn += 1
        offer(candidates, parent, survival)
        salt = int(child_salt(torch.tensor(candidates.salt), torch.tensor(turn)))
        if len(candidates.path) + 1 < wish.num_levels:
            offer(after((*candidates.path, token), salt), len(tokens) - 1, -worth)
    kept = DraftLaw(torch.stack([ids for ids, _ in laws]), torch.stack([probs for _, probs in laws]))
    return DraftTree("r", wish.base_len, tuple(tokens), tuple(parents), tuple(chances), kept if wish.rule == "ratio" else None)
