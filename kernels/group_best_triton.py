"""Triton code of ``group_best``; imported when the kernel is first launched, never before."""

# mypy: ignore-errors
# (triton's decorator and the arguments of kernels have no types)

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.chain_triton import begin_early, wait_for_earlier


@triton.jit
def best_of_groups(
    values,
    best,
    columns,
    WIDTH: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = group < NUM_GROUPS
    member = tl.arange(0, MEMBERS)
    top = tl.full((GROUPS,), -float("inf"), tl.float32)
    place = group
    begin_early(IS_CHAINED)
    wait_for_earlier(IS_CHAINED)
    for start in range(0, WIDTH, MEMBERS * NUM_GROUPS):
        column = start + member[:, None] * NUM_GROUPS + group[None, :]
        here = tl.load(values + row * WIDTH + column, mask=(column < WIDTH) & inside[None, :], other=-float("inf")).to(tl.float32)
        peak, which = tl.max(here, axis=0, return_indices=True)
        is_better = peak > top
        place = tl.where(is_better, start + which * NUM_GROUPS + group, place)
        top = tl.where(is_better, peak, top)
    tl.store(best + row * NUM_GROUPS + group, top.to(best.dtype.element_ty), mask=inside)
    tl.store(columns + row * NUM_GROUPS + group, place.to(tl.int64), mask=inside)
