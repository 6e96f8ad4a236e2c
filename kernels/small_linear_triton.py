# mypy: ignore-errors
"""Triton code of ``small_linear``; imported when it is first launched."""

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.chain_triton import begin_early, wait_for_earlier


@triton.jit(do_not_specialize=["num_rows"])
def multiply_at_once(
    x,
    weight,
    bias,
    norm,
    residual,
    out,
    num_rows,
    eps,
    x_row,
    residual_row,
    WIDTH: tl.constexpr,  # columns of x
    COLUMNS: tl.constexpr,  # columns of out
    TILE_COLUMNS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,  # the power of two that holds WIDTH
    TILE_ROWS: tl.constexpr,  # 1, or what a matrix product takes
    SHARES: tl.constexpr,  # of WIDTH, which the warps multiply by themselves
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """A program has its whole tile of weights on the way to its registers before it waits for x."""
    begin_early(IS_CHAINED)
    columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_column = columns < COLUMNS
    places = tl.arange(0, TILE_WIDTH)
    inside = places < WIDTH
    at = weight + columns[:, None].to(tl.int64) * WIDTH + places[None, :]
    is_weight = is_column[:, None] & inside[None, :]
    w = tl.load(at, mask=is_weight, other=0.0)
    if IS_GATED:
        up = tl.load(at + COLUMNS * WIDTH, mask=is_weight, other=0.0)
    if HAS_NORM:
        scale = tl.load(norm + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    wait_for_earlier(IS_CHAINED)
    rows = tl.arange(0, TILE_ROWS)
    is_row = rows < num_rows
    is_out = is_column[:, None] & is_row[None, :]
    if HAS_RESIDUAL:
        added = tl.load(residual + rows[None, :] * residual_row + columns[:, None], mask=is_out, other=0.0).to(tl.float32)
    part = tl.load(x + rows[:, None] * x_row + places[None, :], mask=is_row[:, None] & inside[None, :], other=0.0)
    if HAS_NORM:
        exact = part.to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(exact * exact, 1) / WIDTH + eps)
        part = (exact * scale[None, :]).to(part.dtype)
    product = _of_rows(w, part, TILE_ROWS, SHARES)
    if HAS_NORM:
        product = product * factor[None, :]
    if HAS_BIAS:
        product += offset[:, None]
    if IS_GATED:
        other = _of_rows(up, part, TILE_ROWS, SHARES)
        if HAS_NORM:
            other = other * factor[None, :]
        product = product / (1.0 + tl.exp(-product)) * other
    if HAS_RESIDUAL:
        product += added
    tl.store(out + rows[None, :] * COLUMNS + columns[:, None], product.to(out.dtype.element_ty), mask=is_out)


@triton.jit
def _of_rows(weight, part, TILE_ROWS: tl.constexpr, SHARES: tl.constexpr):
    """weight [C, K] times part [R, K] transposed: [C, R] in fp32. One row needs no matrix unit, nor the way there."""
    if TILE_ROWS == 1:
        product = tl.sum(weight.to(tl.float32) * part.to(tl.float32), 1)[:, None]
    else:
        columns: tl.constexpr = weight.shape[0]
        width: tl.constexpr = weight.shape[1]
        left = tl.permute(tl.reshape(weight, [columns, SHARES, width // SHARES]), [1, 0, 2])
        right = tl.permute(tl.reshape(part, [TILE_ROWS, SHARES, width // SHARES]), [1, 2, 0])
        product = tl.sum(tl.dot(left, right, input_precision="ieee"), 0)
    return product


@triton.jit(do_not_specialize=["num_rows"])
def multiply(
    x,
    weight,
    bias,
    norm,
    residual,
    out,
    num_rows,
    eps,
    x_row,
    residual_row,
    WIDTH: tl.constexpr,  # columns of x
    COLUMNS: tl.constexpr,  # columns of out
    TILE_COLUMNS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    """As many columns of x and the weight at a time as fit."""
    columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    rows = tl.arange(0, TILE_ROWS)
    is_column, is_row = columns < COLUMNS, rows < num_rows
    product = tl.zeros([TILE_COLUMNS, TILE_ROWS], tl.float32)
    other = tl.zeros([TILE_COLUMNS, TILE_ROWS], tl.float32)
    squares = tl.zeros([TILE_ROWS], tl.float32)
    for begin in range(0, WIDTH, TILE_WIDTH):
        places = begin + tl.arange(0, TILE_WIDTH)
        inside = places < WIDTH
        at = weight + columns[:, None].to(tl.int64) * WIDTH + places[None, :]
        is_weight = is_column[:, None] & inside[None, :]
        w = tl.load(at, mask=is_weight, other=0.0)
        part = tl.load(x + rows[None, :] * x_row + places[:, None], mask=inside[:, None] & is_row[None, :], other=0.0)
        if HAS_NORM:
            exact = part.to(tl.float32)
            squares += tl.sum(exact * exact, 0)
            scale = tl.load(norm + places, mask=inside, other=0.0).to(tl.float32)
            part = (exact * scale[:, None]).to(part.dtype)
        product = tl.dot(w, part, product, input_precision="ieee")
        if IS_GATED:
            up = tl.load(at + COLUMNS * WIDTH, mask=is_weight, other=0.0)
            other = tl.dot(up, part, other, input_precision="ieee")
    if HAS_NORM:
        factor = 1.0 / tl.sqrt(squares / WIDTH + eps)
        product = product * factor[None, :]
        other = other * factor[None, :]
    if HAS_BIAS:
        product += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
    if IS_GATED:
        product = product / (1.0 + tl.exp(-product)) * other
    is_out = is_column[:, None] & is_row[None, :]
    if HAS_RESIDUAL:
        product += tl.load(residual + rows[None, :] * residual_row + columns[:, None], mask=is_out, other=0.0).to(tl.float32)
    tl.store(out + rows[None, :] * COLUMNS + columns[:, None], product.to(out.dtype.element_ty), mask=is_out)
