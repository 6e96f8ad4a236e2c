"""The gate of a gated MLP over one merged projection.

::

    gate_up  [T, 2 I]   gates, then ups; columns dense, any stride between rows
    out      [T, I]     silu(gate) * up
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return launch(gate_up) if gate_up.is_cuda else reference(gate_up)


def reference(gate_up: Tensor) -> Tensor:
    """``swiglu`` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def launch(gate_up: Tensor) -> Tensor:
    """``swiglu`` by the Triton kernel."""
    from triton import cdiv

    from dspark.kernels.layer_triton import gate

    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = gate_up.new_empty(num_rows, size)
    if num_rows:
        gate[(num_rows, cdiv(size, BLOCK))](gate_up, out, size, gate_up.stride(0), BLOCK=BLOCK)
    return out
