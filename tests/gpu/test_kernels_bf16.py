"""The Triton attention in bf16 on a GPU against fp64, at the shapes of real models."""

from __future__ import annotations

import pytest
import torch

from dspark.kernels.kv_store import store_kv
from dspark.kernels.paged_attention import AttentionRow, AttentionShape
from dspark.kernels.ragged_attention import RaggedBatch, ragged_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BLOCK = 16
SHAPES = {"smollm2": (9, 3, 64), "qwen3-8b": (32, 8, 128), "one kv head": (8, 1, 96)}
BATCHES = {
    "one row": [(1, 700)],
    "decode": [(1, 20 + 13 * i) for i in range(32)],
    "verify": [(1 + i % 8, 100 + 31 * i) for i in range(16)],
    "prefill": [(200, 200), (130, 400), (1, 77)],
}


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("kind", BATCHES)
def test_attention_is_within_one_percent_of_fp64(model: str, kind: str) -> None:
    heads, kv_heads, dim = SHAPES[model]
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randperm(2048, generator=generator).tolist()
    rows, start = [], 0
    for length, context in BATCHES[kind]:
        rows.append(AttentionRow(start, length, context, [blocks.pop() for _ in range(-(-context // BLOCK))]))
        start += length
    torch.manual_seed(1)
    query = torch.randn(start + 5, heads, dim, device="cuda", dtype=torch.bfloat16)
    caches = [torch.randn(2048 * BLOCK, kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    batch = RaggedBatch.plan(rows, BLOCK, query.device, start + 5)
    shape = AttentionShape(dim**-0.5)
    actual = ragged_attention(query, *caches, batch, shape).cpu()
    assert not actual[start:].any()
    for row in rows:
        picked = slice(row.start, row.start + row.length)
        exact = _exact(query.cpu(), [c.cpu() for c in caches], row, shape)
        error = (actual[picked].double() - exact).norm() / exact.norm()
        assert error < 1e-2


def _exact(query: torch.Tensor, caches: list[torch.Tensor], row: AttentionRow, shape: AttentionShape) -> torch.Tensor:
    """One row in fp64."""
    slots = torch.tensor([row.table[p // BLOCK] * BLOCK + p % BLOCK for p in range(row.context)])
    group = query.shape[1] // caches[0].shape[1]
    q = query[row.start : row.start + row.length].double().transpose(0, 1)
    keys, values = (cache[slots].double().transpose(0, 1).repeat_interleave(group, dim=0) for cache in caches)
    scores = q @ keys.transpose(1, 2) * shape.scale
    seen = torch.arange(row.context) <= torch.arange(row.context - row.length, row.context).unsqueeze(1)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values).transpose(0, 1)


def test_store_in_bf16() -> None:
    heads = torch.randn(64, 7, 128, device="cuda", dtype=torch.bfloat16)
    caches = [torch.zeros(512, 3, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.randperm(512, device="cuda")[:64].to(torch.int32)
    slots[::5] = -1
    store_kv(heads[:, 1:4], heads[:, 4:], *caches, slots)
    kept = slots >= 0
    for cache, source in zip(caches, (heads[:, 1:4], heads[:, 4:]), strict=True):
        assert torch.equal(cache[slots[kept].long()], source[kept])
        assert int((cache.abs().amax((1, 2)) > 0).sum()) == int(kept.sum())
