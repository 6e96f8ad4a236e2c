"""The step-cost table is measured, monotone, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from helpers.draft_modules import random_module
from helpers.engines import greedy as greedy_request
from helpers.engines import make_engine, run, tiny_target

from dspark.kernels.graphs import plain_calls
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.graph_local import GraphDrafter
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.profile import measure_costs, reach
from dspark.workers.verifier.runner import GraphOptions
from dspark.workers.verifier.scheduler import Limits


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


@pytest.mark.parametrize(
    ("device", "max_num_seqs", "max_batch_tokens", "reached"),
    [("cpu", 64, 512, (256, 64)), ("cpu", 8, 64, (64, 8)), ("cuda", 256, 8192, (2048, 256)), ("cuda", 32, 1024, (1024, 32))],
)
def test_a_gpu_is_measured_to_where_its_matrix_units_decide(
    device: str, max_num_seqs: int, max_batch_tokens: int, reached: tuple[int, int]
) -> None:
    assert reach(torch.device(device), Limits(max_num_seqs, max_batch_tokens, True)) == reached


def test_steps_that_run_ahead_are_measured_as_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched from graphs, with blocks that continue them; only what no graph holds is planned."""
    target, pool = tiny_target(), BlockPool(64)
    drafter = GraphDrafter(random_module(target), pool, 8, max_rows=16, max_model_len=256)
    graphs = GraphOptions(plain_calls, max_tokens=32, max_rows=16, max_model_len=256, longest=5, with_matches=True, law_width=8)
    engine = make_engine(target, drafter, pool, graphs=graphs, overlapped=True, max_num_seqs=16)
    drafter.prepare(plain_calls, engine.runner.step_tokens, engine.runner.draft_laws)
    planned: list[int] = []
    forward = engine.runner.forward
    monkeypatch.setattr(engine.runner, "forward", lambda plan, by_id: planned.append(plan.num_tokens) or forward(plan, by_id))
    monkeypatch.setattr(drafter, "collect", lambda want, wait_s: pytest.fail("blocks are not collected by the host"))
    costs = measure_costs(engine, lambda line: None)
    assert costs.verify.sizes[-1] == 64
    assert min(planned) > 32
    assert 0 < costs.draft(8) < 0.5
    assert pool.num_free == 64
    monkeypatch.undo()
    engine.set_costs(costs)
    wanted = run(make_engine(target), [greedy_request("a", [3, 4, 5, 3, 4], 30)])["a"].tokens
    assert run(engine, [greedy_request("a", [3, 4, 5, 3, 4], 30)])["a"].tokens == wanted
    engine.aside.close()
