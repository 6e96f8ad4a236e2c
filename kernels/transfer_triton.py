"""Triton code of ``block_transfer``; imported when a kernel is first launched, never before."""

# mypy: ignore-errors
# (triton's decorator and the arguments of kernels have no types)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_blocks(pool, blocks, packed, size, begin, packed_row, PACKS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.load(blocks + row).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (place < size) & (block >= 0)
    held = pool + block * size + place
    sent = packed + row * packed_row + begin + place
    if PACKS:
        tl.store(sent, tl.load(held, mask=inside, other=0.0), mask=inside)
    else:
        tl.store(held, tl.load(sent, mask=inside, other=0.0), mask=inside)
