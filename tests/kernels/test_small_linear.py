"""Linear layers for few rows against plain torch, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from helpers.triton_interpreter import mend_interpreter

from dspark.kernels.small_linear import FEW_ROWS, FEW_ROWS_WIDTH, MAX_ROWS, launch, reference, small_linear

pytest.importorskip("triton")
mend_interpreter()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1, MAX_ROWS])
@pytest.mark.parametrize(("with_norm", "with_bias", "with_residual"), [(False, False, True), (True, True, False), (True, False, True)])
def test_equals_torch(rows: int, with_norm: bool, with_bias: bool, with_residual: bool) -> None:
    torch.manual_seed(rows)
    wide = torch.randn(rows, 200, device=DEVICE)
    x, weight = wide[:, :150], torch.randn(37, 150, device=DEVICE)
    bias = torch.randn(37, device=DEVICE) if with_bias else None
    norm = (torch.rand(150, device=DEVICE) + 0.5, 1e-5) if with_norm else None
    residual = torch.randn(rows, 64, device=DEVICE)[:, :37] if with_residual else None
    expected = reference(x, weight, bias, norm, residual)
    torch.testing.assert_close(launch(x, weight, bias, norm, residual), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(small_linear(x, weight, bias, norm, residual), expected, atol=2e-5, rtol=2e-5)


def test_gates() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 130, device=DEVICE), torch.randn(2 * 40, 130, device=DEVICE)
    norm = (torch.rand(130, device=DEVICE), 1e-6)
    torch.testing.assert_close(
        launch(x, weight, norm=norm, is_gated=True), reference(x, weight, norm=norm, is_gated=True), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("width", [20, FEW_ROWS_WIDTH + 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_narrow_and_wide_weights(rows: int, width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width, device=DEVICE), torch.randn(9, width, device=DEVICE)
    torch.testing.assert_close(launch(x, weight), reference(x, weight), atol=2e-4, rtol=2e-5)


def test_half_precision() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, dtype=torch.float16, device=DEVICE) for shape in ((4, 256), (48, 256)))
    norm = (torch.ones(256, dtype=torch.float16, device=DEVICE), 1e-5)
    exact = reference(x.double(), weight.double(), norm=(norm[0].double(), 1e-5))
    torch.testing.assert_close(launch(x, weight, norm=norm).double(), exact, atol=3e-2, rtol=3e-3)
