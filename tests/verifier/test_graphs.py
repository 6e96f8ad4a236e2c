"""Steps from fixed buffers, as CUDA graphs replay them: the same text as steps from new tensors. Here every replay computes anew."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.drafters import OracleDrafter
from helpers.engines import FLAT, make_engine, run, tiny_target

from dspark.kernels.buckets import graph_sizes
from dspark.kernels.graphs import plain_calls
from dspark.sampling import SamplingParams
from dspark.types import Request
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.graphs import GraphForward, Run, fitting
from dspark.workers.verifier.runner import GraphOptions
from dspark.workers.verifier.targets import Target

GRAPHS = GraphOptions(plain_calls, max_tokens=24, max_rows=32, max_model_len=256, longest=6, with_trees=True)
PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(3 + 9 * i)] for i in range(6)}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def target(request: pytest.FixtureRequest) -> Target:
    return tiny_target(request.param)


def requests(**params: Any) -> list[Request]:
    sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 20, "ignore_eos": True} | params))
    return [Request(name, tuple(prompt), sampling, noise_seed=5) for name, prompt in PROMPTS.items()]


def texts(engine: Any, wanted: list[Request]) -> dict[str, list[int]]:
    return {name: result.tokens for name, result in run(engine, wanted).items()}


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.9, "seed": 3}, {"min_tokens": 9, "ignore_eos": False}, {"presence_penalty": 1.0}, {"logprobs": 2}],
    ids=["greedy", "seeded", "min_tokens", "penalty", "logprobs"],
)
def test_graphs_give_the_same_tokens(target: Target, params: dict[str, Any]) -> None:
    plain = texts(make_engine(target, speculation="off"), requests(**params))
    truth = {name: PROMPTS[name] + tokens for name, tokens in plain.items()}
    for speculation, drafter in [
        ("off", None),
        ("adaptive", NgramDrafter()),
        ("static:4", OracleDrafter(truth, 5, "random", vocab_size=160)),
    ]:
        engine = make_engine(target, drafter, speculation=speculation, costs=FLAT, graphs=GRAPHS, num_blocks=40)
        assert texts(engine, requests(**params)) == plain


def test_trees_and_mixed_requests(target: Target) -> None:
    mixed = [
        *requests()[:3],
        *(dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, temperature=0.7, seed=1)) for r in requests()[3:]),
    ]
    plain = texts(make_engine(target, speculation="off"), mixed)
    engine = make_engine(target, NgramDrafter(), speculation="tree:6", graphs=GRAPHS)
    assert texts(engine, mixed) == plain


def test_sizes() -> None:
    sizes = graph_sizes(512)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == 512
    assert all(n <= fitting(sizes, n) <= n + max(7, n // 8) for n in range(1, 513))
    assert fitting(sizes, 513) == 513
    assert graph_sizes(20)[-2:] == (16, 20)
    assert graph_sizes(1) == (1,)


def test_drafts_do_not_leave_the_captured_sizes() -> None:
    """Six requests with drafts of six tokens would be 42: a graph holds 24, so the rest is trimmed; prompts may take more."""
    truth = {name: prompt + [1] * 40 for name, prompt in PROMPTS.items()}
    engine = make_engine(tiny_target(), OracleDrafter(truth, 6, "random", vocab_size=160), speculation="static:6", graphs=GRAPHS)
    sizes: list[int] = []
    engine.on_step = lambda plan, times: sizes.append(plan.token_bucket)
    run(engine, requests())
    assert max(sizes[:2]) > 24
    assert max(sizes[4:]) == 24


def test_largest_first_and_every_size_is_captured() -> None:
    captured: list[int] = []

    def capture(run: Run) -> Run:
        output = run()
        if output is not None:  # the judge of sampled requests, whose graphs follow, returns nothing
            captured.append(output.logits.shape[0])
        return run

    options = dataclasses.replace(GRAPHS, capture=capture)
    engine = make_engine(tiny_target(), graphs=options)
    assert captured == sorted(captured, reverse=True)
    assert set(captured) == set(graph_sizes(24))
    assert engine.scheduler.padded(9) == 16


def test_steps_of_few_long_rows_have_graphs_of_their_own() -> None:
    """Chains of six drafts come with few rows, prompts with one, and everybody's last tokens with as many rows as tokens."""
    truth = {name: prompt + [1] * 40 for name, prompt in PROMPTS.items()}
    options = dataclasses.replace(GRAPHS, longest=7)
    engine = make_engine(tiny_target(), OracleDrafter(truth, 6, "random", vocab_size=160), speculation="static:6", graphs=options)
    forward = engine.runner._model
    assert isinstance(forward, GraphForward)
    assert forward.buffers.row_choices(16, 7) == (5, 17)
    assert forward.buffers.row_choices(1, 7) == (2,)
    assert forward.buffers.row_choices(16, 1) == (17,)
    used: set[tuple[int, int]] = set()
    for key, replay in forward._replays.items():
        forward._replays[key] = lambda key=key, replay=replay: (used.add(key), replay())[1]  # type: ignore[misc]
    found = texts(engine, requests())
    assert found == texts(make_engine(tiny_target(), speculation="off"), requests())
    assert any(rows < tokens for tokens, rows in used)
    assert any(rows > tokens for tokens, rows in used)


def test_a_step_may_take_its_ids_from_the_one_before() -> None:
    """The ids of a launch come from the best tokens of the last one: what run-ahead decoding is made of."""
    target = tiny_target()
    engine = make_engine(target, graphs=GRAPHS)
    forward = engine.runner._model
    assert isinstance(forward, GraphForward)
    buffers = forward.buffers
    with torch.inference_mode():
        buffers.own[:4] = torch.tensor([7, 8, 9, 10])
        views = buffers.views(4, 5, 16, 1, False)
        buffers.fill(4, 5, step_from([2, 0, 1]))
        assert buffers.gather_ids(views).tolist() == [9, 7, 8, 0]
        assert views.slots.tolist() == [5, 6, 7, -1]
        assert views.batch.starts.tolist() == [0, 1, 2, 3, 3, 4]
        assert views.batch.contexts.tolist() == [6, 7, 8, 0, 0]


def step_from(source: list[int]) -> Any:
    from array import array

    from dspark.workers.verifier.step_buffers import HostStep

    return HostStep((), [5, 6, 7], [5, 6, 7], [0, 1, 2], [1, 1, 1], [6, 7, 8], [array("i", [0])] * 3, source=torch.tensor(source).numpy())
