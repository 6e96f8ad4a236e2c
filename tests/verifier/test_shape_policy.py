"""Chain or tree: the faster one is used, whatever the first guess; the other is tried now and then; many streams get chains."""

from __future__ import annotations

import random

import pytest

from dspark.workers.verifier.shape_policy import AUTO_NODES, MOST_EVERY, MOST_ROWS, TRY_EVERY, TRY_FOR, ShapePolicy


def share_of_trees(policy: ShapePolicy, rows: int, tree_gain: float, steps: int = 6000) -> float:
    """How many of the last thousand steps used trees, when trees bring ``tree_gain`` times the tokens a second; noisy steps."""
    draw, used = random.Random(1), []
    for _ in range(steps):
        nodes = policy.nodes(rows)
        used.append(nodes > 0)
        tokens = rows * draw.randint(1, 6)
        policy.observe(rows, nodes, tokens, 0.02 * rows * 3.5 / (tree_gain if nodes else 1.0))
    return sum(used[-1000:]) / 1000


@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_the_faster_shape_is_found(rows: int) -> None:
    tries = TRY_FOR / MOST_EVERY
    assert share_of_trees(ShapePolicy(True), rows, 1.3) == pytest.approx(1 - tries, abs=0.02)
    assert share_of_trees(ShapePolicy(True), rows, 0.75) == pytest.approx(tries, abs=0.02)


def test_many_streams_and_other_drafters_get_chains() -> None:
    assert not any(ShapePolicy(True).nodes(MOST_ROWS + 1) for _ in range(2 * TRY_EVERY))
    assert not any(ShapePolicy(False).nodes(1) for _ in range(2 * TRY_EVERY))
    assert ShapePolicy(True).nodes(1) == AUTO_NODES
