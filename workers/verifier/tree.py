"""Shapes of draft trees: who follows whom, and what each node sees.

``parents`` [n] lists the nodes parents before children; -1 is the anchor. A chain has parents -1, 0, 1, …
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def depths(parents: Sequence[int]) -> list[int]:
    """How many nodes lie before each node on its path."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def children(parents: Sequence[int]) -> list[list[int]]:
    """The children of the anchor, then those of every node, each in the order of the list: [n + 1]."""
    found: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for node, parent in enumerate(parents):
        found[parent + 1].append(node)
    return found


def visible(parents: Sequence[int], num_known: int = 0) -> Tensor:
    """What each of ``num_known`` tokens in a row, and then of the nodes that follow the last of them, sees: [n, n] bool.

    A token sees itself and the tokens before it; a node sees itself, the nodes on its path and all the tokens.
    """
    seen = [list(range(i + 1)) for i in range(num_known)]
    for node, parent in enumerate(parents):
        before = list(range(num_known)) if parent < 0 else seen[num_known + parent]
        seen.append([*before, num_known + node])
    mask = torch.zeros(len(seen), len(seen), dtype=torch.bool)
    places = [(i, j) for i, row in enumerate(seen) for j in row]
    if places:
        mask[tuple(torch.tensor(places).T)] = True
    return mask
