"""Triton code of ``sampling`` and ``chain_judge``; imported when a kernel is first launched, never before.

A row's law is never written down. ``settle`` leaves five numbers a row from which any kernel can tell any id's probability:
the peak and norm of the softmax, the least probability that is kept (as bits, which order as probabilities do), the last id
kept among those of just that probability, and the mass that is kept.
"""

# mypy: ignore-errors
# (triton's decorator and the arguments of kernels have no types)

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.random_triton import exponential, row_key, uniform

GREEDY = tl.constexpr(0)
RATIO = tl.constexpr(2)
TOKEN = tl.constexpr(0)
ACCEPT = tl.constexpr(1)


@triton.jit
def softmax(row, place, inside, temperature, peak, norm):
    """Probabilities of the untruncated law at ids ``place``, fp32; 0 outside."""
    logits = tl.load(row + place, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.div_rn(tl.exp(tl.div_rn(logits, temperature) - peak), norm)


@triton.jit
def tally(row, size, temperature, peak, norm, pivot, step, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Ids, or their mass, of probability bits at least ``pivot`` + 1, 2 and 3 ``step``."""
    first = tl.zeros((), tl.float64)
    second = tl.zeros((), tl.float64)
    third = tl.zeros((), tl.float64)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        probs = softmax(row, place, place < size, temperature, peak, norm)
        bits = probs.to(tl.int32, bitcast=True)
        counted = probs.to(tl.float64) if BY_MASS else (place < size).to(tl.float64)
        first += tl.sum(tl.where(bits >= pivot + step, counted, 0.0), axis=0)
        second += tl.sum(tl.where(bits >= pivot + 2 * step, counted, 0.0), axis=0)
        third += tl.sum(tl.where(bits >= pivot + 3 * step, counted, 0.0), axis=0)
    return first, second, third


@triton.jit
def search(row, size, temperature, peak, norm, wanted, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest probability bits, at least 1, that ``wanted`` ids or their mass ``wanted`` have or exceed: two bits a pass."""
    found = tl.zeros((), tl.int32)
    step = tl.full((), 1 << 28, tl.int32)
    while step > 0:
        first, second, third = tally(row, size, temperature, peak, norm, found, step, BY_MASS, BLOCK)
        found += ((first >= wanted).to(tl.int32) + (second >= wanted).to(tl.int32) + (third >= wanted).to(tl.int32)) * step
        step = step >> 2
    return tl.maximum(found, 1)


@triton.jit
def above(row, size, temperature, peak, norm, least, BLOCK: tl.constexpr):
    """(ids, mass) of probability bits over ``least``, and ids of just these bits."""
    count = tl.zeros((), tl.float64)
    mass = tl.zeros((), tl.float64)
    equal = tl.zeros((), tl.float64)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        probs = softmax(row, place, place < size, temperature, peak, norm)
        bits = probs.to(tl.int32, bitcast=True)
        count += tl.sum((bits > least).to(tl.float64), axis=0)
        mass += tl.sum(tl.where(bits > least, probs.to(tl.float64), 0.0), axis=0)
        equal += tl.sum(((bits == least) & (place < size)).to(tl.float64), axis=0)
    return count, mass, equal


@triton.jit
def last_of(row, size, temperature, peak, norm, least, number, BLOCK: tl.constexpr):
    """The ``number``-th id, in ascending order, of those of just the bits ``least``."""
    last = tl.zeros((), tl.int32)
    seen = tl.zeros((), tl.int32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        probs = softmax(row, place, place < size, temperature, peak, norm)
        is_tie = (probs.to(tl.int32, bitcast=True) == least) & (place < size)
        ordinal = seen + tl.cumsum(is_tie.to(tl.int32), axis=0)
        last = tl.maximum(last, tl.max(tl.where(is_tie & (ordinal <= number), place, 0), axis=0))
        seen += tl.sum(is_tie.to(tl.int32), axis=0)
    return last


@triton.jit
def is_kept(probs, place, least, last):
    bits = probs.to(tl.int32, bitcast=True)
    return (bits > least) | ((bits == least) & (place <= last))


@triton.jit
def settle(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    tokens,
    peaks,
    norms,
    leasts,
    lasts,
    masses,
    size,
    logits_row,
    BLOCK: tl.constexpr,
):
    """The five numbers of a row's law, and its token."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * logits_row
    temperature = tl.load(temperatures + n)
    best = tl.full((), -float("inf"), tl.float32)
    token = tl.zeros((), tl.int32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        values = tl.load(row + place, mask=place < size, other=-float("inf")).to(tl.float32)
        high, where = tl.max(values, axis=0, return_indices=True)
        token = tl.where(high > best, start + where, token)
        best = tl.maximum(best, high)
    peak = best
    norm = tl.full((), 1.0, tl.float32)
    least = tl.full((), 1, tl.int32)
    last = tl.full((), 0, tl.int32) + size
    mass = tl.full((), 1.0, tl.float64)
    if temperature > 0.0:
        temperature = tl.maximum(temperature, 1e-30)
        peak = tl.div_rn(best, temperature)
        total = tl.zeros((), tl.float64)
        for start in range(0, size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            probs = softmax(row, place, place < size, temperature, peak, 1.0)
            total += tl.sum(probs.to(tl.float64), axis=0)
        norm = total.to(tl.float32)
        top_k = tl.load(top_ks + n).to(tl.int32)
        top_p = tl.load(top_ps + n)
        min_p = tl.load(min_ps + n)
        wanted = tl.where((top_k > 0) & (top_k < size), top_k, size).to(tl.float64)
        if min_p > 0.0:
            floor = min_p * tl.div_rn(1.0, norm).to(tl.float64)
            likely = tl.zeros((), tl.float64)
            for start in range(0, size, BLOCK):
                place = start + tl.arange(0, BLOCK)
                probs = softmax(row, place, place < size, temperature, peak, norm)
                likely += tl.sum(((probs.to(tl.float64) >= floor) & (place < size)).to(tl.float64), axis=0)
            wanted = tl.minimum(wanted, likely)
        ties = tl.full((), 1.0, tl.float64) * size
        cuts = wanted < size
        if cuts:
            least = search(row, size, temperature, peak, norm, wanted, False, BLOCK)
            count, over, equal = above(row, size, temperature, peak, norm, least, BLOCK)
            ties = tl.minimum(tl.maximum(wanted - count, 1.0), equal)
            mass = over + ties * least.to(tl.float32, bitcast=True).to(tl.float64)
        if top_p < 1.0:
            target = top_p * mass
            reached = search(row, size, temperature, peak, norm, target, True, BLOCK)
            count, over, equal = above(row, size, temperature, peak, norm, reached, BLOCK)
            each = reached.to(tl.float32, bitcast=True).to(tl.float64)
            needed = tl.minimum(tl.maximum(tl.ceil((target - over) / each), 1.0), equal)
            if reached > least:
                least = reached
                ties = needed
                mass = over + ties * each
            elif reached == least:
                ties = tl.minimum(ties, needed)
                mass = over + ties * each
            cuts = cuts | (least > 1)
        if cuts:
            last = last_of(row, size, temperature, peak, norm, least, ties.to(tl.int32), BLOCK)
        key = row_key(tl.load(seeds + n), tl.load(positions + n), TOKEN, 0)
        leading = tl.full((), -1.0, tl.float32)
        for start in range(0, size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            probs = softmax(row, place, place < size, temperature, peak, norm)
            weights = tl.div_rn(probs, exponential(key, place))
            weights = tl.where(is_kept(probs, place, least, last) & (place < size), weights, -1.0)
            high, where = tl.max(weights, axis=0, return_indices=True)
            token = tl.where(high > leading, start + where, token)
            leading = tl.maximum(leading, high)
    tl.store(tokens + n, token.to(tl.int64))
    tl.store(peaks + n, peak)
    tl.store(norms + n, norm)
    tl.store(leasts + n, least)
    tl.store(lasts + n, last)
    tl.store(masses + n, mass)


@triton.jit
def law_at(logits, temperatures, peaks, norms, leasts, lasts, masses, n, logits_row, place, inside):
    """Probabilities of row ``n``'s law at ids ``place``, fp32; 0 where not ``inside``."""
    temperature = tl.maximum(tl.load(temperatures + n), 1e-30)
    probs = softmax(logits + n * logits_row, place, inside, temperature, tl.load(peaks + n), tl.load(norms + n))
    kept = inside & is_kept(probs, place, tl.load(leasts + n), tl.load(lasts + n))
    return tl.where(kept, (probs.to(tl.float64) / tl.load(masses + n)).to(tl.float32), 0.0)


@triton.jit
def write_laws(logits, temperatures, peaks, norms, leasts, lasts, masses, out, size, logits_row, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    probs = law_at(logits, temperatures, peaks, norms, leasts, lasts, masses, n, logits_row, place, inside)
    tl.store(out + n * size + place, probs, mask=inside)


@triton.jit
def accept(
    logits,
    temperatures,
    tokens,
    peaks,
    norms,
    leasts,
    lasts,
    masses,
    rules,
    first_rows,
    counts,
    seeds,
    base_lens,
    drafts,
    law_ids,
    law_probs,
    out,
    accepted_counts,
    joints,
    marks,
    logits_row,
    marks_row,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which drafts of one request stand, and its own token where that needs no residual; marks the ids of the law that fell."""
    r = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + r).to(tl.int32)
    first = tl.load(first_rows + r).to(tl.int64)
    place = tl.arange(0, BLOCK)
    accepted = tl.zeros((), tl.int32)
    joint = tl.full((), 1.0, tl.float64)
    if tl.load(rules + r) == RATIO:
        seed = tl.load(seeds + r)
        base_len = tl.load(base_lens + r)
        before = tl.full((), 1.0, tl.float64)
        for j in range(0, count):
            row = first + j
            at = (r * LENGTH + j) * WIDTH + place
            token = tl.load(drafts + r * LENGTH + j).to(tl.int32)
            ids = tl.load(law_ids + at, mask=place < WIDTH, other=0).to(tl.int32)
            probs = tl.load(law_probs + at, mask=place < WIDTH, other=0.0)
            draft_prob = tl.sum(tl.where(ids == token, probs, 0.0), axis=0).to(tl.float64)
            target = law_at(logits, temperatures, peaks, norms, leasts, lasts, masses, row, logits_row, token, token >= 0)
            ratio = tl.where(draft_prob > 0.0, target.to(tl.float64) / tl.where(draft_prob > 0.0, draft_prob, 1.0), 0.0)
            after = tl.minimum(before * ratio, 1.0)
            shared = tl.zeros((), tl.float64)
            if j + 1 < count:
                next_token = tl.load(drafts + r * LENGTH + j + 1).to(tl.int32)
                next_ids = tl.load(law_ids + at + WIDTH, mask=place < WIDTH, other=0).to(tl.int32)
                next_probs = tl.load(law_probs + at + WIDTH, mask=place < WIDTH, other=0.0)
                is_law = tl.sum(tl.where(next_ids == next_token, next_probs, 0.0), axis=0) > 0.0
                support = law_at(logits, temperatures, peaks, norms, leasts, lasts, masses, row + 1, logits_row, next_ids, next_probs > 0.0)
                overlap = tl.minimum(after * support.to(tl.float64), next_probs.to(tl.float64))
                shared = tl.where(is_law, tl.sum(overlap, axis=0), 0.0)
            chance = (after - shared) / tl.where(after < 1.0, 1.0 - shared, 1.0)
            chance = tl.where(after < 1.0, tl.minimum(tl.maximum(chance, 0.0), 1.0), 1.0)
            if uniform(row_key(seed, base_len + j, ACCEPT, -base_len)) < chance:
                accepted = j + 1
                joint = after
            before = after
        if accepted < count:
            at = (r * LENGTH + accepted) * WIDTH + place
            ids = tl.load(law_ids + at, mask=place < WIDTH, other=0).to(tl.int32)
            has_mass = (place < WIDTH) & (tl.load(law_probs + at, mask=place < WIDTH, other=0.0) > 0.0)
            tl.atomic_or(marks + r * marks_row + ids // 32, (1 << (ids % 32)), mask=has_mass)
    else:
        stands = count > 0
        while stands:
            stands = tl.load(drafts + r * LENGTH + accepted) == tl.load(tokens + first + accepted)
            accepted += stands.to(tl.int32)
            stands = stands & (accepted < count)
    for j in tl.static_range(LENGTH + 1):
        token = tl.full((), -1, tl.int64)
        if j < accepted:
            token = tl.load(drafts + r * LENGTH + j)
        elif (j == accepted) & (count >= 0):
            token = tl.load(tokens + first + j)
        tl.store(out + r * (LENGTH + 1) + j, token)
    tl.store(accepted_counts + r, accepted)
    tl.store(joints + r, joint.to(tl.float32))


@triton.jit
def draw_residual(
    logits,
    temperatures,
    peaks,
    norms,
    leasts,
    lasts,
    masses,
    rules,
    first_rows,
    counts,
    seeds,
    base_lens,
    drafts,
    law_ids,
    law_probs,
    out,
    accepted_counts,
    joints,
    marks,
    size,
    logits_row,
    marks_row,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    LAW_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token behind a fallen draft of the ratio rule, from max(0, joint * target - draft); the target's own where nothing is left."""
    r = tl.program_id(0).to(tl.int64)
    accepted = tl.load(accepted_counts + r)
    if (tl.load(rules + r) == RATIO) & (accepted < tl.load(counts + r)):
        n = tl.load(first_rows + r).to(tl.int64) + accepted
        joint = tl.load(joints + r)
        key = row_key(tl.load(seeds + r), tl.load(base_lens + r) + accepted, TOKEN, 0)
        place = tl.arange(0, LAW_BLOCK)
        at = (r * LENGTH + accepted) * WIDTH + place
        ids = tl.load(law_ids + at, mask=place < WIDTH, other=0).to(tl.int32)
        probs = tl.load(law_probs + at, mask=place < WIDTH, other=0.0)
        token = tl.load(drafts + r * LENGTH + accepted).to(tl.int32)
        is_law = tl.sum(tl.where(ids == token, probs, 0.0), axis=0) > 0.0
        target = law_at(logits, temperatures, peaks, norms, leasts, lasts, masses, n, logits_row, ids, probs > 0.0)
        left = tl.maximum(target * joint - tl.where(is_law, probs, 0.0), 0.0)
        weights = tl.div_rn(left, exponential(key, ids))
        leading = tl.max(weights, axis=0)
        best = tl.min(tl.where(weights == leading, ids, size), axis=0)
        for start in range(0, size, BLOCK):
            chunk = start + tl.arange(0, BLOCK)
            inside = chunk < size
            words = tl.load(marks + r * marks_row + chunk // 32, mask=inside, other=0)
            chunk_probs = law_at(logits, temperatures, peaks, norms, leasts, lasts, masses, n, logits_row, chunk, inside)
            chunk_weights = tl.div_rn(chunk_probs * joint, exponential(key, chunk))
            chunk_weights = tl.where(inside & (((words >> (chunk % 32)) & 1) == 0), chunk_weights, 0.0)
            high, where = tl.max(chunk_weights, axis=0, return_indices=True)
            found = start + where
            best = tl.where((high > leading) | ((high == leading) & (found < best)), found, best)
            leading = tl.maximum(leading, high)
        if leading > 0.0:
            tl.store(out + r * (LENGTH + 1) + accepted, best.to(tl.int64))
