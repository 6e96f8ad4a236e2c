"""Random draft trees for tests: shapes, tokens that are sometimes right, laws of candidates drawn without replacement."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.types import DraftLaw, DraftTree


def random_parents(rng: random.Random, num_nodes: int, max_depth: int = 64, width: int = 64) -> tuple[int, ...]:
    """Parents of a random tree: at most ``width`` children a node and ``max_depth`` levels."""
    parents: list[int] = []
    depths: list[int] = []
    while len(parents) < num_nodes:
        parent = rng.randrange(-1, len(parents))
        depth = 0 if parent < 0 else depths[parent] + 1
        if depth < max_depth and parents.count(parent) < width:
            parents.append(parent)
            depths.append(depth)
    return tuple(parents)


def paths_of(parents: Sequence[int]) -> list[list[int]]:
    """The nodes from the first level down to each node."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([node] if parent < 0 else [*paths[parent], node])
    return paths


def tree_of(parents: Sequence[int], tokens: Sequence[int], law: DraftLaw | None = None, base_len: int = 3, name: str = "r") -> DraftTree:
    return DraftTree(name, base_len, tuple(tokens), tuple(parents), (0.5,) * len(tokens), law)


def distinct_tokens(rng: random.Random, parents: Sequence[int], choices: Sequence[Sequence[int]]) -> list[int]:
    """A token a node, different from its siblings', of ``choices[parent + 1]``."""
    tokens: list[int] = []
    for node, parent in enumerate(parents):
        taken = {tokens[other] for other in range(node) if parents[other] == parent}
        tokens.append(rng.choice([token for token in choices[parent + 1] if token not in taken]))
    return tokens


def law_without_siblings(laws: Tensor, parents: Sequence[int], tokens: Sequence[int]) -> DraftLaw:
    """Each node's law: its parent's row of ``laws`` [n + 1, V] without the siblings before it."""
    rows = []
    for node, parent in enumerate(parents):
        row = laws[parent + 1].clone()
        row[[tokens[other] for other in range(node) if parents[other] == parent]] = 0.0
        rows.append(row / row.sum())
    return DraftLaw(torch.arange(laws.shape[1]).expand(len(parents), -1), torch.stack(rows))
