"""What a drafted block needs around its forward, in Triton's interpreter where there is no GPU, against plain torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.triton_interpreter import mend_interpreter
from torch import Tensor

from dspark.kernels import draft_rows
from dspark.kernels.draft_rows import Paging, StepEnd, StepRows

pytest.importorskip("triton")
mend_interpreter()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEPTH, NUM_ROWS = 5, 6


def whole(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def paging(num_inputs: int) -> Paging:
    """Blocks of 4 tokens; the last row is padding."""
    tables = torch.randperm(60, generator=torch.Generator().manual_seed(0)).to(torch.int32).to(DEVICE)
    return Paging(torch.arange(0, 10 * NUM_ROWS, 10, dtype=torch.int32, device=DEVICE), tables, 4, max(num_inputs, DEPTH + 1), num_inputs)


def assert_same(found: object, wanted: object) -> None:
    for field in dataclasses.fields(wanted):  # type: ignore[arg-type]
        ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
        assert ours.dtype == theirs.dtype, field.name
        real = slice(None) if field.name not in ("places", "block_places") else slice(0, ours.shape[0] * (NUM_ROWS - 1) // NUM_ROWS)
        assert torch.equal(ours[real], theirs[real]), field.name


@pytest.mark.parametrize("num_inputs", [DEPTH, DEPTH + 1])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_begin_behind_what_a_step_accepted(num_inputs: int, seed: int) -> None:
    torch.manual_seed(seed)
    count = 6 * NUM_ROWS
    own, matched = torch.randint(0, 99, (count,), device=DEVICE), torch.rand(count, device=DEVICE) < 0.7
    drafted = whole(DEPTH, 0, 1, DEPTH, 3, 0)
    first_rows = torch.cumsum(drafted + 1, 0) - drafted - 1
    step = StepEnd(own, matched, first_rows, drafted, DEPTH)
    bases, pages = whole(3, 7, 20, 1, 15, 0), paging(num_inputs)
    wanted = draft_rows.reference_after(
        StepEnd(own.cpu(), matched.cpu(), first_rows.cpu(), drafted.cpu(), DEPTH), bases.cpu(), on_cpu(pages)
    )
    found = draft_rows.launch_begin(own, bases, pages, step)
    assert_same(
        *(dataclasses.replace(one, **{f.name: getattr(one, f.name).cpu() for f in dataclasses.fields(one)}) for one in (found, wanted))
    )
    assert (found.slots[-1] == -1).all(), "padding goes nowhere"
    assert int(found.positions[1]) == 7, "a request without drafts has its own token next"


def on_cpu(pages: Paging) -> Paging:
    return dataclasses.replace(pages, table_starts=pages.table_starts.cpu(), tables=pages.tables.cpu())


def test_blocks_begin_behind_known_anchors() -> None:
    anchors, positions, pages = whole(5, 6, 7, 8, 9, 0), whole(3, 4, 30, 11, 16, 0), paging(DEPTH)
    wanted = draft_rows.reference_begin(anchors.cpu(), positions.cpu(), on_cpu(pages))
    found = draft_rows.launch_begin(anchors, positions, pages, None)
    assert_same(
        *(dataclasses.replace(one, **{f.name: getattr(one, f.name).cpu() for f in dataclasses.fields(one)}) for one in (found, wanted))
    )


def test_the_outcome_is_one_tensor() -> None:
    tokens = torch.randint(0, 50000, (3, 7), device=DEVICE)
    confidence, margin = torch.rand(3, 7, device=DEVICE), torch.randn(3, 7, device=DEVICE)
    args = (tokens, confidence, margin, whole(1, 2, 3), whole(10, 20, 0))
    assert torch.equal(draft_rows.launch_pack(*args).cpu(), draft_rows.reference_pack(*(arg.cpu() for arg in args)))


@pytest.mark.parametrize("row_tokens", [2, 5, DEPTH + 1])
def test_drafts_go_into_the_rows_of_a_step(row_tokens: int) -> None:
    torch.manual_seed(1)
    start = (
        torch.randint(0, 99, (4,), device=DEVICE),
        torch.randint(0, 99, (4, DEPTH), device=DEVICE),
        torch.randint(0, 99, (4, DEPTH + 2), device=DEVICE),
        torch.randint(0, 99, (4, DEPTH + 2), device=DEVICE),
    )
    steps = [
        StepRows(*(torch.full((30,), -7, dtype=dtype, device=device) for dtype in (torch.int64, torch.int64, torch.int32, torch.int32)))
        for device in (DEVICE, torch.device("cpu"))
    ]
    draft_rows.launch_place(steps[0], start, 3, row_tokens)
    anchors, tokens, places, slots = (part.cpu() for part in start)
    draft_rows.place_drafts(steps[1], (anchors, tokens, places, slots), 3, row_tokens)
    for field in dataclasses.fields(StepRows):
        assert torch.equal(getattr(steps[0], field.name).cpu(), getattr(steps[1], field.name)), field.name
