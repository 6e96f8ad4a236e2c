"""The step-cost table is measured, monotone, and leaves nothing behind."""

from __future__ import annotations

from helpers.engines import greedy as greedy_request
from helpers.engines import make_engine, run, tiny_target

from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.profile import measure_costs


def test_costs_are_measured_on_scratch_blocks() -> None:
    engine = make_engine(tiny_target(), NgramDrafter(), num_blocks=40)
    lines: list[str] = []
    costs = measure_costs(engine, lines.append)
    assert list(costs.verify.sizes) == [1, 2, 4, 8, 16, 32, 64]
    assert all(a <= b for a, b in zip(costs.verify.seconds, costs.verify.seconds[1:], strict=False))
    assert costs.verify.seconds[0] > 0
    assert 0 < costs.draft(4) < 0.1
    assert engine.pool.num_free == 40
    assert engine.pool.num_cached == 0
    assert len(lines) == 3
    engine.set_costs(costs)
    run(engine, [greedy_request("a", [3, 4, 5, 3, 4, 5, 3, 4], 30)])


def test_plain_engine_has_no_draft_cost() -> None:
    costs = measure_costs(make_engine(tiny_target()), lambda line: None)
    assert costs.draft(8) == 0.0
