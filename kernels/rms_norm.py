"""RMSNorm, alone or of the sum that a residual stream becomes.

::

    x, residual   [T, d]   fp32, bf16 or fp16; columns dense, any stride between rows
    weight        [d]      offset 1.0: Gemma's gain, 1 + weight
    normed, total [T, d]   x / rms(x) * (weight + offset); total = x + residual, rounded to x's dtype before it is normed

Computed in fp32. Nothing is changed in place: a tap may still read the old residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The norm of every row."""
    return launch(x, None, weight, eps, offset)[0] if x.is_cuda else reference(x, None, weight, eps, offset)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(normed, total): the new residual stream, and its norm."""
    return launch(x, residual, weight, eps, offset) if x.is_cuda else reference(x, residual, weight, eps, offset)


def reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(normed, total) in plain torch; without ``residual`` the total is x itself."""
    total = x if residual is None else x + residual
    if offset == 0.0:
        return F.rms_norm(total, weight.shape, weight, eps), total
    exact = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(total.to(exact), weight.shape, weight.to(exact) + offset, eps).to(x.dtype), total


def launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(normed, total) by the Triton kernel, one program a row; as ``reference``."""
    from triton import next_power_of_2

    from dspark.kernels.layer_triton import normalise

    num_rows, size = x.shape
    assert all(part.stride(1) == 1 for part in (x, residual) if part is not None)
    normed = x.new_empty(num_rows, size)
    total = x if residual is None else x.new_empty(num_rows, size)
    if num_rows:
        block = next_power_of_2(size)
        other = x if residual is None else residual
        normalise[(num_rows,)](
            x,
            other,
            weight,
            normed,
            total,
            size,
            x.stride(0),
            other.stride(0),
            eps,
            offset,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )
    return normed, total
