"""The exact law of rounds with draft trees, by enumeration of every tree, every acceptance and every own token.

A tree grows node by node. A ``Policy`` says where the next node goes, from what was drawn so far; then its token is drawn from
the drafter's law without the siblings before it. The judge's arithmetic (``ratio.py``) decides as ``tree_judge.py`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from helpers.exact_laws import DraftLawOf, Law, Tokens, worst_error
from torch import Tensor

from dspark.workers.verifier.ratio import accept_probability, shrink

Node = tuple[int, int]  # parent (-1: the anchor), token
Nodes = tuple[Node, ...]
Policy = Callable[[int, Tokens, Nodes], int | None]  # round, tokens at its start, nodes so far -> the next one's parent; None: enough
Peek = Callable[[int, Tokens, Nodes], bool]  # whether the newest node, seen with its token, stays: what no schedule may do


@dataclass(frozen=True)
class TreeRule:
    """How candidates are tried: ``accept(left, draft)`` [V] is P(x stands), ``after(left, draft)`` what a fallen one leaves,
    ``own(target, left)`` the law of the own token, ``next_law(law, earlier)`` the law of a candidate after its siblings."""

    accept: Callable[[Tensor, Tensor], Tensor]
    after: Callable[[Tensor, Tensor, int], Tensor]
    own: Callable[[Tensor, Tensor], Tensor]
    next_law: Callable[[Tensor, Tokens], Tensor]


def without(law: Tensor, earlier: Tokens) -> Tensor:
    """The law of a draw without replacement; all zeros when nothing is left."""
    law = law.clone()
    law[list(earlier)] = 0.0
    return law / law.sum() if float(law.sum()) > 0 else law


def left_by(left: Tensor, draft: Tensor, token: int) -> Tensor:
    """The judge's own arithmetic, normalised."""
    ids = draft.nonzero().squeeze(1)
    less, total = shrink(left[None], left.sum()[None], ids[None], draft[ids][None])
    return less[0] / total[0]


def one_hot_left(left: Tensor, draft: Tensor, token: int) -> Tensor:
    return left_by(left, torch.zeros_like(draft).index_fill(0, torch.tensor([token]), 1.0), token)


RATIO_TREE = TreeRule(accept_probability, left_by, lambda target, left: left, without)
FORGETS_REJECTIONS = TreeRule(accept_probability, lambda left, draft, token: left, lambda target, left: left, without)
OWN_FROM_TARGET = TreeRule(accept_probability, left_by, lambda target, left: target, without)
WITH_REPLACEMENT_LAW = TreeRule(accept_probability, left_by, lambda target, left: left, lambda law, earlier: law)
ONE_HOT_RESIDUAL = TreeRule(accept_probability, one_hot_left, lambda target, left: left, without)


@dataclass
class TreeEnumeration:
    """All outcomes of consecutive rounds whose drafts are trees; see ``exact_laws.Enumeration`` for chains.

    Tokens are drawn without replacement whatever ``rule.next_law`` makes the judge believe.
    """

    vocab_size: int
    target: Law
    draft: DraftLawOf
    policy: Policy
    rule: TreeRule = RATIO_TREE
    stays: Peek = lambda index, start, nodes: True
    _residuals: dict[tuple[int, Tokens, Tokens, Tokens], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def run(self, num_rounds: int) -> dict[Tokens, float]:
        """P(tokens committed after the rounds); tokens have different lengths."""
        laws: dict[Tokens, float] = {(): 1.0}
        for index in range(num_rounds):
            after: dict[Tokens, float] = {}
            for start, prob in laws.items():
                for nodes, weight in self._grow(index, start, (), 1.0):
                    for tokens, share in self._walk(index, start, nodes, -1, ()):
                        after[start + tokens] = after.get(start + tokens, 0.0) + prob * weight * share
            laws = after
        return laws

    def worst_error(self, num_rounds: int, length: int) -> float:
        """Largest deviation, over all texts of ``length`` tokens, from the product of target laws."""
        return worst_error(self.run(num_rounds), self.target, length)

    def _grow(self, index: int, start: Tokens, nodes: Nodes, weight: float) -> Iterator[tuple[Nodes, float]]:
        parent = self.policy(index, start, nodes)
        law = None if parent is None else without(self.draft(index, start, path_to(nodes, parent)), candidates(nodes, parent))
        if parent is None or law is None or float(law.sum()) == 0.0:
            yield nodes, weight
            return
        for token in range(self.vocab_size):
            if float(law[token]) > 0:
                more, share = (*nodes, (parent, token)), weight * float(law[token])
                if self.stays(index, start, more):
                    yield from self._grow(index, start, more, share)
                else:
                    yield nodes, share

    def _walk(self, index: int, start: Tokens, nodes: Nodes, node: int, path: Tokens) -> Iterator[tuple[Tokens, float]]:
        """(tokens of the round, probability) from a node on, given that the walk comes there."""
        alive, earlier = 1.0, ()
        for child, (parent, token) in enumerate(nodes):
            if parent == node:
                accept, _ = self._residual(index, start, path, earlier)
                stands = float(accept[token])
                if stands:
                    for tokens, share in self._walk(index, start, nodes, child, (*path, token)):
                        yield tokens, alive * stands * share
                alive *= 1.0 - stands
                earlier = (*earlier, token)
        if alive > 0:
            own = self.rule.own(self.target(start + path), self._residual(index, start, path, earlier)[1])
            yield from (((*path, token), alive * float(prob)) for token, prob in enumerate(own) if float(prob) > 0)

    def _residual(self, index: int, start: Tokens, path: Tokens, fallen: Tokens) -> tuple[Tensor, Tensor]:
        """(P(next candidate stands) by its token, what is left) after the candidates ``fallen`` of a node fell."""
        key = (index, start, path, fallen)
        if key not in self._residuals:
            law = self.draft(index, start, path)
            if fallen:
                _, left = self._residual(index, start, path, fallen[:-1])
                left = self.rule.after(left, self.rule.next_law(law, fallen[:-1]), fallen[-1])
            else:
                left = self.target(start + path)
            self._residuals[key] = (self.rule.accept(left, self.rule.next_law(law, fallen)), left)
        return self._residuals[key]


def path_to(nodes: Nodes, node: int) -> Tokens:
    """The tokens from the first level to a node."""
    path: Tokens = ()
    while node >= 0:
        path = (nodes[node][1], *path)
        node = nodes[node][0]
    return path


def candidates(nodes: Nodes, node: int) -> Tokens:
    """The tokens drawn after a node, in order."""
    return tuple(token for parent, token in nodes if parent == node)
