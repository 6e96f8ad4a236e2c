"""What an engine tells its survival estimator: every draft it judged, as far as the outcome is known, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.draft_modules import random_module
from helpers.drafters import Fault, OracleDrafter
from helpers.engines import FLAT, STEEP, greedy, make_engine, run, tiny_target

from dspark.config import EngineConfig
from dspark.errors import ConfigError
from dspark.sampling import SamplingParams
from dspark.types import DraftTree, Request
from dspark.workers.blocks import BlockPool
from dspark.workers.build import assemble
from dspark.workers.drafter.calibration import CALIBRATION_FILE
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.saving import save_drafter
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.host import EngineHost
from dspark.workers.verifier.targets import Target

PROMPT = [3 + (5 * j) % 150 for j in range(12)]
GAMMA = 4


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def truth(target: Target) -> list[int]:
    """The greedy answer."""
    return run(make_engine(target, speculation="off"), [greedy("a", PROMPT, 60)])["a"].tokens


@dataclass(frozen=True)
class Seen:
    base_len: int
    drafted: int
    verified: int
    accepted: int
    is_cut: bool


def watch(engine: Engine) -> list[Seen]:
    """Notes what the estimator is told; it is told all the same."""
    seen: list[Seen] = []
    inner = engine.survival.observe

    def observe(tree: DraftTree, num_verified: int, accepted: Sequence[int], is_cut: bool = False) -> None:
        seen.append(Seen(tree.base_len, len(tree.tokens), num_verified, len(accepted), is_cut))
        inner(tree, num_verified, accepted, is_cut)

    engine.survival.observe = observe  # type: ignore[method-assign]
    return seen


def oracle(truth: list[int], fault: Fault = "none") -> OracleDrafter:
    return OracleDrafter({"a": PROMPT + truth}, GAMMA, fault, vocab_size=160)


def test_whole_drafts_are_noted_whole(target: Target, truth: list[int]) -> None:
    engine = make_engine(target, oracle(truth), speculation=f"static:{GAMMA}")
    seen = watch(engine)
    run(engine, [greedy("a", PROMPT, 11)])
    # the prompt's step yields 1 token without a draft, then come rounds of 5; the last two tokens are one round of a draft of 1
    first = len(PROMPT) + 1
    assert seen == [Seen(first, 4, 4, 4, False), Seen(first + 5, 4, 4, 4, False)]


def test_rejections_are_noted(target: Target, truth: list[int]) -> None:
    engine = make_engine(target, oracle(truth, "adversarial"), speculation=f"static:{GAMMA}")
    seen = watch(engine)
    run(engine, [greedy("a", PROMPT, 6)])
    assert [(one.drafted, one.verified, one.accepted, one.is_cut) for one in seen] == [(n, n, 0, False) for n in (4, 3, 2, 1)]


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_what_lies_behind_a_stop_token_is_not_noted(target: Target, truth: list[int], place: int) -> None:
    """The stop token is drafted, right, and ends the request: rows behind it were judged, but nothing is known of them."""
    stop = truth[1 + place]
    assert stop not in truth[: 1 + place]
    engine = make_engine(target, oracle(truth), speculation=f"static:{GAMMA}")
    seen = watch(engine)
    request = Request("a", tuple(PROMPT), SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop_token_ids=(stop,)))
    run(engine, [request])
    assert seen == [Seen(len(PROMPT) + 1, 4, 4, place + 1, True)]


def test_a_stop_token_of_the_targets_own_cuts_nothing(target: Target, truth: list[int]) -> None:
    stop = truth[1 + GAMMA]
    assert stop not in truth[: 1 + GAMMA]
    engine = make_engine(target, oracle(truth), speculation=f"static:{GAMMA}")
    seen = watch(engine)
    request = Request("a", tuple(PROMPT), SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop_token_ids=(stop,)))
    run(engine, [request])
    assert seen == [Seen(len(PROMPT) + 1, 4, 4, 4, False)]


def test_the_accepted_path_of_a_tree_is_noted(target: Target) -> None:
    """Trees of a random module, tokens followed from the anchor: the noted nodes are those of the text that came out."""
    pool = BlockPool(64)
    engine = make_engine(target, LocalDrafter(random_module(target), pool), pool, speculation="tree:9:4", costs=FLAT)
    notes: list[tuple[DraftTree, int, tuple[int, ...]]] = []
    inner = engine.survival.observe

    def observe(tree: DraftTree, num_verified: int, accepted: Sequence[int], is_cut: bool = False) -> None:
        notes.append((tree, num_verified, tuple(accepted)))
        inner(tree, num_verified, accepted, is_cut)

    engine.survival.observe = observe  # type: ignore[method-assign]
    names = [f"r{i}" for i in range(6)]
    out = run(engine, [greedy(name, [3 + i, *PROMPT], 40) for i, name in enumerate(names)])
    known = {name: [3 + i, *PROMPT, *out[name].tokens] for i, name in enumerate(names)}
    assert any(accepted for _, _, accepted in notes)
    assert any(not tree.is_chain for tree, _, _ in notes)
    for tree, num_verified, accepted in notes:
        text, node = known[tree.request_id][tree.base_len :], -1
        for depth, chosen in enumerate(accepted):
            assert (tree.parents[chosen], tree.tokens[chosen]) == (node, text[depth])
            node = chosen
        assert all(chosen < num_verified for chosen in accepted)
        behind = [tree.tokens[i] for i in range(num_verified) if tree.parents[i] == node]
        assert text[len(accepted)] not in behind


def test_trimmed_drafts_are_noted_as_trimmed(target: Target, truth: list[int]) -> None:
    """A static length below what is drafted verifies what it says; a draft that was never verified is noted as such."""
    engine = make_engine(target, oracle(truth), speculation=f"adaptive:{GAMMA}", costs=FLAT, max_batch_tokens=3)
    seen = watch(engine)
    run(engine, [greedy("a", PROMPT, 20)])
    assert {one.verified for one in seen} == {2}
    assert all(one.drafted >= one.verified >= one.accepted for one in seen)
    assert any(one.drafted == GAMMA for one in seen)


def test_an_engine_learns_that_its_drafter_lies(target: Target, truth: list[int]) -> None:
    """Every token wrong at confidence 0.99: survival falls, and adaptive verification stops asking."""
    engine = make_engine(target, oracle(truth, "adversarial"), speculation="adaptive", costs=STEEP, clock=lambda: 0.0)
    drafted = []
    for _ in range(16):
        before = engine.counters.drafted
        run(engine, [greedy("a", PROMPT, 40)])
        drafted.append(engine.counters.drafted - before)
    tree = DraftTree.chain("a", 1, [1] * GAMMA, [0.99] * GAMMA)
    assert engine.survival.survival([tree])[0, 0] < 0.4
    assert drafted[0] > 100
    assert max(drafted[-4:]) < 20


def test_statistics_of_the_engine(target: Target, truth: list[int]) -> None:
    engine = make_engine(target, oracle(truth), speculation=f"static:{GAMMA}")
    host = EngineHost(engine)
    for _ in range(8):
        run(engine, [greedy("a", PROMPT, 60)])
    stats = host.stats()
    assert stats['acceptance_rate_per_pos{position="0"}'] == 1.0
    assert stats['survival_measured_per_pos{position="3"}'] == 1.0
    assert stats["survival_rounds_total"] >= 64
    accepted = [stats[f'accepted_tokens_per_pos_total{{position="{k}"}}'] for k in range(GAMMA)]
    assert sum(accepted) == stats["accepted_tokens_total"]
    assert accepted == sorted(accepted, reverse=True)


@pytest.mark.parametrize(
    ("has_head", "setting", "effective"),
    [(True, "auto", "head"), (False, "auto", "margin"), (True, "margin", "margin"), (False, "constant", "constant")],
)
def test_the_configuration_chooses(target: Target, tmp_path: Path, has_head: bool, setting: Any, effective: str) -> None:
    save_drafter(tmp_path, random_module(target, target_layer_ids=(0, 2), has_confidence=has_head, confidence_with_markov=has_head))
    (tmp_path / CALIBRATION_FILE).write_text('{"margin": {"slope": [2, 2, 2, 2], "intercept": [-1, -1, -1, -1]}}')
    config = EngineConfig(model="x", drafter=str(tmp_path), kv_tokens=1024, max_batch_tokens=64, profile=False, survival=setting)
    loaded = assemble(target, None, config)
    assert loaded.engine.survival.name == loaded.describe["survival"] == effective
    assert loaded.engine.survival.report().rounds == 0
    if effective == "margin":
        assert loaded.engine.survival.report().positions[3].parameters == {"slope": 2.0, "intercept": -1.0}


def test_auto_is_the_margin_of_an_ngram_drafter(target: Target) -> None:
    config = EngineConfig(model="x", drafter="ngram", kv_tokens=1024, max_batch_tokens=64, profile=False)
    survival = assemble(target, None, config).engine.survival
    assert survival.name == "margin"
    tree = DraftTree.chain("a", 1, [1, 2], [0.3, 0.6], margin=[-0.8472979, 0.4054651])
    assert survival.survival([tree])[0] == pytest.approx([0.3, 0.18])


def test_a_head_that_is_not_there_is_refused(target: Target) -> None:
    config = EngineConfig(model="x", drafter="ngram", kv_tokens=1024, max_batch_tokens=64, profile=False, survival="head")
    with pytest.raises(ConfigError, match="survival head: drafter 'ngram' has no trained confidence head"):
        assemble(target, None, config)
