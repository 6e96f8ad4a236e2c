"""Every served family: logits of mixed paged batches equal plain forwards; other families are refused by name."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import families

from dspark.errors import ConfigError
from dspark.sampling import SamplingParams
from dspark.types import DraftTree, PlanRow, Request, Speculation, VerifyPlan
from dspark.workers.blocks import BlockPool
from dspark.workers.verifier.fused import fuse
from dspark.workers.verifier.runner import Runner
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.targets import Target, as_target, check_model_folder, load_model

TOLERANCE = 1e-4


@torch.inference_mode()
def plain_logits(target: Target, tokens: list[int]) -> torch.Tensor:
    """Logits [n, V] of one sequence through the model's own eager attention."""
    target.model.set_attn_implementation("eager")
    logits = target.model(torch.tensor([tokens]), use_cache=False).logits[0]
    target.model.set_attn_implementation("dspark_paged")
    return logits


class Driver:
    """Runs hand-made plans and compares all their logits with plain forwards."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.pool = BlockPool(64)
        # blocks of requests must not come out in order
        self.pool._clean = torch.randperm(64, generator=torch.Generator().manual_seed(3)).tolist()
        self.runner = Runner(target, self.pool, ())
        self.sequences: dict[str, Sequence] = {}

    def open(self, name: str, tokens: list[int], cached: int = 0) -> None:
        sequence = Sequence.of(Request(name, tuple(tokens), SamplingParams(max_tokens=None)), Speculation(), 256)
        hits = self.pool.open(name, sequence.hashes(16, (len(tokens) - 1) // 16))
        assert hits * 16 == cached
        sequence.num_computed = cached
        self.sequences[name] = sequence

    def run(self, parts: dict[str, tuple[int, list[int]]], bucket: int | None = None) -> float:
        """Each part: known tokens to compute, then drafts. Returns the largest error of all logits of the rows that sample."""
        rows = []
        for name, (known, drafts) in parts.items():
            sequence = self.sequences[name]
            base = sequence.num_known
            sequence.draft = DraftTree.chain(name, base, drafts, [0.9] * len(drafts))
            assert self.pool.grow(name, sequence.num_computed + known + len(drafts))
            rows.append(PlanRow(name, sequence.num_computed, known, len(drafts), sequence.num_pending == known))
        total = sum(row.num_tokens for row in rows)
        result = self.runner.forward(VerifyPlan(tuple(rows), bucket or total), self.sequences)
        worst = 0.0
        for row, first in zip(rows, result.first_row, strict=True):
            sequence = self.sequences[row.request_id]
            if row.samples:
                drafts = parts[row.request_id][1]
                expected = plain_logits(self.target, sequence.tokens + drafts)[sequence.num_known - 1 :]
                worst = max(worst, float((result.logits[first : first + 1 + row.num_draft] - expected).abs().max()))
        return worst

    def commit(self, name: str, computed: int, new: list[int]) -> None:
        sequence = self.sequences[name]
        sequence.append(tuple(new), 0.0)
        before, sequence.num_computed = sequence.num_computed, computed
        self.pool.shrink(name, computed)
        for index in range(before // 16, computed // 16):
            self.pool.register(name, index, sequence.hashes(16, index + 1)[index])
        self.pool.check()


@pytest.mark.parametrize("family", families.SERVED)
def test_mixed_batches_equal_plain_forwards(family: str) -> None:
    target = as_target(families.make(family), family)
    driver = Driver(target)
    numbers = itertools.cycle(torch.randint(3, families.VOCAB, (997,), generator=torch.Generator().manual_seed(1)).tolist())

    def tokens(count: int) -> list[int]:
        return list(itertools.islice(numbers, count))

    prompts = {"a": tokens(5), "b": tokens(37), "c": tokens(1), "d": tokens(21)}
    for name, prompt in prompts.items():
        driver.open(name, prompt)
    # prefill: whole prompts beside one chunk
    assert driver.run({"a": (5, []), "b": (20, []), "c": (1, []), "d": (21, [])}) < TOLERANCE
    driver.commit("b", 20, [])
    for name in ("a", "c", "d"):
        driver.commit(name, len(prompts[name]), tokens(1))
    # the rest of a prompt, with drafts behind it, beside decode and verify rows of different lengths
    drafts = {"a": tokens(4), "b": tokens(2), "c": [], "d": tokens(7)}
    assert driver.run({"a": (1, drafts["a"]), "b": (17, drafts["b"]), "c": (1, []), "d": (1, drafts["d"])}) < TOLERANCE
    # rolled back rows: some drafts rejected, their KV is overwritten in the next step
    accepted = {"a": 2, "b": 2, "c": 0, "d": 0}
    for name, count in accepted.items():
        sequence = driver.sequences[name]
        driver.commit(name, sequence.num_known + count, drafts[name][:count] + tokens(1))
    # a prefix hit joins: it shares two full blocks with b
    driver.open("e", prompts["b"][:32] + tokens(5), cached=32)
    again = {"a": (1, tokens(3)), "b": (1, tokens(5)), "c": (1, tokens(2)), "d": (1, tokens(6)), "e": (5, tokens(1))}
    padded = sum(known + len(draft) for known, draft in again.values()) + 11
    before = {layer: keys.clone() for layer, keys in driver.runner.store.keys.items()}
    assert driver.run(again, bucket=padded) < TOLERANCE
    _assert_only_own_slots_changed(driver, before)


def _assert_only_own_slots_changed(driver: Driver, before: dict[int, torch.Tensor]) -> None:
    """Padding rows, and rows of others, wrote nothing outside the step's own slots."""
    own = {
        table[p // 16] * 16 + p % 16
        for name, s in driver.sequences.items()
        for table in [driver.pool.table(name)]
        for p in range(s.num_computed, len(table) * 16)
    }
    others = [slot for slot in range(64 * 16) if slot not in own]
    for layer, keys in driver.runner.store.keys.items():
        assert torch.equal(keys[others], before[layer][others])


def test_shared_kv_layers_own_no_pool() -> None:
    target = as_target(families.make("gemma4"), "gemma4")
    assert {layer: shape.source for layer, shape in target.layers.items()} == {0: 0, 1: 1, 2: 0, 3: 1}


@pytest.mark.parametrize("family", families.REFUSED)
def test_unservable_families_are_refused_by_name(family: str) -> None:
    with pytest.raises(ConfigError, match="cannot be served") as caught:
        as_target(families.make(family), family)
    assert family.split("_")[0] in str(caught.value).lower()


def test_taps_are_the_residual_stream() -> None:
    target = as_target(families.make("qwen3"), "qwen3")
    pool = BlockPool(8)
    runner = Runner(target, pool, (-1, 0, 2))
    tokens = list(range(3, 14))
    sequence = Sequence.of(Request("a", tuple(tokens), SamplingParams()), Speculation(), 256)
    pool.open("a", [])
    assert pool.grow("a", 11)
    taps = runner.forward(VerifyPlan((PlanRow("a", 0, 11, 0, True),), 13), {"a": sequence}).taps
    target.model.set_attn_implementation("eager")
    with torch.inference_mode():
        states = target.model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
    assert taps is not None
    torch.testing.assert_close(taps[:11], torch.cat([states[0][0], states[1][0], states[3][0]], -1), atol=1e-5, rtol=1e-5)


def test_folder_without_weights_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="no such folder"):
        check_model_folder(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check_model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="safetensors"):
        check_model_folder(str(tmp_path))


def test_saved_model_loads_with_our_attention(tmp_path) -> None:  # type: ignore[no-untyped-def]
    families.make("llama").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    assert as_target(model, "x").num_layers == 4


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_fused_layers_compute_the_same(family: str) -> None:
    target, fused = (as_target(families.make(family), family) for _ in range(2))
    assert fuse(fused)
    tokens = [(7 * i) % 150 + 3 for i in range(33)]
    results = []
    for each in (target, fused):
        pool = BlockPool(8)
        runner = Runner(each, pool, (-1, 2))
        sequence = Sequence.of(Request("a", tuple(tokens), SamplingParams()), Speculation(), 256)
        pool.open("a", [])
        assert pool.grow("a", 33)
        runner.forward(VerifyPlan((PlanRow("a", 0, 20, 0, False),), 20), {"a": sequence})
        sequence.num_computed = 20
        results.append(runner.forward(VerifyPlan((PlanRow("a", 20, 13, 0, True),), 13), {"a": sequence}))
    torch.testing.assert_close(results[1].logits, results[0].logits, atol=1e-5, rtol=1e-5)
    assert results[0].taps is not None
    assert results[1].taps is not None
    torch.testing.assert_close(results[1].taps, results[0].taps, atol=1e-5, rtol=1e-5)


def test_other_layers_stay_as_they_are() -> None:
    target = as_target(families.make("gemma3"), "gemma3")
    assert not fuse(target)
