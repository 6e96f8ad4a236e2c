"""Parallel verifiers on ranks that are threads: every family, every layout, and a whole engine equal one rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import families
from helpers.draft_modules import random_module
from helpers.drafters import OracleDrafter
from helpers.engines import FLAT, Result, greedy, make_engine, run, tiny_target
from helpers.exchanges import exchange_of
from helpers.ranks import ThreadLauncher, on_ranks

from dspark.config import EngineConfig
from dspark.errors import ConfigError
from dspark.kernels.graphs import plain_calls
from dspark.kernels.paged_attention import AttentionRow
from dspark.sampling import SamplingParams
from dspark.types import Drafter, DraftTree, DraftTurn, Request
from dspark.workers.blocks import BlockPool
from dspark.workers.build import load_engine
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.forward import StepInput
from dspark.workers.verifier.fused import fuse
from dspark.workers.verifier.graphs import GraphSizes
from dspark.workers.verifier.parallel.group import HEAD_WORDS, RankGroup
from dspark.workers.verifier.parallel.layout import Layout, check_experts, check_heads, part
from dspark.workers.verifier.parallel.messages import (
    END,
    Blocks,
    Move,
    Start,
    decode,
    encode_blocks,
    encode_move,
    encode_start,
    encode_step,
)
from dspark.workers.verifier.parallel.sharding import ExpertLoad, SplitHead, split_model
from dspark.workers.verifier.parallel.whole_blocks import cut, joined
from dspark.workers.verifier.runner import GraphOptions
from dspark.workers.verifier.targets import Target, as_target, own_logits, paged_logits

PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(5 + 14 * i)] for i in range(3)}
EXPERTS = {"qwen3_moe", "gemma4_moe", "gpt_oss", "deepseek_v3"}
LAYOUTS = [
    pytest.param(name, t, e, marks=() if (t, e) == ((2, 2) if name in EXPERTS else (4, 1)) else pytest.mark.slow)
    for name in families.SERVED
    for t, e in ((2, 1), (4, 1), (2, 2), (1, 4))
    if e == 1 or name in EXPERTS
]


@pytest.mark.parametrize(("family", "tensor", "expert"), LAYOUTS)
def test_every_family_keeps_its_logits(family: str, tensor: int, expert: int) -> None:
    """Also with fewer KV heads (2) than ranks (4), and in fused layers."""
    whole = as_target(families.make(family), family)
    expected = own_logits(whole.model)
    models = [families.make(family) for _ in range(tensor * expert)]

    def work(group: RankGroup) -> tuple[torch.Tensor, int]:
        model = models[group.layout.rank]
        split_model(model, group)
        target = as_target(model, family)
        fuse(target)
        return paged_logits(target), target.kv_bytes_per_token

    results = on_ranks(tensor, expert, work)
    torch.testing.assert_close(results[0][0], expected, atol=1e-4, rtol=0)
    own_kv = [(max(1, s.kv_heads // (tensor * expert)), s) for i, s in whole.layers.items() if s.source == i]
    assert {size for _, size in results} == {4 * sum(heads * (s.key_dim + s.value_dim) for heads, s in own_kv)}
    assert all(logits.shape[-1] == families.VOCAB // (tensor * expert) for logits, _ in results[1:])


def test_parts_cover_everything_once() -> None:
    for total in range(1, 20):
        for count in range(1, 6):
            parts = [part(total, index, count) for index in range(count)]
            assert [i for one in parts for i in one] == list(range(total))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for kv_heads, size in ((2, 4), (4, 4), (8, 4), (1, 4), (4, 2)):
        for rank in range(size):
            layout = Layout(rank, size, 1)
            needed = {head * kv_heads // 8 for head in layout.share(8)}
            assert set(layout.kv_share(kv_heads)) == needed


def test_what_cannot_be_split_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="2 does not divide its 9 attention heads"):
        check_heads("LlamaForCausalLM", 9, 3, 2)
    with pytest.raises(ConfigError, match="2 neither divides its 3 KV heads nor"):
        check_heads("LlamaForCausalLM", 12, 3, 2)
    check_heads("LlamaForCausalLM", 12, 3, 6)
    with pytest.raises(ConfigError, match="expert_parallel 2: LlamaForCausalLM has no experts"):
        check_experts("LlamaForCausalLM", 0, 2)
    with pytest.raises(ConfigError, match="expert_parallel 16 is more than the 8 experts"):
        check_experts("Qwen3MoeForCausalLM", 8, 16)


@pytest.mark.parametrize(
    ("settings", "message"), [({"tensor_parallel": 8}, "8 does not divide its 4"), ({"expert_parallel": 2}, "no experts")]
)
def test_a_refusal_at_load_starts_no_rank(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    families.make("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_engine(EngineConfig(model=str(tmp_path), **settings))
    with pytest.raises(ConfigError, match="cuda:1"):
        load_engine(EngineConfig(model=str(tmp_path), device="cuda:1", tensor_parallel=2))


def test_announcements_come_out_as_they_went_in() -> None:
    tree = torch.eye(65, dtype=torch.bool)
    tree[:, 0] = True
    tree[40:, 7] = True
    rows = [AttentionRow(0, 3, 40, [5, 6, 7, 8, 9]), AttentionRow(3, 65, 70, [1, 0, 2, 3, 4], tree), AttentionRow(68, 1, 1, [11])]
    sent = StepInput(list(range(69)), list(range(100, 169)), list(range(200, 269)), rows, [2, 3, 68], 11)
    got = decode(encode_step(sent, 16))
    assert isinstance(got, StepInput)
    assert (got.ids, got.positions, got.slots, got.wanted, got.padding) == (sent.ids, sent.positions, sent.slots, sent.wanted, 11)
    for row, original in zip(got.rows, rows, strict=True):
        assert (row.start, row.length, row.context) == (original.start, original.length, original.context)
        assert list(row.table) == original.table[: -(-original.context // 16)]
    assert got.rows[0].visible is None
    assert got.rows[1].visible is not None
    assert torch.equal(got.rows[1].visible, tree)
    assert decode(encode_move([5, 6], [1, 2])) == Move([5, 6], [1, 2])
    for is_spread in (False, True):
        assert decode(encode_blocks(Blocks([4, 0, 7], is_spread))) == Blocks([4, 0, 7], is_spread)
    for graphs in (None, GraphSizes((1, 2, 8), 4, 128, 6, with_trees=True)):
        assert decode(encode_start(graphs)) == Start(graphs)
    assert decode(END) is None


def test_announcements_of_any_length_arrive() -> None:
    lengths = [0, 1, HEAD_WORDS - 1, HEAD_WORDS, 3 * HEAD_WORDS]

    def work(group: RankGroup) -> list[int]:
        received = []
        for length in lengths:
            words = torch.arange(length, dtype=torch.int32)
            if group.layout.is_leader:
                group.send(words)
                received.append(length)
            else:
                received.append(len(got := group.receive()))
                assert torch.equal(got, words)
        return received

    assert on_ranks(3, 1, work) == [lengths] * 3


def test_a_head_whose_columns_do_not_divide_is_gathered_whole() -> None:
    torch.manual_seed(0)
    head, x = torch.nn.Linear(6, 7), torch.randn(2, 5, 6)
    expected = head(x).detach()
    parts = on_ranks(3, 1, lambda group: SplitHead(head, group)(x).detach())
    torch.testing.assert_close(parts[0], expected)
    torch.testing.assert_close(torch.cat([parts[0][..., :2], *parts[1:]], -1), expected)


@pytest.fixture(scope="module", params=[("qwen3", 2, 1), ("qwen3_moe", 2, 2)], ids=["qwen3-tp2", "qwen3_moe-tp2-ep2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, Target]]:
    """The same model whole and over ranks."""
    family, tensor, expert = request.param
    folder = tmp_path_factory.mktemp("models")
    families.make(family).save_pretrained(folder)
    config = EngineConfig(model=str(folder), dtype="float32", kv_tokens=2048, tensor_parallel=tensor, expert_parallel=expert, profile=False)
    loaded = load_engine(config, launcher=ThreadLauncher())
    assert loaded.describe["parameters"] == sum(p.numel() for p in families.make(family).parameters())
    yield tiny_target(family), loaded.engine.target
    loaded.engine.close()


def engine_on(target: Target, drafter: str, **options: Any) -> Any:
    pool = BlockPool(options.pop("num_blocks", 128))
    made: dict[str, Drafter] = {"ngram": NgramDrafter(), "grafted": LocalDrafter(random_module(target), pool, law_width=8)}
    return make_engine(target, made.get(drafter), pool, **options)


def outputs(results: dict[str, Result]) -> dict[str, list[int]]:
    return {name: result.tokens for name, result in results.items()}


@pytest.mark.parametrize(
    ("drafter", "options"),
    [
        ("none", {"max_batch_tokens": 16}),
        ("ngram", {"costs": FLAT, "num_blocks": 7}),
        ("grafted", {"speculation": "static:3"}),
        ("grafted", {"costs": FLAT, "num_blocks": 7, "speculation": "tree:6"}),
    ],
)
def test_text_is_that_of_one_rank(both: tuple[Target, Target], drafter: str, options: dict[str, Any]) -> None:
    """Greedy and seeded, with drafts, prefix hits, chunked prefill and preemption."""
    whole, parallel = both
    seeded = SamplingParams(temperature=0.9, seed=7, top_p=0.9, max_tokens=10, ignore_eos=True)
    requests = [*(greedy(name, prompt, 16) for name, prompt in PROMPTS.items()), Request("seeded", tuple(PROMPTS["r1"]), seeded)]
    engines = [engine_on(target, drafter, **options) for target in (whole, parallel)]
    expected, out = (outputs(run(engine, requests)) for engine in engines)
    assert out == expected
    hit = run(engines[1], [greedy("again", PROMPTS["r2"], 16)])["again"]
    assert hit.tokens == expected["r2"]
    assert hit.outcomes[0].num_cached_tokens > 0
    assert engines[1].counters.drafted > 0 or drafter == "none"
    assert engines[1].scheduler.counters.preemptions > 0 or "num_blocks" not in options


class Bushy(OracleDrafter):
    """Before the true token of each depth stands a wrong sibling, so every accepted path has to be moved."""

    def _tree(self, turn: DraftTurn, count: int) -> DraftTree | None:
        true = [int(token) for token in self._truth.get(turn.request_id, ())[turn.base_len : turn.base_len + count // 2]]
        tokens = [token for one in true for token in ((one + 1) % families.VOCAB, one)]
        parents = [2 * depth - 1 for depth in range(len(true)) for _ in range(2)]
        return DraftTree(turn.request_id, turn.base_len, tuple(tokens), tuple(parents), (0.9,) * len(tokens))


def test_accepted_paths_of_trees_move_on_every_rank(both: tuple[Target, Target]) -> None:
    whole, parallel = both
    requests = [greedy(name, prompt, 16) for name, prompt in PROMPTS.items()]
    expected = outputs(run(engine_on(whole, "none"), requests))
    drafter = Bushy({name: [*prompt, *expected[name]] for name, prompt in PROMPTS.items()}, block_size=8)
    engine = make_engine(parallel, drafter, speculation="tree:8", costs=FLAT)
    out = run(engine, requests)
    assert outputs(out) == expected
    assert max(result.acceptance_length for result in out.values()) > 2


def test_logits_are_those_of_one_rank(both: tuple[Target, Target]) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=20, prompt_logprobs=20)
    requests = [Request("a", tuple(PROMPTS["r2"]), sampling)]
    expected, out = (run(engine_on(target, "ngram"), requests)["a"].outcomes for target in both)

    def logprobs(outcomes: Any) -> list[tuple[int, float]]:
        entries = [entry for o in outcomes for entry in (*(o.prompt_logprobs or ()), *o.logprobs) if entry is not None]
        return [(entry.token_id, entry.logprob) for entry in entries] + [pair for entry in entries for pair in entry.top]

    for (token, value), (expected_token, expected_value) in zip(logprobs(out), logprobs(expected), strict=True):
        assert token == expected_token
        assert value == pytest.approx(expected_value, abs=1e-4)


@pytest.mark.parametrize("giver_is_whole", [True, False], ids=["to ranks", "from ranks"])
def test_kv_moves_between_one_rank_and_several(both: tuple[Target, Target], giver_is_whole: bool) -> None:
    """With the drafter's context, and in the middle of an answer; what was moved is not computed again."""
    prompt, request = PROMPTS["r2"], greedy("r", PROMPTS["r2"], 40)
    expected = run(engine_on(both[0], "grafted", speculation="static:3"), [request])["r"].tokens
    giver, taker = (engine_on(target, "grafted", speculation="static:3") for target in (both if giver_is_whole else both[::-1]))
    give, take = exchange_of(giver), exchange_of(taker)
    assert take.layout.mismatch(give.layout) is None
    giver.add(request)
    done: list[int] = []
    while len(done) < 20:
        done += [token for outcome in giver.step() for token in outcome.tokens]
    again = dataclasses.replace(request, prompt_token_ids=(*prompt, *done), num_prompt_tokens=len(prompt))
    hashes = take.prefix(again)
    assert take.take(hashes, give.give(hashes, 0).result()).result() == (len(prompt) + len(done) - 1) // 16
    rest = run(taker, [again])["r"]
    assert done + rest.tokens == expected
    assert rest.outcomes[0].num_cached_tokens == len(prompt)
    assert taker.counters.step_tokens < 16 + 5 * len(rest.outcomes)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_blocks_are_cut_and_joined(heads: int) -> None:
    whole = torch.randn(3, 2, heads, 5)
    layout = Layout(0, 2, 2)
    share = max(1, heads // 4)
    shares = cut(whole, layout, share)
    assert [one.shape for one in shares] == [(3, 2, share, 5)] * 4
    torch.testing.assert_close(joined(shares, layout, heads), whole)
    assert all(torch.equal(one, whole) for one in cut(whole, layout, heads)), "attention that is not split"
    assert joined([whole] * 4, layout, heads) is whole


def test_padding_is_no_load() -> None:
    load = ExpertLoad(4)
    routing = torch.tensor([[0, 1], [1, 3], [2, 2]])
    load.count(routing)
    assert load.tokens.tolist() == [0, 0, 0, 0], "nothing is counted outside of steps"
    for slots in ([7, 4], [7, 4, -1]):
        load.clear()
        with load.counting(torch.tensor(slots), 3):
            load.count(routing)
        assert load.tokens.tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize("graphs", [None, GraphOptions(plain_calls, max_tokens=48, max_rows=8, max_model_len=256)], ids=["plain", "graphs"])
def test_expert_load_counts_real_tokens(both: tuple[Target, Target], graphs: GraphOptions | None) -> None:
    _, parallel = both
    engine = engine_on(parallel, "none", graphs=graphs)
    ranks = parallel.ranks
    assert ranks is not None
    before = ranks.stats()
    run(engine, [greedy("a", PROMPTS["r2"], 5)])
    after = ranks.stats()
    if not before:
        return
    added = {key: value - before[key] for key, value in after.items() if key.endswith('"}')}
    layers, top_k, tokens = 4, 2, len(PROMPTS["r2"]) + 4
    experts = [value for key, value in added.items() if key.startswith("expert_tokens_total")]
    by_rank = [added[f'rank_expert_tokens_total{{rank="{rank}"}}'] for rank in range(4)]
    assert sum(experts) == layers * top_k * tokens
    assert by_rank == [sum(experts[:4])] * 2 + [sum(experts[4:])] * 2
    assert after["expert_load_imbalance"] >= 1.0
