"""How likely a drafted node is to be accepted together with everything before it (DSpark section 3.2)."""

from __future__ import annotations

from typing import Protocol

from dspark.types import DraftTree


class SurvivalEstimator(Protocol):
    """Survival from what a drafter says of its nodes. It may look at what a node's law was, never at the token drawn from it."""

    def survival(self, tree: DraftTree) -> tuple[float, ...]:
        """Survival of every node, in order, in (0, 1]; a node's is never above its parent's."""


class HeadSurvival:
    """The product of the drafter's own confidences along the branch."""

    def survival(self, tree: DraftTree) -> tuple[float, ...]:
        found: list[float] = []
        for parent, confidence in zip(tree.parents, tree.confidence, strict=True):
            found.append(confidence if parent < 0 else found[parent] * confidence)
        return tuple(found)
