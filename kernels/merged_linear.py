"""Fewer and larger matrix products: linear layers of one input merged, and a product added to a residual stream in one launch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def merge(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight [sum of outputs, inputs] and bias of linear layers that read the same input."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return weight, torch.cat(biases) if biases else None


def add_product(residual: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
    """residual [T, d] + linear(x [T, i]); on CUDA a plain layer adds in place, so ``residual`` must be the caller's own."""
    if x.is_cuda and type(linear) is nn.Linear and linear.bias is None:
        return residual.addmm_(x, linear.weight.t())
    out: Tensor = residual + linear(x)
    return out
