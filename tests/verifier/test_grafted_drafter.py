"""A DSpark drafter grafted onto an engine: lossless with random weights, and never starved of context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import families
from helpers.draft_modules import EAGLE3, random_module, tiny_config, tiny_head
from helpers.engines import FLAT, STEEP, Spy, assert_same_drafts, greedy, make_engine, run, tiny_target

from dspark.config import EngineConfig
from dspark.errors import ConfigError
from dspark.sampling import SamplingParams
from dspark.types import Request
from dspark.workers.blocks import BlockPool
from dspark.workers.build import assemble, load_engine
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.graft import graft
from dspark.workers.drafter.module_config import HeadType
from dspark.workers.drafter.saving import save_drafter
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.targets import Target

PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(4 + 9 * i)] for i in range(5)}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


HEADLESS = {"head_type": HeadType.NONE, "markov_rank": 0, "has_confidence": False, "confidence_with_markov": False}
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {"head_type": HeadType.VANILLA},
    "gated": {"head_type": HeadType.GATED},
    "rnn": {"head_type": HeadType.RNN},
    "dflash": {**HEADLESS, "sample_from_anchor": False},
    "eagle3": EAGLE3,
}


def grafted(target: Target, module: DSparkModule | Eagle3Module, num_blocks: int = 128, **options: Any) -> Engine:
    pool = BlockPool(num_blocks)
    return make_engine(target, graft(module, pool, 8), pool, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_never_change_the_text(target: Target, kind: str) -> None:
    module = random_module(target, **KINDS[kind])
    for params in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 4, "top_p": 0.9}):
        requests = [Request(n, tuple(p), SamplingParams(**({"max_tokens": 24, "ignore_eos": True} | params))) for n, p in PROMPTS.items()]
        plain = {n: r.tokens for n, r in run(make_engine(target, speculation="off"), requests).items()}
        for speculation, costs in (("static:2", None), ("static:4", None), ("adaptive", FLAT), ("adaptive", STEEP)):
            engine = grafted(target, module, speculation=speculation, costs=costs)
            out = run(engine, requests)
            assert {n: r.tokens for n, r in out.items()} == plain
            assert engine.counters.drafted > 0 or (costs is STEEP and not module.config.has_confidence)


@pytest.mark.parametrize("kind", ["vanilla", "eagle3"])
def test_prefix_hits_preemption_and_resume_keep_the_drafter_fed(target: Target, kind: str) -> None:
    """The same drafts come out cold, after a prefix hit, in chunks, with speculation off before, and after a preemption."""
    module = random_module(target, **KINDS[kind])
    request = greedy("r4", PROMPTS["r4"], 30)
    cold = grafted(target, module, speculation="static:3")
    reference = Spy(cold)
    run(cold, [request])
    warm = grafted(target, module, speculation="static:3", max_batch_tokens=16)
    run(warm, [greedy("other", PROMPTS["r4"], 3)])
    after_hit = Spy(warm)
    hit = run(warm, [request])["r4"]
    assert hit.outcomes[0].num_cached_tokens == 32
    assert_same_drafts(reference, after_hit, "r4")
    squeezed = grafted(target, module, num_blocks=8, speculation="static:3")
    after_preemption = Spy(squeezed)
    run(squeezed, [greedy("r3", PROMPTS["r3"], 40), request])
    assert squeezed.scheduler.counters.preemptions > 0
    assert_same_drafts(reference, after_preemption, "r4")


def test_blocks_that_a_request_s_last_step_filled_are_whole_for_the_drafter(target: Target) -> None:
    """The next turn of a conversation finds them in the prefix cache."""
    module = random_module(target)
    engine = grafted(target, module, speculation="static:3")
    begin = PROMPTS["r3"]
    text = [*begin, *run(engine, [greedy("first", begin, 48 - len(begin) + 1)])["first"].tokens]
    follow_up = greedy("second", [*text, 5, 6, 7], 30)
    after_hit = Spy(engine)
    assert run(engine, [follow_up])["second"].outcomes[0].num_cached_tokens == 48
    reference = Spy(cold := grafted(target, module, speculation="static:3"))
    run(cold, [follow_up])
    assert_same_drafts(reference, after_hit, "second")


def test_ratio_rule_ships_the_law_it_drew_from(target: Target) -> None:
    engine = grafted(target, random_module(target), speculation="static:4")
    spy = Spy(engine)
    out = run(engine, [Request(n, tuple(p), SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)) for n, p in PROMPTS.items()])
    assert all(len(r.tokens) == 30 for r in out.values())
    for tree in spy.trees.values():
        assert tree.law is not None
        assert tree.law.ids.shape[0] == len(tree.tokens)
        assert torch.allclose(tree.law.probs.sum(-1), torch.ones(len(tree.tokens)), atol=1e-5)
        for i, token in enumerate(tree.tokens):
            assert float(tree.law.probs[i][tree.law.ids[i] == token].sum()) > 0


def test_a_folder_is_loaded_and_checked(target: Target, tmp_path: Any) -> None:
    model = tmp_path / "target"
    families.make("llama").save_pretrained(model)
    save_drafter(tmp_path / "draft", random_module(target, target_layer_ids=(0, 2)))
    config = EngineConfig(model=str(model), drafter=str(tmp_path / "draft"), dtype="float32", kv_tokens=1024, max_batch_tokens=64)
    lines: list[str] = []
    loaded = load_engine(config, lines.append)
    assert loaded.describe["drafter"] == str(tmp_path / "draft")
    assert loaded.describe["draft_block_size"] == 4
    assert any(line.startswith("step costs") for line in lines)
    out = run(loaded.engine, [greedy("a", PROMPTS["r3"])])
    assert len(out["a"].tokens) == 24
    save_drafter(tmp_path / "narrow", DSparkModule(tiny_config(), tiny_head()))
    with pytest.raises(ConfigError, match=r"16.*64|64.*16"):
        load_engine(config.model_copy(update={"drafter": str(tmp_path / "narrow")}))


class ByteTokenizer:
    """Enough of a tokenizer for the built-in check."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(c) % 150 for c in text]


def test_a_drafter_that_never_fits_is_reported_at_load(target: Target, tmp_path: Any) -> None:
    save_drafter(tmp_path, random_module(target, target_layer_ids=(0, 2)))
    config = EngineConfig(model="x", drafter=str(tmp_path), kv_tokens=1024, max_batch_tokens=64, profile=False)
    lines: list[str] = []
    engine = assemble(target, ByteTokenizer(), config, lines.append).engine
    assert any("accepted almost never" in line for line in lines)
    assert any("verifies every drafted token" in line for line in lines)
    assert engine.counters.rounds == 0
    assert engine.pool.num_cached == 0
