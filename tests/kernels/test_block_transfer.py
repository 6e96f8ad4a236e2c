"""KV blocks packed and unpacked: every byte arrives, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.kernel_checks import DEVICE, DTYPES, random
from torch import Tensor

from dspark.kernels import block_transfer

pytest.importorskip("triton")

BLOCK_SIZE, NUM_BLOCKS = 4, 9
SHAPES = [(2, 8), (2, 6), (1, 500), (3, 8)]  # heads and width of each pool


def make_pools(dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [random(NUM_BLOCKS * BLOCK_SIZE, *shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [[], [3], [7, -1, 0, 5], [-1]])
@pytest.mark.parametrize("run", ["launch", "reference"])
def test_blocks_move_from_one_store_to_another(dtype: torch.dtype, blocks: list[int], run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: Any = getattr(block_transfer, run)
    monkeypatch.setattr(block_transfer, "launch", chosen)
    monkeypatch.setattr(block_transfer, "reference", chosen)
    sources, targets = make_pools(dtype, 0), make_pools(dtype, 50)
    before = [pool.clone() for pool in (*sources, *targets)]
    packed = block_transfer.pack_blocks(sources, torch.tensor(blocks, dtype=torch.int64, device=DEVICE), BLOCK_SIZE)
    assert packed.shape == (len(blocks), BLOCK_SIZE * (16 + 12 + 500 + 24))
    places = [8 - i if block >= 0 else -1 for i, block in enumerate(blocks)]
    block_transfer.unpack_blocks(packed, targets, torch.tensor(places, dtype=torch.int64, device=DEVICE), BLOCK_SIZE)
    wanted = [pool.clone() for pool in before[len(sources) :]]
    for source, pool in zip(sources, wanted, strict=True):
        for block, place in zip(blocks, places, strict=True):
            if block >= 0:
                pool[place * BLOCK_SIZE : (place + 1) * BLOCK_SIZE] = source[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
    for found, pool in zip((*sources, *targets), (*before[: len(sources)], *wanted), strict=True):
        assert torch.equal(found, pool)
    for row, block in zip(packed, blocks, strict=True):
        assert block >= 0 or not row.any()
