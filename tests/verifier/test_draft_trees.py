"""Draft trees through the engine: rows equal plain forwards of their paths, and the text never depends on the tree."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from helpers import families
from helpers.drafters import TreeOracle
from helpers.engines import FLAT, STEEP, Result, greedy, make_engine, run, tiny_target
from helpers.random_trees import paths_of, random_parents, tree_of

from dspark.sampling import SamplingParams
from dspark.types import DraftTree, Finish, PlanRow, Request, Speculation, VerifyPlan
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.runner import Runner
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.targets import Target, as_target
from dspark.workers.verifier.verdict import Verdict

TOLERANCE = 1e-4
PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(3 + 6 * i)] for i in range(6)}
TREES = [("tree:8", None), ("tree:16", FLAT), ("tree:7:2", FLAT), ("tree:12", STEEP)]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def plain(target: Target) -> dict[str, Result]:
    return run(make_engine(target, speculation="off"), [greedy(name, prompt, 40) for name, prompt in PROMPTS.items()])


def oracle(plain: dict[str, Result], **options: Any) -> TreeOracle:
    return TreeOracle({name: PROMPTS[name] + result.tokens for name, result in plain.items()}, **options)


def tokens(results: dict[str, Result]) -> dict[str, list[int]]:
    return {name: result.tokens for name, result in results.items()}


# --- the forward and the KV of paths, for every family ---------------------------------------------------------------------


class Rows:
    """Runs rows with trees, compares every logits row with a plain forward of its path, and commits a path of each."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.pool = BlockPool(64)
        self.pool._clean = torch.randperm(64, generator=torch.Generator().manual_seed(3)).tolist()  # blocks out of order
        self.runner = Runner(target, self.pool, ())
        self.sequences: dict[str, Sequence] = {}

    def open(self, name: str, prompt: list[int]) -> None:
        self.sequences[name] = Sequence.of(Request(name, tuple(prompt), SamplingParams(max_tokens=None)), Speculation(), 256)
        self.pool.open(name, [])

    def run(self, trees: dict[str, DraftTree | None], paths: dict[str, tuple[int, ...]]) -> float:
        """Compute all pending tokens and the trees; commit ``paths``. Returns the largest error of any logits."""
        rows = []
        for name, sequence in self.sequences.items():
            sequence.draft = trees.get(name)
            count = len(sequence.draft.tokens) if sequence.draft is not None else 0
            assert self.pool.grow(name, sequence.num_known + count)
            rows.append(PlanRow(name, sequence.num_computed, sequence.num_pending, count, True, count))
        plan = VerifyPlan(tuple(rows), sum(row.num_tokens for row in rows))
        result = self.runner.forward(plan, self.sequences)
        worst = 0.0
        for row, first in zip(rows, result.first_row, strict=True):
            sequence = self.sequences[row.request_id]
            draft = sequence.draft
            branches = [[], *([draft.tokens[n] for n in path] for path in paths_of(draft.parents))] if draft is not None else [[]]
            for place, branch in enumerate(branches):
                worst = max(worst, float((result.logits[first + place] - self.plain(sequence.tokens + branch)).abs().max()))
        verdicts = {name: Verdict((*self.accepted(name, path), 5), len(path), None, path) for name, path in paths.items()}
        self.runner.keep_paths(plan, verdicts)
        for name, verdict in verdicts.items():
            sequence = self.sequences[name]
            sequence.num_computed = sequence.num_known + verdict.accepted
            sequence.append(verdict.tokens, 0.0)
            self.pool.shrink(name, sequence.num_computed)
        return worst

    def accepted(self, name: str, path: tuple[int, ...]) -> list[int]:
        draft = self.sequences[name].draft
        return [draft.tokens[node] for node in path] if draft is not None else []

    @torch.inference_mode()
    def plain(self, known: list[int]) -> torch.Tensor:
        self.target.model.set_attn_implementation("eager")
        logits = self.target.model(torch.tensor([known]), use_cache=False).logits[0, -1]
        self.target.model.set_attn_implementation("dspark_paged")
        return logits


@pytest.mark.parametrize("family", families.SERVED)
def test_rows_of_trees_equal_plain_forwards_of_their_paths(family: str) -> None:
    """Prompts with trees behind them, then trees of 9 to 18 nodes and 9 levels (windows are 6 wide), twice over the kept KV."""
    rows = Rows(as_target(families.make(family), family))
    numbers = itertools.cycle(torch.randint(3, families.VOCAB, (997,), generator=torch.Generator().manual_seed(1)).tolist())
    rng = random.Random(6)
    for name, length in (("a", 5), ("b", 28), ("c", 1), ("d", 15)):
        rows.open(name, list(itertools.islice(numbers, length)))
    moved = 0
    for _ in range(3):
        trees: dict[str, DraftTree | None] = {}
        paths: dict[str, tuple[int, ...]] = {"c": ()}
        for name, count in (("a", 18), ("b", 9), ("d", 12)):
            parents = random_parents(rng, count, max_depth=9)
            trees[name] = tree_of(parents, list(itertools.islice(numbers, count)), base_len=rows.sequences[name].num_known, name=name)
            path = max(paths_of(parents), key=lambda path: (len(path), path))
            paths[name] = tuple(path[: rng.choice((len(path), len(path) - 1))])
            moved += any(node != depth for depth, node in enumerate(paths[name]))
        assert rows.run(trees, paths) < TOLERANCE
    assert rows.run({}, {}) < TOLERANCE, "the KV of the last paths"
    assert moved >= 6


# --- the text --------------------------------------------------------------------------------------------------------------


def accepts_branches(engine: Engine) -> list[tuple[int, ...]]:
    """The accepted paths that are no prefix of their tree's list, as the engine finds them."""
    found: list[tuple[int, ...]] = []
    inner = engine.runner.keep_paths

    def keep_paths(plan: VerifyPlan, verdicts: Any) -> None:
        found.extend(v.path for v in verdicts.values() if v.path and v.path != tuple(range(len(v.path))))
        inner(plan, verdicts)

    engine.runner.keep_paths = keep_paths  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize(("speculation", "costs"), TREES)
def test_trees_never_change_greedy_text(target: Target, plain: dict[str, Result], speculation: str, costs: Any, overlapped: bool) -> None:
    """Alone and beside chains and plain requests in one batch, over several blocks of KV."""
    engine = make_engine(target, oracle(plain), speculation=speculation, costs=costs, overlapped=overlapped, max_batch_tokens=128)
    paths = accepts_branches(engine)
    requests = [greedy(name, prompt, 40) for name, prompt in PROMPTS.items()]
    assert tokens(run(engine, requests)) == tokens(plain)
    if costs is not STEEP:
        assert len(paths) > 10
    modes = ("off", "static:2", "adaptive", speculation, speculation, "tree:5")
    mixed = [
        Request(r.id, r.prompt_token_ids, r.sampling, speculation=Speculation.parse(mode)) for r, mode in zip(requests, modes, strict=True)
    ]
    engine = make_engine(target, oracle(plain, seed=1), costs=costs, overlapped=overlapped, max_batch_tokens=128)
    out = run(engine, mixed)
    assert tokens(out) == tokens(plain)
    assert max(o.drafted for o in out["r1"].outcomes) == 2
    assert max(o.drafted for o in out["r5"].outcomes) <= 5


def test_a_request_gets_the_nodes_and_levels_it_asks_for(target: Target, plain: dict[str, Result]) -> None:
    engine = make_engine(target, oracle(plain), costs=FLAT, max_batch_tokens=256)
    requests = [
        Request(name, tuple(prompt), greedy(name, prompt, 40).sampling, speculation=Speculation.parse(mode))
        for (name, prompt), mode in zip(PROMPTS.items(), ("tree:3", "tree", "tree:62", "tree:9:1", "adaptive", "off"), strict=True)
    ]
    out = run(engine, requests)
    assert tokens(out) == tokens(plain)
    most = {name: max(o.drafted for o in result.outcomes) for name, result in out.items()}
    assert most["r0"] == 3
    assert 4 < most["r1"] <= 16
    assert 16 < most["r2"] <= 64
    assert most["r5"] == 0
    assert max(o.accepted for o in out["r3"].outcomes) == 1, "one level holds alternatives of one token"
    assert max(o.accepted for o in out["r1"].outcomes) > 2


def test_a_tree_accepts_more_than_its_first_branch(target: Target, plain: dict[str, Result]) -> None:
    """The oracle's nodes are half right: what a chain of its first candidates accepts is less than what the trees do."""
    engine = make_engine(target, oracle(plain), speculation="tree:16", max_batch_tokens=128)
    out = run(engine, [greedy(name, prompt, 40) for name, prompt in PROMPTS.items()])
    accepted = sum(o.accepted for r in out.values() for o in r.outcomes)
    assert accepted / sum(len(r.outcomes) for r in out.values()) > 2.0
    assert engine.counters.accepted >= accepted


def test_small_pools_preemption_and_the_models_end(target: Target, plain: dict[str, Result]) -> None:
    engine = make_engine(target, oracle(plain), num_blocks=9, speculation="tree:16", costs=FLAT)
    assert tokens(run(engine, [greedy(name, prompt, 40) for name, prompt in PROMPTS.items()])) == tokens(plain)
    assert engine.scheduler.counters.preemptions > 0
    prompt = PROMPTS["r5"]
    whole = run(make_engine(target, speculation="off", num_blocks=3), [greedy("r5", prompt, 999)])["r5"]
    assert (len(prompt) + len(whole.tokens), whole.finish) == (48, Finish.LENGTH)
    end = make_engine(target, TreeOracle({"r5": prompt + whole.tokens}), num_blocks=3, speculation="tree:16")
    assert run(end, [greedy("r5", prompt, 999)])["r5"].tokens == whole.tokens
    assert end.counters.accepted > 5


def test_prefix_hits_hold_the_kv_of_paths(target: Target, plain: dict[str, Result]) -> None:
    """A second request whose prompt is the first one's text finds blocks that accepted paths filled."""
    engine = make_engine(target, oracle(plain), speculation="tree:16", max_batch_tokens=128)
    paths = accepts_branches(engine)
    first = run(engine, [greedy("r2", PROMPTS["r2"], 40)])["r2"]
    assert paths
    text = PROMPTS["r2"] + first.tokens
    again = run(engine, [greedy("again", text, 12)])["again"]
    assert again.outcomes[0].num_cached_tokens == 48
    assert again.tokens == run(make_engine(target, speculation="off"), [greedy("again", text, 12)])["again"].tokens


def test_the_drafter_gets_the_features_of_the_path(target: Target, plain: dict[str, Result]) -> None:
    drafter = oracle(plain, taps=(-1, 2))
    engine = make_engine(target, drafter, speculation="tree:12", max_batch_tokens=128)
    paths = accepts_branches(engine)
    run(engine, [greedy(name, prompt, 40) for name, prompt in PROMPTS.items()])
    assert len(paths) > 10
    target.model.set_attn_implementation("eager")
    for name, prompt in PROMPTS.items():
        with torch.inference_mode():
            hidden = target.model(torch.tensor([prompt + plain[name].tokens]), use_cache=False, output_hidden_states=True).hidden_states
        wanted = torch.cat([hidden[0][0], hidden[3][0]], dim=-1)
        given = drafter.features[name]
        assert len(given) > len(prompt) + 30
        for position, feature in given.items():
            torch.testing.assert_close(feature, wanted[position], atol=TOLERANCE, rtol=0.0)
    target.model.set_attn_implementation("dspark_paged")


SAMPLED = {
    "temperature": {"temperature": 0.8},
    "truncated": {"temperature": 1.2, "top_p": 0.8, "top_k": 20},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"temperature": 0.7, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "biased": {"temperature": 0.9, "logit_bias": {5: 4.0, 9: -100.0}, "min_tokens": 6},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
}


def sampled(name: str, params: dict[str, Any]) -> Request:
    params = {"seed": 11, "max_tokens": 20, "ignore_eos": True} | params
    return Request(name, tuple(PROMPTS[name]), SamplingParams(**params), noise_seed=17)


@pytest.mark.parametrize("params", SAMPLED.values(), ids=SAMPLED.keys())
def test_a_seed_fixes_the_text_whatever_the_tree(target: Target, params: dict[str, Any]) -> None:
    requests = [sampled(name, params) for name in PROMPTS]
    alone = run(make_engine(target, speculation="off"), requests)
    for speculation, costs in (*TREES, ("static:3", None)):
        drafter = oracle(alone, seed=3)
        engine = make_engine(target, drafter, speculation=speculation, costs=costs, max_batch_tokens=128)
        assert tokens(run(engine, requests)) == tokens(alone)
        assert engine.counters.accepted > 0 or costs is STEEP
    squeezed = make_engine(target, oracle(alone), num_blocks=9, speculation="tree:16", costs=FLAT)
    assert tokens(run(squeezed, requests)) == tokens(alone)
    assert squeezed.scheduler.counters.preemptions > 0


@pytest.mark.parametrize("params", SAMPLED.values(), ids=SAMPLED.keys())
def test_every_parameter_runs_with_trees_under_the_ratio_rule(target: Target, params: dict[str, Any]) -> None:
    more = {"acceptance": "ratio", "seed": None, "logprobs": 2, "prompt_logprobs": 1, "temperature": 0.1 * params["temperature"]}
    requests = [sampled(name, params | more) for name in PROMPTS]
    alone = run(make_engine(target, speculation="off"), requests)
    engine = make_engine(target, oracle(alone), speculation="tree:10", max_batch_tokens=128)
    out = run(engine, requests)
    assert engine.counters.accepted > 10
    for name, result in out.items():
        assert len(result.tokens) == 20
        scored = [one for o in result.outcomes for one in (o.logprobs or ())]
        assert [one.token_id for one in scored] == result.tokens
        assert len(result.outcomes[0].prompt_logprobs or ()) == len(PROMPTS[name])
        check_logprobs(target, PROMPTS[name] + result.tokens, len(PROMPTS[name]), [one.logprob for one in scored])
        if "logit_bias" in params:
            assert 9 not in result.tokens


@torch.inference_mode()
def check_logprobs(target: Target, text: list[int], start: int, found: list[float]) -> None:
    target.model.set_attn_implementation("eager")
    law = target.model(torch.tensor([text]), use_cache=False).logits[0].log_softmax(-1)
    target.model.set_attn_implementation("dspark_paged")
    wanted = [float(law[position - 1, text[position]]) for position in range(start, len(text))]
    assert found == pytest.approx(wanted, abs=TOLERANCE)


def test_stops_inside_a_path(target: Target, plain: dict[str, Result]) -> None:
    text = plain["r2"].tokens
    stop = next(t for i, t in enumerate(text) if i >= 5 and t not in text[:i])
    params = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=(stop,), ignore_eos=True)
    engine = make_engine(target, oracle(plain), speculation="tree:16")
    result = run(engine, [Request("r2", tuple(PROMPTS["r2"]), params)])["r2"]
    assert result.tokens == text[: text.index(stop) + 1]
    assert result.outcomes[-1].accepted <= len(result.outcomes[-1].tokens)


def test_drafters_without_trees_go_on_with_chains(target: Target, plain: dict[str, Result]) -> None:
    engine = make_engine(target, NgramDrafter(3), speculation="tree:16", costs=FLAT)
    assert tokens(run(engine, [greedy(name, prompt, 40) for name, prompt in PROMPTS.items()])) == tokens(plain)
    assert engine.counters.drafted > 0
