"""Many drafts as arrays: their shapes, what is known of their nodes, and what a judged draft shows.

::

    R drafts of at most n nodes; S slots
    signals   D arrays [R, n]          0 behind the last node of a draft; in memory node by node where all drafts are chains alike
    slots     [n] or [R, n] int        a node's depth, at most S - 2; S - 1 for a node that has an older sibling
    parents   [R, n] int               -1 is the anchor; None when all drafts are chains

A later sibling has a slot of its own because it can only stand where the ones before it did not.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dspark.types import DraftTree, chain_parents

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Number = TypeVar("Number", bound=np.generic)

MIN_CHANCE = 1e-4  # confidences are taken at least so far from 0 and 1
MAX_MARGIN = 12.0


class Drafted(Protocol):
    """The part of a ``DraftTree`` that is read here."""

    @property
    def parents(self) -> tuple[int, ...]: ...
    @property
    def confidence(self) -> tuple[float, ...]: ...
    @property
    def margin(self) -> tuple[float, ...]: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Depth and slot of every node of a draft."""

    depths: Ints
    slots: Ints
    is_chain: bool


@dataclass(frozen=True, slots=True)
class Nodes:
    """Drafts side by side. ``is_node`` [R, n] is None when all have n nodes."""

    signals: tuple[Floats, ...]
    slots: Ints
    parents: Ints | None
    is_node: Bools | None


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a judged draft shows of its first ``count`` nodes, each array [count].

    ``is_tried``: everything before the node was accepted, so that it was a trial of the node itself. ``stood``: it was accepted
    together with everything before it; known of all of them, because what follows a rejected node cannot stand.
    """

    count: int
    depths: Ints
    slots: Ints
    is_tried: Bools
    stood: Bools


@lru_cache(maxsize=4096)
def shape_of(parents: tuple[int, ...], num_slots: int) -> Shape:
    """The shape of a draft; it must not be changed."""
    depths: list[int] = []
    slots: list[int] = []
    seen: set[int] = set()
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
        slots.append(num_slots - 1 if parent in seen else min(depths[-1], num_slots - 2))
        seen.add(parent)
    deepest = np.minimum(np.array(depths, np.int64), num_slots - 2)
    return Shape(deepest, np.array(slots, np.int64), len(seen) == len(parents) and parents == tuple(range(-1, len(parents) - 1)))


def gather(trees: Sequence[Drafted], names: Sequence[str], num_slots: int) -> Nodes:
    """The drafts with the signals ``names``: ``confidence`` as a logit, ``margin`` as it is."""
    parents = [tree.parents for tree in trees]
    if parents.count(parents[0]) == len(parents) and (shape := shape_of(parents[0], num_slots)).is_chain:
        size = (len(trees), len(parents[0]))
        return _chain_nodes([_values(trees, name, size[0] * size[1]).reshape(size) for name in names], names, shape)
    return _gather_uneven(trees, names, num_slots)


def gather_rows(trees: Sequence[DraftTree], names: Sequence[str], num_slots: int) -> Nodes | None:
    """``gather`` of chains, all as long, that were drafted together; None if they are something else."""
    rows, parents = trees[0].rows, trees[0].parents
    if rows is None or not names:
        return None
    order = [tree.row for tree in trees if tree.rows is rows and tree.parents is parents]
    if len(order) != len(trees):
        return None
    confidence, margin = rows.confidence, rows.margin
    if order != _in_order(len(confidence)):
        confidence, margin = confidence[order], margin[order]
    return chain_nodes(confidence[:, : len(parents)], margin[:, : len(parents)], names, num_slots)


@lru_cache
def _in_order(count: int) -> list[int]:
    return list(range(count))


def chain_nodes(confidence: Floats, margin: Floats, names: Sequence[str], num_slots: int) -> Nodes:
    """``gather`` of chains [R, n] that are arrays already."""
    given = {"confidence": confidence, "margin": margin}
    return _chain_nodes([given[name] for name in names], names, shape_of(chain_parents(confidence.shape[1]), num_slots))


def _chain_nodes(values: Sequence[Floats], names: Sequence[str], shape: Shape) -> Nodes:
    """Chains side by side, from what their drafter says of each signal [R, n]."""
    signals = tuple([CONVERT[name](one.T.copy()).T for name, one in zip(names, values, strict=True)])
    return Nodes(signals, shape.slots, None, None)


def _gather_uneven(trees: Sequence[Drafted], names: Sequence[str], num_slots: int) -> Nodes:
    """Drafts of different shapes."""
    shapes = [shape_of(tree.parents, num_slots) for tree in trees]
    lengths = np.array([len(shape.slots) for shape in shapes])
    is_node = np.arange(lengths.max()) < lengths[:, None]
    count = int(lengths.sum())
    signals = tuple(_spread(CONVERT[name](_values(trees, name, count).copy()), is_node, 0.0) for name in names)
    slots = _spread(np.concatenate([shape.slots for shape in shapes]), is_node, 0)
    if all(shape.is_chain for shape in shapes):
        return Nodes(signals, slots, None, is_node)
    parents = np.array([parent for tree in trees for parent in tree.parents], np.int64)
    return Nodes(signals, slots, _spread(parents, is_node, -1), is_node)


def along_branches(conditional: Floats, parents: Ints | None) -> Floats:
    """Survival [R, n] from P(a node is accepted | its parent was), never rising along a row; of chains in place of ``conditional``.

    A node that seems likelier than one before it in the list waits for that one all the same, because the first nodes of a list
    are what is verified.
    """
    if parents is None:
        for before, node in pairwise(conditional.T):
            node *= before
        return conditional
    rows = np.arange(len(conditional))
    survival = np.empty_like(conditional)
    for node in range(conditional.shape[1]):
        parent = parents[:, node]
        survival[:, node] = conditional[:, node] * np.where(parent < 0, 1.0, survival[rows, parent])
    return np.minimum.accumulate(survival, axis=1)


@lru_cache(maxsize=4096)
def outcomes_of(parents: tuple[int, ...], num_verified: int, accepted: Sequence[int], is_cut: bool, num_slots: int) -> Outcomes:
    """What verifying the first ``num_verified`` nodes shows when the nodes ``accepted`` (hashable) stood; it must not be changed.

    ``is_cut``: the request ended with the last accepted node, and nobody knows how those after it would have fared.
    """
    path = {-1, *accepted}
    count = num_verified
    if is_cut and accepted:
        after = [node for node in range(num_verified) if parents[node] == accepted[-1]]
        count = min([num_verified, *after])
    shape = shape_of(parents, num_slots)
    stood = np.array([node in path for node in range(count)], np.bool_)
    is_tried = np.array([parents[node] in path for node in range(count)], np.bool_)
    return Outcomes(count, shape.depths[:count], shape.slots[:count], is_tried, stood)


def _values(trees: Sequence[Drafted], name: str, count: int) -> Floats:
    """A signal of all ``count`` nodes of all trees, in order and as the drafter says it; 0 for a margin that it does not give."""
    values: list[float] = []
    if name == "margin":
        for tree in trees:
            values += tree.margin
        if len(values) != count:
            values = [value for tree in trees for value in tree.margin or (0.0,) * len(tree.parents)]
        return _floats(values)
    for tree in trees:
        values += tree.confidence
    return _floats(values)


def _bound_margins(values: Floats) -> Floats:
    """In place: finite whatever the drafter says."""
    np.fmax(values, -MAX_MARGIN, out=values)  # a NaN becomes the bound
    np.fmin(values, MAX_MARGIN, out=values)
    return values


def _to_logits(confidence: Floats) -> Floats:
    """In place: finite whatever the drafter says."""
    np.fmax(confidence, MIN_CHANCE, out=confidence)
    np.fmin(confidence, 1.0 - MIN_CHANCE, out=confidence)
    confidence /= 1.0 - confidence
    np.log(confidence, out=confidence)
    return confidence


CONVERT = {"confidence": _to_logits, "margin": _bound_margins}


def _floats(values: list[float]) -> Floats:
    """The values as an array; several times as fast as ``np.array`` for Python's numbers."""
    return np.frombuffer(struct.pack(f"{len(values)}d", *values))


def _spread(values: NDArray[Number], places: Bools, filler: float) -> NDArray[Number]:
    """An array of the shape of ``places`` with the values there, in order."""
    wide = np.full(places.shape, filler, values.dtype)
    wide[places] = values
    return wide
