"""The Triton attention and KV store against the specification, on random ragged batches; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.triton_interpreter import mend_interpreter
from torch import Tensor

from dspark.kernels import kv_store, rotary
from dspark.kernels.paged_attention import AttentionRow, AttentionShape, reference
from dspark.kernels.ragged_attention import _COUNTERS, RaggedBatch, launch, ragged_attention, slots_of, tiling
from dspark.kernels.rotary import HeadNorms

pytest.importorskip("triton")
mend_interpreter()
BLOCK = 4
NUM_BLOCKS = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIXED = [(1, 1), (1, 30), (0, 0), (5, 5), (3, 47), (20, 33), (1, 29), (4, 12), (0, 0), (7, 50)]


def make_rows(lengths: list[tuple[int, int]], seed: int, with_trees: bool = False) -> list[AttentionRow]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    rows: list[AttentionRow] = []
    start = 0
    for length, context in lengths:
        table = [blocks.pop() for _ in range(-(-context // BLOCK))]
        visible = None
        if with_trees and length > 2:
            visible = torch.zeros(length, length, dtype=torch.bool)
            for node in range(length):
                if node:
                    visible[node] = visible[int(torch.randint(0, node, (1,), generator=generator))]
                visible[node, node] = True
        rows.append(AttentionRow(start, length, context, table, visible))
        start += length
    return rows


def ragged(rows: list[AttentionRow], padding: int, longest: int = 1, sees_all: bool = False) -> RaggedBatch:
    """The rows as tensors, and one row of padding tokens behind them."""
    batch = RaggedBatch.plan(rows, BLOCK, DEVICE, sum(row.length for row in rows) + padding)
    return dataclasses.replace(batch, longest=longest, sees_all=sees_all)


def tensors(total: int, dtype: torch.dtype, value_dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Query (heads and tokens strided) and caches whose unused slots hold poison."""
    torch.manual_seed(2)
    query = torch.randn(total, 8, 24, dtype=dtype, device=DEVICE)[:, :6, :16]
    keys = torch.randn(NUM_BLOCKS * BLOCK, 2, 16, dtype=dtype, device=DEVICE)
    return query, keys, torch.randn(NUM_BLOCKS * BLOCK, 2, value_dim, dtype=dtype, device=DEVICE)


def poison_unused(rows: list[AttentionRow], *caches: Tensor) -> None:
    used = {row.table[p // BLOCK] * BLOCK + p % BLOCK for row in rows for p in range(row.context)}
    unused = [slot for slot in range(NUM_BLOCKS * BLOCK) if slot not in used]
    for cache in caches:
        cache[unused] = float("nan")


@pytest.mark.parametrize("num_processors", [4, 132], ids=["whole", "split"])
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks", "with_trees", "longest"),
    [(None, None, False, False, 1), (3, None, False, True, 4), (None, 5.0, True, True, 20), (20, None, True, False, 4)],
)
def test_equals_the_specification(
    monkeypatch: pytest.MonkeyPatch,
    num_processors: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    with_trees: bool,
    longest: int,
) -> None:
    monkeypatch.setattr("dspark.kernels.ragged_attention._num_processors", lambda device: num_processors)
    rows = make_rows(MIXED, 1, with_trees)
    total = sum(row.length for row in rows)
    query, keys, values = tensors(total + 3, torch.float32, 12 if with_sinks else 16)
    poison_unused(rows, keys, values)
    sinks = torch.randn(6, device=DEVICE) if with_sinks else None
    shape = AttentionShape(0.3, window, softcap)
    batch = ragged(rows, 3, longest)
    given = dataclasses.replace(batch, is_given=True)
    expected = reference(query, keys, values, rows, BLOCK, shape, sinks)
    for compute, told in ((launch, batch), (launch, given), (ragged_attention, batch)):
        if compute is ragged_attention and DEVICE.type == "cpu":
            keys, values = keys.nan_to_num(1e4), values.nan_to_num(1e4)
        actual = compute(query, keys, values, told, shape, sinks)
        torch.testing.assert_close(actual[:total], expected[:total], atol=3e-6, rtol=1e-5)
        assert not actual[total:].any(), "padding tokens come out as zero"
    assert all(not counters.any() for counters in _COUNTERS.values()), "counters are 0 again"


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("num_processors", [4, 132], ids=["whole", "split"])
def test_first_positions_that_nobody_sees(monkeypatch: pytest.MonkeyPatch, num_processors: int, window: int | None) -> None:
    monkeypatch.setattr("dspark.kernels.ragged_attention._num_processors", lambda device: num_processors)
    rows = make_rows([(1, 2), (1, 30), (4, 90), (1, 65), (3, 9)], 2)
    total = sum(row.length for row in rows)
    query, keys, values = tensors(total + 3, torch.float32)
    poison_unused(rows, keys, values)
    for row in rows:
        for cache in (keys, values):
            cache[row.table[0] * BLOCK] = float("inf")  # of position 0
    shape = AttentionShape(0.3, window, first=1)
    expected = reference(query, keys, values, rows, BLOCK, shape)
    actual = launch(query, keys, values, ragged(rows, 3, 4), shape)
    torch.testing.assert_close(actual[:total], expected[:total], atol=3e-6, rtol=1e-5)
    assert not actual[total:].any()


def test_slots_of_positions_before_tokens() -> None:
    rows = make_rows([(1, 17), (4, 4), (0, 0), (9, 40)], 5)
    batch = ragged(rows, 3)
    wanted = [
        row.table[p // BLOCK] * BLOCK + p % BLOCK if p >= 0 else -1
        for row in rows
        for p in range(row.context - row.length - 1, row.context - 1)
    ]
    assert slots_of(batch, batch.positions - 1)[: len(wanted)].tolist() == wanted


def test_half_precision_and_a_group_of_one_head() -> None:
    rows = make_rows([(1, 17), (2, 9), (0, 0), (9, 40)], 5)
    torch.manual_seed(3)
    query = torch.randn(12, 2, 32, dtype=torch.float16, device=DEVICE)
    caches = [torch.randn(NUM_BLOCKS * BLOCK, 2, 32, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    actual = launch(query, *caches, ragged(rows, 0), AttentionShape(0.2))
    expected = reference(query, *caches, rows, BLOCK, AttentionShape(0.2))
    torch.testing.assert_close(actual, expected, atol=4e-3, rtol=4e-3)


def test_rows_that_see_all_of_themselves() -> None:
    """A drafter's block: every query sees the context and the whole block; a window limits only what lies before."""
    rows = make_rows([(4, 30), (4, 5), (4, 4)], 7)
    query, keys, values = tensors(12, torch.float32)
    whole = [AttentionRow(r.start, r.length, r.context, r.table, torch.ones(4, 4, dtype=torch.bool)) for r in rows]
    actual = launch(query, keys, values, ragged(rows, 0, 4, sees_all=True), AttentionShape(0.3))
    torch.testing.assert_close(actual, reference(query, keys, values, whole, BLOCK, AttentionShape(0.3)), atol=3e-6, rtol=1e-5)
    windowed = launch(query, keys, values, ragged(rows, 0, 4, sees_all=True), AttentionShape(0.3, 3))
    first = windowed[0, 0]
    slots = [rows[0].table[p // BLOCK] * BLOCK + p % BLOCK for p in range(24, 30)]  # query 26 sees 24 .. 29
    scores = keys[slots, 0].double() @ query[0, 0].double() * 0.3
    torch.testing.assert_close(first, (scores.softmax(0) @ values[slots, 0].double()).float(), atol=3e-6, rtol=1e-5)


def test_tilings_fit_their_problem() -> None:
    for tokens, rows, longest in [(1, 2, 1), (64, 65, 1), (256, 257, 8), (512, 257, 512)]:
        for heads, kv_heads in [(9, 3), (32, 8), (64, 1), (4, 4)]:
            cut = tiling(tokens, rows, longest, heads, kv_heads, 64, 132)
            assert cut.tokens >= 1
            assert cut.tokens * (heads // kv_heads) <= cut.rows
    assert tiling(1, 2, 1, 9, 3, 64, 132).splits > 1, "one row alone must not leave the device idle"
    assert tiling(256, 257, 1, 9, 3, 64, 132).splits == 1


@pytest.mark.parametrize("store", [kv_store.launch, kv_store.store_kv])
def test_store_writes_its_slots_and_no_others(store: object) -> None:
    torch.manual_seed(0)
    heads = torch.randn(5, 7, 16, device=DEVICE)
    caches = [torch.full((20, 3, 16), float("nan"), device=DEVICE) for _ in range(2)]
    slots = torch.tensor([4, -1, 19, 0, -1], device=DEVICE)
    store(heads[:, 1:4], heads[:, 4:], *caches, slots)  # type: ignore[operator]
    for cache, source in zip(caches, (heads[:, 1:4], heads[:, 4:]), strict=True):
        assert torch.equal(cache[[4, 19, 0]], source[[0, 2, 3]])
        assert bool(cache[[i for i in range(20) if i not in (4, 19, 0)]].isnan().all())


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("rotate_store", [kv_store.launch_rotating, kv_store.rotate_and_store])
def test_rotating_and_storing_at_once(with_norms: bool, rotate_store: Any) -> None:
    """Queries come back turned; keys turned and values as they are lie in their slots."""
    torch.manual_seed(0)
    heads, angles = torch.randn(5, 4 + 2 * 3, 12, device=DEVICE), torch.randn(5, 12, device=DEVICE)
    norms = HeadNorms(torch.rand(12, device=DEVICE), torch.rand(12, device=DEVICE), 1e-5) if with_norms else None
    caches = [torch.full((20, 3, 12), float("nan"), device=DEVICE) for _ in range(2)]
    slots = torch.tensor([4, -1, 19, 0, -1], dtype=torch.int32, device=DEVICE)
    new = kv_store.Projected(heads, angles.cos(), angles.sin(), 4, 3, norms)
    query = rotate_store(new, *caches, slots)
    turned = rotary.reference(heads, angles.cos(), angles.sin(), 4, 3, norms)
    torch.testing.assert_close(query, turned[:, :4], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(caches[0][[4, 19, 0]], turned[[0, 2, 3], 4:], atol=1e-6, rtol=1e-5)
    assert torch.equal(caches[1][[4, 19, 0]], heads[[0, 2, 3], 7:])
    for cache in caches:
        assert bool(cache[[i for i in range(20) if i not in (4, 19, 0)]].isnan().all())
