"""The best of every group of columns: the kernel equals the reference, and the reference what its docstring says."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.kernel_checks import DEVICE, DTYPES, random

from dspark.kernels import group_best

pytest.importorskip("triton")


SHAPES = [(3, 1000, 64), (2, 1001, 100), (1, 70, 70), (5, 9000, 32), (0, 50, 8), (4, 513, 512)]


@pytest.mark.parametrize(("rows", "width", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(rows: int, width: int, groups: int, dtype: torch.dtype) -> None:
    values = random(rows, width, dtype=dtype, seed=width)
    found, wanted = (run(values, groups) for run in (group_best.launch, group_best.reference))
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(values.gather(1, found[1]), found[0])


def test_each_group_yields_its_first_largest() -> None:
    values = torch.zeros(1, 11, device=DEVICE)
    values[0, 7] = 2.0
    values[0, [5, 8]] = 1.0
    for run in (group_best.launch, group_best.reference):
        best, columns = run(values, 3)  # groups 0 3 6 9, 1 4 7 10, 2 5 8
        assert best.tolist() == [[0.0, 2.0, 1.0]]
        assert columns.tolist() == [[0, 7, 5]]


def test_impossible_tokens_never_leave_the_row() -> None:
    values = torch.full((2, 300), -math.inf, device=DEVICE)
    values[1, 299] = -4.0
    for run in (group_best.launch, group_best.reference):
        best, columns = run(values, 64)
        assert columns.min() >= 0
        assert columns.max() < 300
        assert best[1].max() == -4.0
        assert columns[1, best[1].argmax()] == 299
