"""The exact law of rounds with draft trees, by enumeration of every tree, every acceptance and every own token.

A tree grows node by node. A ``Policy`` says where the next node goes, from what was drawn so far; then its token is drawn from
the drafter's law without the siblings before it. The judge's arithmetic (``ratio.py``) decides as ``tree_judge.py`` does.
"""

from __future__ import annotations

import dataclasses
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
    """How candidates are drawn and tried: ``accept(left, draft)`` [V] is P(x stands), ``after(left, draft, x)`` what a fallen x
    leaves, ``own(target, left)`` the law of the own token. A candidate after ``earlier`` siblings is drawn from
    ``drawn(law, earlier)``, and the judge is told that it was ``told(law, earlier)``."""

    accept: Callable[[Tensor, Tensor], Tensor]
    after: Callable[[Tensor, Tensor, int], Tensor]
    own: Callable[[Tensor, Tensor], Tensor]
    told: Callable[[Tensor, Tokens], Tensor]
    drawn: Callable[[Tensor, Tokens], Tensor]


def without(law: Tensor, earlier: Tokens) -> Tensor:
    """The law of a draw without replacement; all zeros when nothing is left."""
    law = law.clone()
    law[list(earlier)] = 0.0
    return law / law.sum() if float(law.sum()) > 0 else law


def one_hot(law: Tensor, earlier: Tokens) -> Tensor:
    """The likeliest id that is left, for certain."""
    left = without(law, earlier)
    return (torch.arange(len(law)) == left.argmax()).to(law.dtype) * (left.max() > 0)


def left_by(left: Tensor, draft: Tensor, token: int) -> Tensor:
    """The judge's own arithmetic, normalised."""
    ids = draft.nonzero().squeeze(1)
    less, total = shrink(left[None], left.sum()[None], ids[None], draft[ids][None])
    return less[0] / total[0]


def one_hot_left(left: Tensor, draft: Tensor, token: int) -> Tensor:
    return left_by(left, torch.zeros_like(draft).index_fill(0, torch.tensor([token]), 1.0), token)


RATIO_TREE = TreeRule(accept_probability, left_by, lambda target, left: left, without, without)
ONE_HOT = dataclasses.replace(RATIO_TREE, told=one_hot, drawn=one_hot)
FORGETS_REJECTIONS = dataclasses.replace(RATIO_TREE, after=lambda left, draft, token: left)
OWN_FROM_TARGET = dataclasses.replace(RATIO_TREE, own=lambda target, left: target)
WITH_REPLACEMENT_LAW = dataclasses.replace(RATIO_TREE, told=lambda law, earlier: law)
ONE_HOT_RESIDUAL = dataclasses.replace(RATIO_TREE, after=one_hot_left)


@dataclass(frozen=True)
class _Trial:
    """A node whose candidates so far fell: P(the next one stands) by its token, what is left, and the own token's law."""

    accept: list[float]
    left: Tensor
    own: list[float]


@dataclass
class TreeEnumeration:
    """All outcomes of consecutive rounds whose drafts are trees; see ``exact_laws.Enumeration`` for chains."""

    vocab_size: int
    target: Law
    draft: DraftLawOf
    policy: Policy
    rule: TreeRule = RATIO_TREE
    stays: Peek = lambda index, start, nodes: True
    _trials: dict[tuple[int, Tokens, Tokens, Tokens], _Trial] = field(default_factory=dict)

    def run(self, num_rounds: int) -> dict[Tokens, float]:
        """P(tokens committed after the rounds); tokens have different lengths."""
        laws: dict[Tokens, float] = {(): 1.0}
        for index in range(num_rounds):
            after: dict[Tokens, float] = {}
            for start, prob in laws.items():
                for nodes, weight in self.trees(index, start):
                    for tokens, share in self._walk(index, start, nodes, -1, ()):
                        after[start + tokens] = after.get(start + tokens, 0.0) + prob * weight * share
            laws = after
        return laws

    def worst_error(self, num_rounds: int, length: int) -> float:
        """Largest deviation, over all texts of ``length`` tokens, from the product of target laws."""
        return worst_error(self.run(num_rounds), self.target, length)

    def trees(self, index: int, start: Tokens, nodes: Nodes = (), weight: float = 1.0) -> Iterator[tuple[Nodes, float]]:
        """Every tree that can grow from ``nodes``, with its probability times ``weight``."""
        parent = self.policy(index, start, nodes)
        law = None if parent is None else self.rule.drawn(self.draft(index, start, path_to(nodes, parent)), candidates(nodes, parent))
        if parent is None or law is None or float(law.sum()) == 0.0:
            yield nodes, weight
            return
        for token, prob in enumerate(law.tolist()):
            if prob > 0:
                more = (*nodes, (parent, token))
                if self.stays(index, start, more):
                    yield from self.trees(index, start, more, weight * prob)
                else:
                    yield nodes, weight * prob

    def _walk(self, index: int, start: Tokens, nodes: Nodes, node: int, path: Tokens) -> Iterator[tuple[Tokens, float]]:
        """(tokens of the round, probability) from a node on, given that the walk comes there."""
        alive = 1.0
        fallen: Tokens = ()
        for child, (parent, token) in enumerate(nodes):
            if parent == node:
                stands = self._trial(index, start, path, fallen).accept[token]
                if stands:
                    for tokens, share in self._walk(index, start, nodes, child, (*path, token)):
                        yield tokens, alive * stands * share
                alive *= 1.0 - stands
                fallen = (*fallen, token)
        if alive > 0:
            own = self._trial(index, start, path, fallen).own
            yield from (((*path, token), alive * prob) for token, prob in enumerate(own) if prob > 0)

    def _trial(self, index: int, start: Tokens, path: Tokens, fallen: Tokens) -> _Trial:
        key = (index, start, path, fallen)
        if key not in self._trials:
            law, target = self.draft(index, start, path), self.target(start + path)
            left = target
            if fallen:
                left = self._trial(index, start, path, fallen[:-1]).left
                left = self.rule.after(left, self.rule.told(law, fallen[:-1]), fallen[-1])
            accept = self.rule.accept(left, self.rule.told(law, fallen))
            self._trials[key] = _Trial(accept.tolist(), left, self.rule.own(target, left).tolist())
        return self._trials[key]


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
