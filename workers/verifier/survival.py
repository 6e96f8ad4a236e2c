"""How likely a drafted node is to be accepted together with everything before it (DSpark section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from dspark.types import DraftTree


class SurvivalEstimator(Protocol):
    """Survival from what a drafter says of its nodes. It may look at what a node's law was, never at the token drawn from it."""

    def survival(self, tree: DraftTree) -> tuple[float, ...]:
        """Survival of every node, in order, in (0, 1]; a node's is never above its parent's."""


def never_rising(survival: Sequence[float]) -> tuple[float, ...]:
    """Survival in the order of the nodes, each at most that of the node before it: what the planner ranks.

    A drafter lists its nodes best first by its own estimate. Another estimate may disagree; a node that it holds for likelier
    than one before it waits for that one all the same.
    """
    return tuple(accumulate(survival, min))


class HeadSurvival:
    """The product of the drafter's own confidences along the branch."""

    def survival(self, tree: DraftTree) -> tuple[float, ...]:
        found: list[float] = []
        for parent, confidence in zip(tree.parents, tree.confidence, strict=True):
            found.append(confidence if parent < 0 else found[parent] * confidence)
        return tuple(found)
