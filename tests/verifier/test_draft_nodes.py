"""Drafts as arrays: survival along branches, and what a judged draft shows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.draft_rounds import make_tree
from hypothesis import given
from hypothesis import strategies as st

from dspark.workers.verifier.draft_nodes import MAX_MARGIN, along_branches, gather, outcomes_of, shape_of

SLOTS = 5


@st.composite
def shapes(draw: st.DrawFn, most: int = 7) -> tuple[int, ...]:
    """Parents of a draft: any tree."""
    count = draw(st.integers(1, most))
    return tuple(draw(st.integers(-1, i - 1)) for i in range(count))


@st.composite
def judged(draw: st.DrawFn) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """A tree, how many nodes were verified, and a path of accepted nodes among these."""
    parents = draw(shapes())
    verified = draw(st.integers(0, len(parents)))
    path: list[int] = []
    while options := [node for node in range(verified) if parents[node] == (path[-1] if path else -1)]:
        choice = draw(st.sampled_from([None, *options]))
        if choice is None:
            break
        path.append(choice)
    return parents, verified, tuple(path)


def ancestors(parents: tuple[int, ...], node: int) -> list[int]:
    found = []
    while (node := parents[node]) >= 0:
        found.append(node)
    return found


@given(judged())
def test_outcomes_by_definition(case: tuple[tuple[int, ...], int, tuple[int, ...]]) -> None:
    parents, verified, path = case
    shown = outcomes_of(parents, verified, path, False, SLOTS)
    assert shown.count == verified
    for node in range(verified):
        assert shown.stood[node] == (node in path)
        assert shown.is_tried[node] == all(before in path for before in ancestors(parents, node))


@given(judged())
def test_a_cut_shows_nothing_of_what_follows_it(case: tuple[tuple[int, ...], int, tuple[int, ...]]) -> None:
    parents, verified, path = case
    if not path:
        return
    whole, cut = (outcomes_of(parents, verified, path, is_cut, SLOTS) for is_cut in (False, True))
    assert all(path[-1] not in ancestors(parents, node) for node in range(cut.count))
    assert set(path) <= set(range(cut.count))
    for name in ("depths", "slots", "is_tried", "stood"):
        assert np.array_equal(getattr(cut, name), getattr(whole, name)[: cut.count])


def test_outcomes_of_a_chain() -> None:
    chain = (-1, 0, 1, 2, 3)
    trimmed = outcomes_of(chain, 3, range(3), False, SLOTS)
    assert (trimmed.is_tried.tolist(), trimmed.stood.tolist()) == ([True] * 3, [True] * 3)
    rejected = outcomes_of(chain, 4, range(1), False, SLOTS)
    assert (rejected.is_tried.tolist(), rejected.stood.tolist()) == ([True, True, False, False], [True, False, False, False])
    ended = outcomes_of(chain, 4, range(2), True, SLOTS)
    assert (ended.is_tried.tolist(), ended.stood.tolist()) == ([True, True], [True, True])


def test_slots_are_depths_and_one_for_later_siblings() -> None:
    shape = shape_of((-1, -1, 0, 1, 1, 2, 5, 6, 7), SLOTS)
    assert shape.depths.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert shape.slots.tolist() == [0, 4, 1, 1, 4, 2, 3, 3, 3]
    assert not shape.is_chain
    assert shape_of((-1, 0, 1), SLOTS).is_chain


@given(st.lists(shapes(), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_survival_of_any_trees(many: list[tuple[int, ...]], seed: int) -> None:
    """The product along the branch, but never above that of a node before it in the list."""
    width = max(map(len, many))
    conditional = np.random.default_rng(seed).random((len(many), width))
    parents = np.full((len(many), width), -1)
    for row, one in zip(parents, many, strict=True):
        row[: len(one)] = one
    found = along_branches(conditional, parents)
    for row, shape, chances in zip(found, many, conditional, strict=True):
        products = [float(np.prod(chances[[node, *ancestors(shape, node)]])) for node in range(len(shape))]
        assert row[: len(shape)] == pytest.approx(list(itertools.accumulate(products, min)))


def test_drafts_of_any_shape_give_what_each_gives_alone() -> None:
    trees = [
        make_tree([0.5, 1.0, -2.0], [0.9, 0.5, 0.1]),
        make_tree([1.5], [0.3]),
        make_tree([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.8], parents=(-1, -1, 0, 2)),
    ]
    for chosen in itertools.permutations(trees):
        nodes = gather(chosen, ("confidence", "margin"), SLOTS)
        for row, tree in enumerate(chosen):
            count = len(tree.tokens)
            alone = gather([tree], ("confidence", "margin"), SLOTS)
            for one, other in zip(nodes.signals, alone.signals, strict=True):
                assert one[row, :count].tolist() == other[0].tolist()
                assert not one[row, count:].any()
            slots = np.broadcast_to(alone.slots, (1, count))[0]
            assert nodes.slots[row, :count].tolist() == slots.tolist()


def test_signals_are_finite_whatever_a_drafter_says() -> None:
    wild = make_tree([float("inf"), float("-inf"), float("nan"), 0.0], [0.0, 1.0, float("nan"), 0.5])
    sure, margin = gather([wild], ("confidence", "margin"), SLOTS).signals
    assert np.isfinite(sure).all()
    assert sure[0, 0] < -9 < 9 < sure[0, 1]
    assert margin.tolist() == [[MAX_MARGIN, -MAX_MARGIN, -MAX_MARGIN, 0.0]]


def test_a_margin_that_is_not_given_is_0() -> None:
    bare = make_tree([1.0, 1.0])
    bare = type(bare)(bare.request_id, bare.base_len, bare.tokens, bare.parents, bare.confidence)
    assert gather([bare, make_tree([3.0, 4.0])], ("margin",), SLOTS).signals[0].tolist() == [[0.0, 0.0], [3.0, 4.0]]
