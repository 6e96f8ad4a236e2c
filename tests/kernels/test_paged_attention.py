"""Paged attention against its specification on random ragged batches."""

from __future__ import annotations

import pytest
import torch

from dspark.kernels.paged_attention import AttentionRow, AttentionShape, PagedBatch, paged_attention, reference

BLOCK = 4
CPU = torch.device("cpu")


def make_batch(lengths: list[tuple[int, int]], seed: int, with_tree: bool = False) -> tuple[list[AttentionRow], int]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(256, generator=generator).tolist()
    rows: list[AttentionRow] = []
    start = 0
    for i, (length, context) in enumerate(lengths):
        table = [blocks.pop() for _ in range(-(-context // BLOCK) + i % 2)]
        visible = None
        if with_tree and length > 2:
            visible = torch.zeros(length, length, dtype=torch.bool)
            for node in range(length):
                if node:
                    visible[node] = visible[int(torch.randint(0, node, (1,), generator=generator))]
                visible[node, node] = True
        rows.append(AttentionRow(start, length, context, table, visible))
        start += length
    return rows, start


@pytest.mark.parametrize("with_tree", [False, True])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("extra", ["none", "softcap", "sinks"])
def test_equals_the_specification(with_tree: bool, window: int | None, extra: str) -> None:
    lengths = [(1, 1), (1, 30), (5, 5), (3, 77), (20, 33), (1, 29), (4, 12), (7, 90)]
    rows, total = make_batch(lengths, 1, with_tree)
    torch.manual_seed(2)
    query, keys = torch.randn(total + 3, 6, 8), torch.randn(256 * BLOCK, 2, 8)
    values = torch.randn(256 * BLOCK, 2, 5 if extra == "sinks" else 8)
    sinks = torch.randn(6) if extra == "sinks" else None
    shape = AttentionShape(0.3, window, 5.0 if extra == "softcap" else None)
    actual = paged_attention(query, keys, values, PagedBatch.plan(rows, BLOCK, CPU), shape, sinks)
    expected = reference(query, keys, values, rows, BLOCK, shape, sinks)
    torch.testing.assert_close(actual[:total], expected[:total], atol=2e-6, rtol=1e-5)
    assert not actual[total:].any(), "padding rows come out as zero"


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_first_positions_that_nobody_sees(window: int | None, softcap: float | None) -> None:
    rows, total = make_batch([(1, 2), (1, 30), (3, 77), (1, 29), (4, 12)], 1)
    query, keys, values = torch.randn(total + 3, 6, 8), torch.randn(256 * BLOCK, 2, 8), torch.randn(256 * BLOCK, 2, 8)
    shape = AttentionShape(0.3, window, softcap, first=1)
    actual = paged_attention(query, keys, values, PagedBatch.plan(rows, BLOCK, CPU), shape)
    torch.testing.assert_close(actual[:total], reference(query, keys, values, rows, BLOCK, shape)[:total], atol=2e-6, rtol=1e-5)


def test_rows_are_grouped_but_stay_apart() -> None:
    rows, _ = make_batch([(1, 20), (1, 21), (2, 40), (40, 40)], 3)
    batch = PagedBatch.plan(rows, BLOCK, CPU)
    assert sorted(group.num_rows for group in batch.groups) == [1, 3]
    torch.manual_seed(0)
    query, keys, values = torch.randn(44, 2, 4), torch.randn(1024, 1, 4), torch.randn(1024, 1, 4)
    shape = AttentionShape(0.5)
    before = paged_attention(query, keys, values, batch, shape)
    for position in range(20):  # poison row 0's context: nobody else may see it
        slot = rows[0].table[position // BLOCK] * BLOCK + position % BLOCK
        keys[slot] = 1e4
        values[slot] = 1e4
    after = paged_attention(query, keys, values, batch, shape)
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


def test_empty_batch() -> None:
    out = paged_attention(
        torch.randn(2, 2, 4), torch.randn(8, 1, 4), torch.randn(8, 1, 4), PagedBatch.plan([], BLOCK, CPU), AttentionShape(1.0)
    )
    assert out.shape == (2, 2, 4)
    assert not out.any()
