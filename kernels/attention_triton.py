# mypy: ignore-errors
"""Triton code of ``ragged_attention`` and ``kv_store``; imported when a kernel is first launched, never before.

A tile of ``attend`` is up to TILE_TOKENS new tokens of one row with the GROUP query heads of one KV head, folded into TILE_ROWS
rows of a matrix product: rows ``m`` are (token m // GROUP, head m % GROUP). Row r's tiles begin at ``starts[r] // TILE_TOKENS + r``,
so that the number of tiles depends on tokens and rows alone and a captured launch fits every mix of lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.chain_triton import begin_early, wait_for_earlier

LOG2E = tl.constexpr(1.4426950408889634)
PARTS_AT_ONCE = tl.constexpr(8)


@triton.jit
def store_kv(
    key,
    value,
    key_cache,
    value_cache,
    slots,
    key_token,
    key_head,
    value_token,
    value_head,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        place = tl.arange(0, KEY_BLOCK)
        inside = place < KEY_SIZE
        source = token * key_token + place // KEY_DIM * key_head + place % KEY_DIM
        tl.store(key_cache + slot * KEY_SIZE + place, tl.load(key + source, mask=inside), mask=inside)
        place = tl.arange(0, VALUE_BLOCK)
        inside = place < VALUE_SIZE
        source = token * value_token + place // VALUE_DIM * value_head + place % VALUE_DIM
        tl.store(value_cache + slot * VALUE_SIZE + place, tl.load(value + source, mask=inside), mask=inside)


@triton.jit
def rotate_store(
    heads,
    cos,
    sin,
    query_weight,
    key_weight,
    query,
    key_cache,
    value_cache,
    slots,
    heads_row,
    cos_row,
    sin_row,
    eps,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """HEAD_BLOCK of a token's query, key and value heads, in this order; HALF of BLOCK columns are real."""
    begin_early(IS_CHAINED)
    wait_for_earlier(IS_CHAINED)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    inside = (head < QUERY_HEADS + 2 * KEY_HEADS) & (place < HALF)
    is_query = inside & (head < QUERY_HEADS)
    is_key = inside & (head >= QUERY_HEADS) & (head < QUERY_HEADS + KEY_HEADS)
    is_value = inside & (head >= QUERY_HEADS + KEY_HEADS)
    source = heads + token * heads_row + head * 2 * HALF + place
    left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    plain_left, plain_right = left, right
    if HAS_NORM:
        scale = (1.0 / tl.sqrt_rn(tl.sum(left * left + right * right, axis=1) / (2 * HALF) + eps))[:, None]
        at = place + head * 0
        weight_left = tl.load(query_weight + at, mask=is_query, other=0.0) + tl.load(key_weight + at, mask=is_key, other=0.0)
        weight_right = tl.load(query_weight + HALF + at, mask=is_query, other=0.0) + tl.load(key_weight + HALF + at, mask=is_key, other=0.0)
        left, right = left * scale * weight_left.to(tl.float32), right * scale * weight_right.to(tl.float32)
    turns = place < HALF
    cos_left = tl.load(cos + token * cos_row + place, mask=turns, other=0.0).to(tl.float32)
    cos_right = tl.load(cos + token * cos_row + HALF + place, mask=turns, other=0.0).to(tl.float32)
    sin_left = tl.load(sin + token * sin_row + place, mask=turns, other=0.0).to(tl.float32)
    sin_right = tl.load(sin + token * sin_row + HALF + place, mask=turns, other=0.0).to(tl.float32)
    dtype = query.dtype.element_ty
    turned_left = (left * cos_left - right * sin_left).to(dtype)
    turned_right = (right * cos_right + left * sin_right).to(dtype)
    target = query + (token * QUERY_HEADS + head) * 2 * HALF + place
    tl.store(target, turned_left, mask=is_query)
    tl.store(target + HALF, turned_right, mask=is_query)
    slot = tl.load(slots + token).to(tl.int64)
    target = key_cache + (slot * KEY_HEADS + head - QUERY_HEADS) * 2 * HALF + place
    tl.store(target, turned_left, mask=is_key & (slot >= 0))
    tl.store(target + HALF, turned_right, mask=is_key & (slot >= 0))
    target = value_cache + (slot * KEY_HEADS + head - QUERY_HEADS - KEY_HEADS) * 2 * HALF + place
    tl.store(target, plain_left.to(dtype), mask=is_value & (slot >= 0))
    tl.store(target + HALF, plain_right.to(dtype), mask=is_value & (slot >= 0))


@triton.jit
def see(
    q,
    k,
    v,
    place,
    end,
    base,
    own,
    is_query,
    bits,
    position,
    new_positions,  # of the row's new tokens
    window,
    scale,
    softcap,
    best,
    total,
    acc,
    HAS_ANCESTORS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SEES_ALL: tl.constexpr,
):
    """Take TILE_KEYS more positions into the running softmax: largest score, sum of weights, sums of values."""
    inside = place < end
    new = place - base
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    scores = scores * LOG2E
    if SEES_ALL:
        seen = inside[None, :] & is_query[:, None]
    else:
        seen = place[None, :] <= (base + own)[:, None]
        if HAS_ANCESTORS:
            bit = (bits[:, None] >> tl.minimum(tl.maximum(new, 0), 63).to(tl.int64)[None, :]) & 1
            seen = tl.where((bits == 0)[:, None], seen, (new < 0)[None, :] | (bit != 0))
        seen = seen & inside[None, :] & is_query[:, None]
    if HAS_WINDOW:
        key_position = tl.load(new_positions + new, mask=inside & (new >= 0), other=0).to(tl.int32)
        key_position = tl.where(new >= 0, key_position, place)
        seen = seen & (position[:, None] - key_position[None, :] < window)
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2(scores - anchor[:, None])
    fade = tl.exp2(best - anchor)
    total = total * fade + tl.sum(weight, 1)
    acc = acc * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return higher, total, acc


@triton.jit
def slots_of(table, place, inside, BLOCK_SIZE: tl.constexpr):
    """Where positions of a row lie in the caches."""
    block = tl.load(table + place // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    return block * BLOCK_SIZE + place % BLOCK_SIZE


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "window"])
def attend(
    query,
    key_cache,
    value_cache,
    out,
    partial,  # [SPLITS, T, H, VALUE_DIM] fp32: unnormalised sums of values, where SPLITS > 1
    weights,  # [2, SPLITS, T, H] fp32: largest score (in log2 units) and sum of weights
    arrived,  # [tiles, KV_HEADS] int32: how many parts of a tile are there; 0 before and after
    positions,
    starts,
    contexts,
    table_starts,
    tables,
    ancestors,
    sinks,
    num_tokens,
    num_rows,
    window,
    scale,
    softcap,
    query_token,
    query_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    HAS_ANCESTORS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SEES_ALL: tl.constexpr,
    FIRST: tl.constexpr,
    IS_CHAINED: tl.constexpr,
    IS_GIVEN: tl.constexpr,
):
    """FIRST: positions before it are seen by nobody.

    IS_GIVEN: rows, tables and all KV but that of new tokens are there before earlier kernels have ended: they are read at once."""
    begin_early(IS_CHAINED)
    if not IS_GIVEN:
        wait_for_earlier(IS_CHAINED)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.arange(0, ROWS_BLOCK)
    begins = tl.load(starts + rows, mask=rows < num_rows, other=2147483647) // TILE_TOKENS + rows
    row = tl.sum((begins <= tile).to(tl.int32), 0) - 1
    start = tl.load(starts + row)
    length = tl.load(starts + row + 1) - start
    offset = (tile - start // TILE_TOKENS - row) * TILE_TOKENS
    context = tl.load(contexts + row)
    base = context - length
    m = tl.arange(0, TILE_ROWS)
    own = offset + m // GROUP
    head = kv_head * GROUP + m % GROUP
    is_query = (m < TILE_TOKENS * GROUP) & (own < length)
    token = start + own
    key_columns = tl.arange(0, KEY_BLOCK)
    value_columns = tl.arange(0, VALUE_BLOCK)
    first_key = context * 0 + FIRST
    last_key = context
    if not SEES_ALL:
        last_key = tl.maximum(tl.minimum(context, base + offset + TILE_TOKENS), 0)
    position, bits = own, own
    if HAS_WINDOW:
        position = tl.load(positions + token, mask=is_query, other=0).to(tl.int32)
        lowest = tl.min(tl.where(is_query, position, 2147483647), 0)
        first_key = tl.minimum(tl.maximum(lowest - window + 1, 0), base)
        first_key = tl.maximum(first_key, FIRST)
    if HAS_ANCESTORS:
        bits = tl.load(ancestors + token, mask=is_query, other=0)
    num_tiles = tl.cdiv(tl.maximum(last_key - first_key, 0), TILE_KEYS)
    per_split = tl.cdiv(num_tiles, SPLITS)
    parts = tl.maximum(tl.cdiv(num_tiles, tl.maximum(per_split, 1)), 1)  # a short context has fewer than SPLITS
    begin = first_key + split * per_split * TILE_KEYS
    end = tl.minimum(last_key, begin + per_split * TILE_KEYS)
    if (offset < length) & (split < parts):
        table = tables + tl.load(table_starts + row)
        best = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        acc = tl.zeros([TILE_ROWS, VALUE_BLOCK], tl.float32)
        is_key = key_columns < KEY_DIM
        is_value = value_columns < VALUE_DIM
        keys = key_cache + kv_head * KEY_DIM + key_columns[:, None]
        values = value_cache + kv_head * VALUE_DIM + value_columns[None, :]
        tile_keys = tl.arange(0, TILE_KEYS)
        if IS_GIVEN:
            place = begin + tile_keys
            slot = slots_of(table, place, place < end, BLOCK_SIZE)
            old = (place < end) & (place < base)
            k = tl.load(keys + (slot * (KV_HEADS * KEY_DIM))[None, :], mask=old[None, :] & is_key[:, None], other=0.0)
            v = tl.load(values + (slot * (KV_HEADS * VALUE_DIM))[:, None], mask=old[:, None] & is_value[None, :], other=0.0)
            wait_for_earlier(IS_CHAINED)
        q = tl.load(
            query + (token * query_token + head * query_head)[:, None] + key_columns[None, :],
            mask=is_query[:, None] & is_key[None, :],
            other=0.0,
        )
        if IS_GIVEN:
            added = (place < end) & (place >= base)
            new_k = tl.load(keys + (slot * (KV_HEADS * KEY_DIM))[None, :], mask=added[None, :] & is_key[:, None], other=0.0)
            new_v = tl.load(values + (slot * (KV_HEADS * VALUE_DIM))[:, None], mask=added[:, None] & is_value[None, :], other=0.0)
            k = tl.where(added[None, :], new_k, k)
            v = tl.where(added[:, None], new_v, v)
            best, total, acc = see(
                q, k, v, place, end, base, own, is_query, bits, position, positions + start, window, scale, softcap, best, total, acc,
                HAS_ANCESTORS, HAS_WINDOW, HAS_SOFTCAP, SEES_ALL,
            )  # fmt: skip
            begin += TILE_KEYS
        for key_begin in range(begin, end, TILE_KEYS):
            place = key_begin + tile_keys
            inside = place < end
            slot = slots_of(table, place, inside, BLOCK_SIZE)
            k = tl.load(keys + (slot * (KV_HEADS * KEY_DIM))[None, :], mask=inside[None, :] & is_key[:, None], other=0.0)
            v = tl.load(values + (slot * (KV_HEADS * VALUE_DIM))[:, None], mask=inside[:, None] & is_value[None, :], other=0.0)
            best, total, acc = see(
                q, k, v, place, end, base, own, is_query, bits, position, positions + start, window, scale, softcap, best, total, acc,
                HAS_ANCESTORS, HAS_WINDOW, HAS_SOFTCAP, SEES_ALL,
            )  # fmt: skip
        is_value = is_query[:, None] & is_value[None, :]
        place = token * HEADS + head
        is_last = True
        if SPLITS > 1:  # noqa: SIM102 - known when compiled, what follows is not
            if parts > 1:
                part = place + split * num_tokens * HEADS
                tl.store(partial + (part * VALUE_DIM)[:, None] + value_columns[None, :], acc, mask=is_value)
                tl.store(weights + part, best, mask=is_query)
                tl.store(weights + SPLITS * num_tokens * HEADS + part, total, mask=is_query)
                tl.debug_barrier()  # all threads have stored before one says so
                count = arrived + tile * KV_HEADS + kv_head
                is_last = tl.atomic_add(count, 1, sem="acq_rel") == parts - 1
                if is_last:
                    tl.store(count, 0)
                    best = tl.full([TILE_ROWS], float("-inf"), tl.float32)
                    total = tl.zeros([TILE_ROWS], tl.float32)
                    acc = tl.zeros([TILE_ROWS, VALUE_BLOCK], tl.float32)
                    for first in range(0, parts, PARTS_AT_ONCE):
                        for i in tl.static_range(PARTS_AT_ONCE):  # unrolled: these are under way at once
                            part = place + (first + i) * num_tokens * HEADS
                            is_part = is_query & (first + i < parts)
                            # Past the first cache, which may hold what lay here before.
                            other_best = tl.load(weights + part, mask=is_part, other=float("-inf"), cache_modifier=".cg")
                            other_total = tl.load(
                                weights + SPLITS * num_tokens * HEADS + part, mask=is_part, other=0.0, cache_modifier=".cg"
                            )
                            sums = tl.load(
                                partial + (part * VALUE_DIM)[:, None] + value_columns[None, :],
                                mask=is_part[:, None] & is_value,
                                other=0.0,
                                cache_modifier=".cg",
                            )
                            higher = tl.maximum(best, other_best)
                            anchor = tl.where(higher == float("-inf"), 0.0, higher)
                            fade, gain = tl.exp2(best - anchor), tl.exp2(other_best - anchor)
                            total = total * fade + other_total * gain
                            acc = acc * fade[:, None] + sums * gain[:, None]
                            best = higher
        if is_last:
            if HAS_SINKS:
                sink = tl.load(sinks + head).to(tl.float32) * LOG2E
                anchor = tl.maximum(best, sink)
                total = tl.where(context > 0, total * tl.exp2(best - anchor) + tl.exp2(sink - anchor), 0.0)
                acc = acc * tl.exp2(best - anchor)[:, None]
            mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + (place * VALUE_DIM)[:, None] + value_columns[None, :], mean.to(out.dtype.element_ty), mask=is_value)
    elif IS_GIVEN:
        wait_for_earlier(IS_CHAINED)  # this kernel must not end before the one before it
