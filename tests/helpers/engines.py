"""Small engines for tests, and a way to run requests to their end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import families
from torch import Tensor

from dspark.sampling import SamplingParams
from dspark.types import (
    Continuations,
    ContinuesSteps,
    DeviceDrafts,
    DraftedChains,
    Drafter,
    DraftLaw,
    DraftTree,
    Finish,
    Request,
    Speculation,
    StepOutcome,
)
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.none import NoDrafter
from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.engine import Engine, EngineOptions
from dspark.workers.verifier.scheduler import Limits
from dspark.workers.verifier.targets import Target, as_target

FLAT = CostTable(Curve((1, 64), (1.0, 1.05)), Curve((1,), (0.0,)))  # drafts are nearly free: adaptive verifies what is likely
STEEP = CostTable(Curve((1, 2, 64), (1.0, 1.4, 20.0)), Curve((1,), (0.1,)))  # drafts cost: adaptive trims


@dataclass
class Result:
    """Everything one request produced."""

    tokens: list[int] = field(default_factory=list)
    outcomes: list[StepOutcome] = field(default_factory=list)

    @property
    def finish(self) -> Finish | None:
        return self.outcomes[-1].finish

    @property
    def acceptance_length(self) -> float:
        return len(self.tokens) / len(self.outcomes)


def tiny_target(name: str = "llama", seed: int = 0) -> Target:
    return as_target(families.make(name, seed), name)


def make_engine(target: Target, drafter: Drafter | None = None, pool: BlockPool | None = None, **options: Any) -> Engine:
    """An engine over a tiny target; options: num_blocks, speculation, costs, tokenizer, overlapped, graphs, clock, and those of Limits."""
    num_blocks = options.pop("num_blocks", 128)
    speculation = Speculation.parse(options.pop("speculation", "adaptive"))
    costs = options.pop("costs", None)
    tokenizer = options.pop("tokenizer", None)
    max_queued = options.pop("max_queued", 256)
    overlapped = options.pop("overlapped", False)
    graphs = options.pop("graphs", None)
    clock = options.pop("clock", time.perf_counter)
    pool = pool or BlockPool(num_blocks)
    limits = Limits(**({"max_num_seqs": 32, "max_batch_tokens": 64} | options))
    length = min(target.max_position, pool.num_blocks * pool.block_size)
    settings = EngineOptions(length, limits, max_queued, speculation, overlapped=overlapped, graphs=graphs)
    engine = Engine(target, pool, drafter or NoDrafter(), settings, tokenizer, clock)
    engine.runner.prepare()
    if costs is not None:
        engine.set_costs(costs)
    return engine


def run(engine: Engine, requests: Sequence[Request], max_steps: int = 5000) -> dict[str, Result]:
    """Add all requests, step until they ended, check the pool at every step."""
    for request in requests:
        engine.add(request)
    results = {request.id: Result() for request in requests}
    for _ in range(max_steps):
        if not engine.has_work:
            break
        for outcome in engine.step():
            results[outcome.request_id].tokens.extend(outcome.tokens)
            results[outcome.request_id].outcomes.append(outcome)
        engine.pool.check()
    assert not engine.has_work, "the engine made no progress"
    assert engine.pool.num_free == engine.pool.num_blocks, "blocks leaked"
    return results


def greedy(name: str, prompt: Sequence[int], max_tokens: int = 24, **params: Any) -> Request:
    return Request(name, tuple(prompt), SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **params))


def teacher_forced_logits(target: Target, prompt: tuple[int, ...], outputs: list[list[int]]) -> Tensor:
    """Logits [texts, tokens, V] before every output token, from transformers' own attention."""
    target.model.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt, *output] for output in outputs], device=target.device)
    with torch.inference_mode():
        logits = target.model(ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
    target.model.set_attn_implementation("dspark_paged")
    return logits


class Spy:
    """Notes every tree that the engine collects."""

    def __init__(self, engine: Engine) -> None:
        self.trees: dict[tuple[str, int], DraftTree] = {}
        inner = engine.drafter.collect

        def collect(want: Any, wait_s: float) -> dict[str, DraftTree]:
            found = inner(want, wait_s)
            self.trees |= {(name, tree.base_len): tree for name, tree in found.items()}
            return found

        engine.drafter.collect = collect  # type: ignore[method-assign]
        if isinstance(engine.drafter, ContinuesSteps):
            self._watch_steps(engine, engine.drafter)

    def _watch_steps(self, engine: Engine, drafter: ContinuesSteps) -> None:
        """Note the chains of steps that are launched ahead, too, each of the request whose anchor it is behind."""
        names: list[str] = []
        begin, take = drafter.continue_step, drafter.continued

        def continue_step(rows: Continuations) -> DeviceDrafts:
            names[:] = rows.request_ids
            return begin(rows)

        def continued() -> DraftedChains:
            chains = take()
            rows = zip(
                names, chains.positions.tolist(), chains.tokens.tolist(), chains.confidence.tolist(), chains.margin.tolist(), strict=True
            )
            for row, (name, position, tokens, confidence, margin) in enumerate(rows):
                if name in engine.sequences and engine.sequences[name].num_known == position + 1:
                    law = None if engine.sequences[name].request.sampling.is_exact else _law_left(engine, row)
                    self.trees[name, position + 1] = DraftTree.chain(name, position + 1, tokens, confidence, law, margin)
            return chains

        drafter.continue_step, drafter.continued = continue_step, continued  # type: ignore[method-assign]


def _law_left(engine: Engine, row: int) -> DraftLaw:
    """The law that the drafter has left on the device."""
    laws = engine.runner.draft_laws
    assert laws is not None
    return DraftLaw(laws.ids[row].clone(), laws.probs[row].clone())


def assert_same_drafts(expected: Spy, actual: Spy, name: str) -> None:
    common = [key for key in expected.trees if key[0] == name and key in actual.trees]
    assert len(common) > 5
    for key in common:
        assert actual.trees[key].tokens == expected.trees[key].tokens
        assert actual.trees[key].confidence == pytest.approx(expected.trees[key].confidence, abs=1e-4)
