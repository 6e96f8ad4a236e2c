"""KV blocks of all layers packed into one buffer for a transfer, and unpacked from it.

::

    pools    tensors [S, h, D] of each layer's keys and values, S = num_blocks * block_size slots, contiguous; h and D may differ
    blocks   [n] int64          block ids, each once; below 0: nothing is read or written there (padding)
    packed   [n, W]             a row a block: that block of the first pool, then of the second, …; W = block_size * sum of h * D

A row is all that one block id means, so that blocks can be sent, checked and freed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

BLOCK = 1024


def row_width(pools: Sequence[Tensor], block_size: int) -> int:
    """Elements of one packed block."""
    return sum(block_size * pool[0].numel() for pool in pools)


def pack_blocks(pools: Sequence[Tensor], blocks: Tensor, block_size: int) -> Tensor:
    """Gather blocks: packed [n, W]; rows of padding hold zeros."""
    packed = pools[0].new_zeros(blocks.shape[0], row_width(pools, block_size))
    (launch if packed.is_cuda else reference)(pools, blocks, block_size, packed, packs=True)
    return packed


def unpack_blocks(packed: Tensor, pools: Sequence[Tensor], blocks: Tensor, block_size: int) -> None:
    """Scatter packed [n, W] to the blocks of the pools."""
    (launch if packed.is_cuda else reference)(pools, blocks, block_size, packed, packs=False)


def reference(pools: Sequence[Tensor], blocks: Tensor, block_size: int, packed: Tensor, packs: bool) -> None:
    """Both directions in plain torch."""
    real = (blocks >= 0).nonzero().squeeze(1)
    at, begin = blocks[real], 0
    for pool in pools:
        rows = pool.view(pool.shape[0] // block_size, -1)
        end = begin + rows.shape[1]
        if packs:
            packed[real, begin:end] = rows.index_select(0, at)
        else:
            rows.index_copy_(0, at, packed[real, begin:end])
        begin = end


def launch(pools: Sequence[Tensor], blocks: Tensor, block_size: int, packed: Tensor, packs: bool) -> None:
    """Both directions by a Triton kernel: a launch for each pool, a program for every few elements of a block; nothing waits."""
    from triton import cdiv

    from dspark.kernels.transfer_triton import copy_blocks

    assert all(part.is_contiguous() and part.dtype == packed.dtype for part in (packed, *pools))
    begin = 0
    for pool in pools:
        size = block_size * pool[0].numel()
        if blocks.shape[0]:
            copy_blocks[(blocks.shape[0], cdiv(size, BLOCK))](pool, blocks, packed, size, begin, packed.stride(0), PACKS=packs, BLOCK=BLOCK)
        begin += size
