"""What tests of kernels share: the device, the dtypes it can be trusted with, strided inputs, and the error that is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter computes products of bf16 wrongly, so bf16 is tested on GPUs.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
RELATIVE_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def strided(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random rows that lie in a wider table of NaN: whoever reads beyond them is found out."""
    table = torch.full((rows, columns + 6), torch.nan, dtype=dtype, device=DEVICE)
    view = table[:, 2 : columns + 2]
    view.copy_(random(rows, columns, dtype=dtype, seed=seed))
    return view


def assert_close_to_exact(found: Tensor, exact: Tensor) -> None:
    """The error of a result, relative to the fp64 result by their norms, is what its dtype allows; NaN is never close."""
    assert found.shape == exact.shape
    error = (found.double() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert exact.numel() == 0 or float(error) <= RELATIVE_ERROR[found.dtype], float(error)
