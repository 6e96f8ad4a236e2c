# mypy: ignore-errors
"""Triton code of ``draft_rows``, a program for every row; imported when it is first launched."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin(
    own,  # without a step: anchors
    bases,
    matched,
    first_rows,
    drafted,
    table_starts,
    tables,
    anchors,
    positions,
    places,
    slots,
    block_places,
    block_slots,
    contexts,
    HAS_STEP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_PLACES: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    PLACES_BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    position = tl.load(bases + row)
    if HAS_STEP:
        first, count = tl.load(first_rows + row), tl.load(drafted + row)
        depth = tl.arange(0, DEPTH_BLOCK)
        stands = tl.load(matched + first + depth, mask=depth < count, other=0).to(tl.int32)
        accepted = tl.min(tl.where(stands != 0, DEPTH_BLOCK, depth), 0)
        tl.store(anchors + row, tl.load(own + first + accepted))
        position = tl.where(position > 0, position + accepted, 0)
        tl.store(positions + row, position)
    is_real = position > 0
    at = tl.arange(0, PLACES_BLOCK)
    inside = at < NUM_PLACES
    place = position + at
    block = tl.load(tables + tl.load(table_starts + row) + place // BLOCK_SIZE, mask=inside & is_real, other=0).to(tl.int64)
    slot = tl.where(is_real, block * BLOCK_SIZE + place % BLOCK_SIZE, -1)
    tl.store(places + row * NUM_PLACES + at, place, mask=inside)
    tl.store(slots + row * NUM_PLACES + at, slot, mask=inside)
    is_input = at < NUM_INPUTS
    tl.store(block_places + row * NUM_INPUTS + at, place, mask=is_input)
    tl.store(block_slots + row * NUM_INPUTS + at, slot, mask=is_input)
    tl.store(contexts + row, tl.where(is_real, position + NUM_INPUTS, 0).to(tl.int32))


@triton.jit
def pack(tokens, confidence, margin, anchors, positions, outcome, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < LENGTH
    target = outcome + row * (3 * LENGTH + 2)
    tl.store(target + at, tl.load(tokens + row * LENGTH + at, mask=inside, other=0).to(tl.float64), mask=inside)
    tl.store(target + LENGTH + at, tl.load(confidence + row * LENGTH + at, mask=inside, other=0.0).to(tl.float64), mask=inside)
    tl.store(target + 2 * LENGTH + at, tl.load(margin + row * LENGTH + at, mask=inside, other=0.0).to(tl.float64), mask=inside)
    tl.store(target + 3 * LENGTH, tl.load(anchors + row).to(tl.float64))
    tl.store(target + 3 * LENGTH + 1, tl.load(positions + row).to(tl.float64))


@triton.jit(do_not_specialize=["row_tokens"])
def place(
    ids,
    positions,
    slots,
    contexts,
    anchors,
    tokens,
    draft_places,
    draft_slots,
    row_tokens,
    LENGTH: tl.constexpr,
    NUM_PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < row_tokens
    token = tl.load(tokens + row * LENGTH + at - 1, mask=inside & (at > 0), other=0)
    token = tl.where(at == 0, tl.load(anchors + row), token)
    where = tl.load(draft_places + row * NUM_PLACES + at, mask=inside, other=0)
    target = row * row_tokens + at
    tl.store(ids + target, token, mask=inside)
    tl.store(positions + target, where, mask=inside)
    tl.store(slots + target, tl.load(draft_slots + row * NUM_PLACES + at, mask=inside, other=0).to(tl.int32), mask=inside)
    tl.store(contexts + row, (tl.load(draft_places + row * NUM_PLACES) + row_tokens).to(tl.int32))
