"""A linear layer for few rows, with what comes before and behind it in one launch: the weight is read once, and that is what it costs.

::

    x         [M, K]   M at most MAX_ROWS; columns dense
    weight    [N, K], bias [N] or None, contiguous; gated: [2 * N, K], gates before values
    norm      weight [K] and eps of an RMSNorm of x, or None
    residual  [M, N] that is added to the product, or None
    out       [M, N]   residual + (silu(gate) * value | product) of norm(x)

For one stream of a small model a step is a chain of launches, each of which takes longer to begin than to run: six a layer instead of
nine, and on Hopper a launch begins before the one before it has ended (``chain_triton.py``), with its weights on their way. For one row
of a large model the launch streams the weight as fast as the memory gives it. From ``MAX_ROWS`` rows on, libraries are better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.kernels.device import launches_early
from dspark.kernels.ragged_attention import power_of_2

MAX_ROWS = 16
FEW_ROWS = 8  # the least that a matrix unit takes at once; fewer cost the same
ONE_ROW_WIDTH, FEW_ROWS_WIDTH = 16384, 2048  # the widest weights of which a program holds whole rows
SHARES = 4  # of the width that the warps of a program multiply by themselves
LEAST_WIDTH = 16 * SHARES  # a matrix product takes no less


@dataclass(frozen=True, slots=True)
class Cut:
    """How the product is cut: columns of out, columns of x at a time, rows. ``is_at_once``: all columns of x."""

    columns: int
    width: int
    rows: int
    stages: int
    is_at_once: bool


def cut_for(rows: int, width: int, is_gated: bool) -> Cut:
    """The cut of a product of so many rows with weights of so many columns, as measured on an H200."""
    block = max(power_of_2(width), LEAST_WIDTH)
    if rows == 1 and block <= ONE_ROW_WIDTH:
        return Cut(4 if block <= FEW_ROWS_WIDTH else 2, block, 1, 1, is_at_once=True)
    most = FEW_ROWS if rows <= FEW_ROWS else MAX_ROWS
    if block <= FEW_ROWS_WIDTH:
        return Cut(16, block, most, 1, is_at_once=True)
    return Cut(16, 256, most, 3 if is_gated else 4, is_at_once=False)


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """The layer; on CUDA in one launch. Gated layers have neither bias nor residual."""
    run = launch if x.is_cuda else reference
    return run(x, weight, bias, norm, residual, is_gated)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """``small_linear`` in plain torch."""
    if norm is not None:
        x = F.rms_norm(x, norm[0].shape, norm[0], norm[1])
    product = F.linear(x, weight, bias)
    if is_gated:
        gate, value = product.chunk(2, dim=-1)
        return F.silu(gate) * value
    return product if residual is None else residual + product


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """``small_linear`` by the Triton kernel."""
    from dspark.kernels import small_linear_triton as code

    rows, width = x.shape
    columns = weight.shape[0] // (2 if is_gated else 1)
    assert rows <= MAX_ROWS
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert not is_gated or (bias is None and residual is None)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    cut = cut_for(rows, width, is_gated)
    kernel, options = code.multiply, {}
    if cut.is_at_once:
        is_chained = launches_early(x.device)
        options = {"SHARES": SHARES, "IS_CHAINED": is_chained, "launch_pdl": is_chained}
        kernel = code.multiply_at_once
    kernel[(-(-columns // cut.columns),)](
        x,
        weight,
        x if bias is None else bias,
        x if norm is None else norm[0],
        x if residual is None else residual,
        out,
        rows,
        0.0 if norm is None else norm[1],
        x.stride(0),
        0 if residual is None else residual.stride(0),
        WIDTH=width,
        COLUMNS=columns,
        TILE_COLUMNS=cut.columns,
        TILE_WIDTH=cut.width,
        TILE_ROWS=cut.rows,
        HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        IS_GATED=is_gated,
        num_warps=4,
        num_stages=cut.stages,
        **options,
    )
    return out
