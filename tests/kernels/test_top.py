"""The grouped argmax and top-k equal the plain ones, ties included."""

from __future__ import annotations

import pytest
import torch

from dspark.kernels.top import first_argmax, largest


@pytest.mark.parametrize("width", [1, 5, 300, 1024, 1500, 5120, 20_000, 49_152, 49_159])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_equal_the_plain_reductions(width: int, dtype: torch.dtype) -> None:
    values = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    values[1] = 1.0
    values[2, -1] = 50.0
    values[3, :] = torch.arange(width).to(dtype)
    wanted = torch.tensor([row.index(max(row)) for row in values.tolist()])
    assert torch.equal(first_argmax(values), wanted)
    for count in {1, min(20, width), min(80, width)}:
        found, columns = largest(values, count)
        assert torch.equal(found, values.topk(count, dim=-1).values)
        assert torch.equal(values.gather(1, columns), found)
        assert all(len(set(row)) == count for row in columns.tolist())
    assert torch.equal(first_argmax(values[2:]), wanted[2:])


def test_rows_of_a_wider_table_and_minus_infinity() -> None:
    table = torch.full((3, 4096), -torch.inf)
    table[1, 3000] = -1e30
    view = table[:, 1000:3500]
    assert first_argmax(view).tolist() == [0, 2000, 0]
    assert largest(view, 2)[1][1, 0] == 2000


@pytest.mark.parametrize("place", [0, 700, 1999, 2040])
def test_a_nan_is_found_wherever_it_is(place: int) -> None:
    values = torch.zeros(1, 2041)
    values[0, 900] = 3.0
    values[0, place] = torch.nan
    assert first_argmax(values).tolist() == [place]
