# mypy: ignore-errors
"""Triton code of ``edit_logits``; imported when a kernel is first launched, never before."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_and_mask(
    out,
    requests,
    positions,
    bias_starts,
    bias_ids,
    bias_values,
    stop_starts,
    stop_ids,
    stops_from,
    out_row,
    BLOCK: tl.constexpr,
):
    """A program a row. What is masked stays masked: penalties come behind it and leave -inf alone."""
    row = tl.program_id(0).to(tl.int64)
    request = tl.load(requests + row)
    if request >= 0:
        begin, end = tl.load(bias_starts + request), tl.load(bias_starts + request + 1)
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            place = out + row * out_row + tl.load(bias_ids + at, mask=at < end, other=0)
            value = tl.load(place, mask=at < end, other=0.0) + tl.load(bias_values + at, mask=at < end, other=0.0)
            tl.store(place, value, mask=at < end)
        if tl.load(positions + row) < tl.load(stops_from + request):
            tl.debug_barrier()  # a token may be in both lists
            begin, end = tl.load(stop_starts + request), tl.load(stop_starts + request + 1)
            for first in range(begin, end, BLOCK):
                at = first + tl.arange(0, BLOCK)
                place = out + row * out_row + tl.load(stop_ids + at, mask=at < end, other=0)
                tl.store(place, tl.full([BLOCK], float("-inf"), tl.float32), mask=at < end)


@triton.jit
def penalise(
    out,
    requests,
    depths,
    drafts,
    places,
    repetitions,
    presences,
    frequencies,
    counts,
    size,
    out_row,
    drafts_row,
    BLOCK: tl.constexpr,
):
    """A program for BLOCK ids of a row."""
    row = tl.program_id(0).to(tl.int64)
    request = tl.load(requests + row).to(tl.int64)
    if request >= 0:
        place = tl.load(places + request).to(tl.int64)
        if place >= 0:
            ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            inside = ids < size
            seen = tl.load(counts + place * size + ids, mask=inside, other=0)
            number = seen >> 1
            for j in range(tl.load(depths + row)):
                number += (ids == tl.load(drafts + request * drafts_row + j)).to(tl.int32)
            values = tl.load(out + row * out_row + ids, mask=inside, other=0.0)
            repetition = tl.load(repetitions + request)
            repeated = tl.where(values > 0, tl.div_rn(values, repetition + tl.zeros_like(values)), values * repetition)
            is_output = number > 0
            values = tl.where(is_output | ((seen & 1) != 0), repeated, values)
            less = number.to(tl.float32) * tl.load(frequencies + request)
            less += tl.where(is_output, tl.load(presences + request), 0.0)
            tl.store(out + row * out_row + ids, values - less, mask=inside)


@triton.jit
def count_tokens(tokens, accepted, judged, places, counts, size, tokens_row):
    """A program a request."""
    request = tl.program_id(0).to(tl.int64)
    place = tl.load(places + request).to(tl.int64)
    if (place >= 0) & (tl.load(judged + request) >= 0):
        for j in range(tl.load(accepted + request) + 1):
            tl.atomic_add(counts + place * size + tl.load(tokens + request * tokens_row + j), 2, sem="relaxed")
