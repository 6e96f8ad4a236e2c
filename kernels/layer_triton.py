"""Triton code of ``rms_norm``, ``rotary``, ``swiglu``, ``tap_projection`` and ``step_end``; imported when a kernel is first launched.

Sums and products are taken in fp32 and rounded once, when a result is stored.
"""

# mypy: ignore-errors
# (triton's decorator and the arguments of kernels have no types)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise(x, residual, weight, normed, total, size, x_row, residual_row, eps, offset, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < size
    values = tl.load(x + row * x_row + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * residual_row + place, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * size + place, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / size + eps)
    gain = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(normed + row * size + place, (values * scale * gain).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    heads,
    cos,
    sin,
    query_weight,
    key_weight,
    out,
    heads_row,
    cos_row,
    sin_row,
    eps,
    QUERY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """HEAD_BLOCK heads of one token; HALF of BLOCK columns are real, and a head's second half is a tile of its own."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (place < HALF)
    source = heads + token * heads_row + head * 2 * HALF + place
    left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(left * left + right * right, axis=1) / (2 * HALF)
        scale = (1.0 / tl.sqrt_rn(squares + eps))[:, None]
        is_query = inside & (head < QUERY_HEADS)
        is_key = inside & (head >= QUERY_HEADS)
        place_of = place + head * 0
        query_left = tl.load(query_weight + place_of, mask=is_query, other=0.0).to(tl.float32)
        query_right = tl.load(query_weight + HALF + place_of, mask=is_query, other=0.0).to(tl.float32)
        key_left = tl.load(key_weight + place_of, mask=is_key, other=0.0).to(tl.float32)
        key_right = tl.load(key_weight + HALF + place_of, mask=is_key, other=0.0).to(tl.float32)
        left = left * scale * (query_left + key_left)
        right = right * scale * (query_right + key_right)
    turns = place < HALF
    cos_left = tl.load(cos + token * cos_row + place, mask=turns, other=0.0).to(tl.float32)
    cos_right = tl.load(cos + token * cos_row + HALF + place, mask=turns, other=0.0).to(tl.float32)
    sin_left = tl.load(sin + token * sin_row + place, mask=turns, other=0.0).to(tl.float32)
    sin_right = tl.load(sin + token * sin_row + HALF + place, mask=turns, other=0.0).to(tl.float32)
    target = out + (token * HEADS + head) * 2 * HALF + place
    tl.store(target, (left * cos_left - right * sin_left).to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (right * cos_right + left * sin_right).to(out.dtype.element_ty), mask=inside)


@triton.jit
def angles(positions, frequencies, cos, sin, scale, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Cosine and sine of a token's angles, both halves of a head alike."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + place, mask=inside, other=0.0)
    turned = (tl.cos(angle) * scale).to(cos.dtype.element_ty)
    tl.store(cos + token * 2 * HALF + place, turned, mask=inside)
    tl.store(cos + token * 2 * HALF + HALF + place, turned, mask=inside)
    turned = (tl.sin(angle) * scale).to(cos.dtype.element_ty)
    tl.store(sin + token * 2 * HALF + place, turned, mask=inside)
    tl.store(sin + token * 2 * HALF + HALF + place, turned, mask=inside)


@triton.jit
def note_best(best, ids, wanted, own, matched, num_wanted, num_tokens, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_wanted
    token = tl.load(best + place, mask=inside, other=0)
    behind = tl.minimum(tl.load(wanted + place, mask=inside, other=0) + 1, num_tokens - 1)
    tl.store(own + place, token, mask=inside)
    tl.store(matched + place, token == tl.load(ids + behind, mask=inside, other=-1), mask=inside)


@triton.jit
def note_chains(tokens, accepted, first_rows, counts, own, matched, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = (place < LENGTH) & (place <= tl.load(counts + r))
    row = tl.load(first_rows + r).to(tl.int64) + place
    tl.store(own + row, tl.load(tokens + r * LENGTH + place, mask=inside, other=0), mask=inside)
    tl.store(matched + row, place < tl.load(accepted + r), mask=inside)


@triton.jit
def gate(gate_up, out, size, gate_up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    gates = tl.load(gate_up + row * gate_up_row + place, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(gate_up + row * gate_up_row + size + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + place, (gates * tl.sigmoid(gates) * ups).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gather_taps(taps, rows, out, size, tap_row, NUM_TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """One chosen row of every tap, one after the other; zeros for a row below 0."""
    chosen = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + chosen).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    for tap in tl.static_range(NUM_TAPS):
        values = tl.load(taps[tap] + row * tap_row + place, mask=inside & (row >= 0), other=0.0)
        tl.store(out + (chosen * NUM_TAPS + tap) * size + place, values, mask=inside)
