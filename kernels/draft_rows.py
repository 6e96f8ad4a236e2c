"""What a drafted block needs before and behind its forward, each in one launch: for one stream a round has few tokens and many launches.

::

    own, matched  [N]         what the target's last step left: its best token at every row; whether the token behind a row equals it
    first_rows, drafted [R]   a request's row of the step behind its known tokens, and how many drafts were verified behind that
    bases         [R] int64   known tokens before the step, where its own token sits if no draft stands; 0: padding
    anchors, positions [R] int64   x_0 of each block and where it sits; position 0: padding
    places, slots [R, P]      positions from the anchor on, and where their KV goes; -1 for padding
    block_places, block_slots [R * S]   the same of a block's own S inputs, contiguous; contexts [R] int32: what its tokens see
    outcome       [R, 3 * γ + 2] fp64   tokens, confidences, margins, anchor and position: one copy to the host
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepEnd:
    """Where blocks that follow a step of the target, at most ``depth`` drafts of which were verified a row, find their anchors."""

    own: Tensor
    matched: Tensor
    first_rows: Tensor
    drafted: Tensor
    depth: int


@dataclass(frozen=True, slots=True)
class Paging:
    """Block tables of all rows, those of row r from ``table_starts[r]`` on; P positions of a row, S inputs of a block."""

    table_starts: Tensor
    tables: Tensor
    block_size: int
    num_places: int
    num_inputs: int


@dataclass(frozen=True, slots=True)
class BlockStart:
    """Where blocks begin; shapes in the module's docstring."""

    anchors: Tensor
    positions: Tensor
    places: Tensor
    slots: Tensor
    block_places: Tensor
    block_slots: Tensor
    contexts: Tensor


def begin_after(step: StepEnd, bases: Tensor, paging: Paging) -> BlockStart:
    """Blocks behind the drafts that the step accepted: anchor and position come from what it left on the device."""
    if bases.is_cuda:
        return launch_begin(step.own, bases, paging, step)
    return reference_after(step, bases, paging)


def reference_after(step: StepEnd, bases: Tensor, paging: Paging) -> BlockStart:
    """``begin_after`` in plain torch."""
    depths = torch.arange(step.depth, device=bases.device)
    at = (step.first_rows.unsqueeze(1) + depths).clamp(max=step.own.shape[0] - 1)
    stands = step.matched[at] & (depths < step.drafted.unsqueeze(1))
    accepted = stands.long().cumprod(1).sum(1)
    anchors = step.own.index_select(0, step.first_rows + accepted)
    return reference_begin(anchors, torch.where(bases > 0, bases + accepted, 0), paging)


def begin(anchors: Tensor, positions: Tensor, paging: Paging) -> BlockStart:
    """Blocks behind anchors that are known."""
    if anchors.is_cuda:
        return launch_begin(anchors, positions, paging, None)
    return reference_begin(anchors, positions, paging)


def reference_begin(anchors: Tensor, positions: Tensor, paging: Paging) -> BlockStart:
    """``begin`` in plain torch."""
    size, count = paging.block_size, paging.num_inputs
    places = positions.unsqueeze(1) + torch.arange(paging.num_places, device=positions.device)
    rows = (paging.table_starts.unsqueeze(1) + places // size).flatten()
    is_real = positions > 0
    slots = torch.where(is_real.unsqueeze(1), paging.tables.index_select(0, rows).view_as(places) * size + places % size, -1)
    contexts = torch.where(is_real, positions + count, 0).to(torch.int32)
    return BlockStart(anchors, positions, places, slots, places[:, :count].flatten(), slots[:, :count].flatten(), contexts)


def launch_begin(anchors: Tensor, positions: Tensor, paging: Paging, step: StepEnd | None) -> BlockStart:
    """``begin`` by the Triton kernel, or ``begin_after`` with ``step``: then ``anchors`` is not read and ``positions`` are bases."""
    from dspark.kernels import draft_rows_triton as code
    from dspark.kernels.ragged_attention import power_of_2

    num_rows, device = positions.shape[0], positions.device
    places, slots = (torch.empty(num_rows, paging.num_places, dtype=torch.int64, device=device) for _ in range(2))
    block_places, block_slots = (torch.empty(num_rows * paging.num_inputs, dtype=torch.int64, device=device) for _ in range(2))
    if step is not None:
        found_anchors, found_positions = torch.empty_like(positions), torch.empty_like(positions)
    else:
        found_anchors, found_positions = anchors, positions
    contexts = torch.empty(num_rows, dtype=torch.int32, device=device)
    found = BlockStart(found_anchors, found_positions, places, slots, block_places, block_slots, contexts)
    code.begin[(num_rows,)](
        anchors if step is None else step.own,
        positions,
        positions if step is None else step.matched,
        positions if step is None else step.first_rows,
        positions if step is None else step.drafted,
        paging.table_starts,
        paging.tables,
        found.anchors,
        found.positions,
        found.places,
        found.slots,
        found.block_places,
        found.block_slots,
        found.contexts,
        HAS_STEP=step is not None,
        BLOCK_SIZE=paging.block_size,
        NUM_PLACES=paging.num_places,
        NUM_INPUTS=paging.num_inputs,
        DEPTH_BLOCK=1 if step is None else power_of_2(step.depth + 1),
        PLACES_BLOCK=power_of_2(paging.num_places),
        num_warps=1,
    )
    return found


def pack(tokens: Tensor, confidence: Tensor, margin: Tensor, anchors: Tensor, positions: Tensor) -> Tensor:
    """``outcome`` of tokens, confidence and margin [R, γ], anchors and positions [R]."""
    if tokens.is_cuda:
        return launch_pack(tokens, confidence, margin, anchors, positions)
    return reference_pack(tokens, confidence, margin, anchors, positions)


def reference_pack(tokens: Tensor, confidence: Tensor, margin: Tensor, anchors: Tensor, positions: Tensor) -> Tensor:
    """``pack`` in plain torch."""
    numbers = (tokens, confidence, margin, anchors.unsqueeze(1), positions.unsqueeze(1))
    return torch.cat([part.to(torch.float64) for part in numbers], dim=1)


def launch_pack(tokens: Tensor, confidence: Tensor, margin: Tensor, anchors: Tensor, positions: Tensor) -> Tensor:
    """``pack`` by the Triton kernel."""
    from dspark.kernels import draft_rows_triton as code
    from dspark.kernels.ragged_attention import power_of_2

    num_rows, length = tokens.shape
    assert all(part.is_contiguous() for part in (tokens, confidence, margin))
    outcome = torch.empty(num_rows, 3 * length + 2, dtype=torch.float64, device=tokens.device)
    code.pack[(num_rows,)](tokens, confidence, margin, anchors, positions, outcome, LENGTH=length, BLOCK=power_of_2(length), num_warps=1)
    return outcome


@dataclass(frozen=True, slots=True)
class StepRows:
    """Fields of a target's step on the device, which rows of as many tokens each begin: ids, positions [T] int64, slots, contexts int32."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    contexts: Tensor


def place_drafts(step: StepRows, start: tuple[Tensor, Tensor, Tensor, Tensor], num_rows: int, row_tokens: int) -> None:
    """Put ``start`` (anchors [R], drafts [R, γ], places and slots [R, P]) into a step of R rows: an anchor, ``row_tokens - 1`` drafts."""
    anchors, tokens, places, slots = start
    if anchors.is_cuda:
        launch_place(step, start, num_rows, row_tokens)
        return
    count = num_rows * row_tokens
    ids = step.ids[:count].view(num_rows, row_tokens)
    ids[:, 0].copy_(anchors[:num_rows])
    ids[:, 1:].copy_(tokens[:num_rows, : row_tokens - 1])
    step.positions[:count].view(num_rows, row_tokens).copy_(places[:num_rows, :row_tokens])
    step.slots[:count].view(num_rows, row_tokens).copy_(slots[:num_rows, :row_tokens])
    step.contexts[:num_rows].copy_(places[:num_rows, 0] + row_tokens)


def launch_place(step: StepRows, start: tuple[Tensor, Tensor, Tensor, Tensor], num_rows: int, row_tokens: int) -> None:
    """``place_drafts`` by the Triton kernel."""
    from dspark.kernels import draft_rows_triton as code
    from dspark.kernels.ragged_attention import power_of_2

    anchors, tokens, places, slots = start
    assert row_tokens <= min(tokens.shape[1] + 1, places.shape[1])
    code.place[(num_rows,)](
        step.ids,
        step.positions,
        step.slots,
        step.contexts,
        anchors,
        tokens,
        places,
        slots,
        row_tokens,
        LENGTH=tokens.shape[1],
        NUM_PLACES=places.shape[1],
        BLOCK=power_of_2(places.shape[1]),
        num_warps=1,
    )
