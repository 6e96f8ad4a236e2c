"""Judged drafts made up by a known law, for tests of what learns from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dspark.types import DraftTree

Floats = NDArray[np.float64]
Law = Callable[[int, float], float]  # (position, margin) -> P(accepted | everything before was)


def logistic(z: float) -> float:
    return float(1.0 / (1.0 + np.exp(-z)))


def make_tree(margin: Sequence[float], confidence: Sequence[float] = (), parents: Sequence[int] | None = None) -> DraftTree:
    """A draft of as many nodes as there are margins; a chain unless ``parents`` says otherwise."""
    count = len(margin)
    chain = tuple(range(-1, count - 1))
    sure = tuple(confidence) or (0.5,) * count
    return DraftTree("r", 9, tuple(range(count)), chain if parents is None else tuple(parents), sure, None, tuple(margin))


def rounds(law: Law, positions: int, count: int, seed: int = 0) -> Iterator[tuple[DraftTree, int]]:
    """``count`` chains with random margins, and how many of their tokens would stand if all were verified."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        margin = random.normal(1.0, 2.0, positions)
        chances = [law(k, float(x)) for k, x in enumerate(margin)]
        stood = random.random(positions) < chances
        sure = [min(max(chance, 0.01), 0.99) for chance in chances]
        yield make_tree(margin.tolist(), sure), int(stood.argmin()) if not stood.all() else positions
