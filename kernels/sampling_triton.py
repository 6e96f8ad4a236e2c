"""Triton code of ``sampling`` and ``chain_judge``; imported when a kernel is first launched, never before.

A row's law is never written down. ``settle`` leaves five numbers a row from which any kernel can tell any id's probability: the
largest logit and the norm of the softmax next to it, the least logit that is kept (as a key, see ``order``), the last id kept among
those of just that logit, and the share of the mass that is kept. Before it ``survey`` looks once at every chunk of every row, so that
few rows make work for all processors; only the search for the end of a truncated law goes over a row in one program, adding up lane
by lane: a reduction waits for all threads of a program.
"""

# mypy: ignore-errors
# (triton's decorator and the arguments of kernels have no types)

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.random_triton import exponential, row_key, uniform

RATIO = tl.constexpr(2)
TOKEN = tl.constexpr(0)
ACCEPT = tl.constexpr(1)
LEAST_KEY = tl.constexpr(-(2**31))


@triton.jit
def order(logits, BITS: tl.constexpr):
    """Integers that order as logits (fp32) do; ``BITS`` 16: of logits that were bf16, whose other half is empty."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> (32 - BITS)


@triton.jit
def logit_of(key, BITS: tl.constexpr):
    """The logit of a key, fp32."""
    bits = (key << (32 - BITS)) | tl.where(key < 0, (1 << (32 - BITS)) - 1, 0)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def sharpness(temperature):
    """What differences of logits are multiplied with; ``temperature`` over 0."""
    return tl.div_rn(1.0, tl.maximum(temperature, 1e-30))


@triton.jit
def power(logits, sharp, peak):
    """What the softmax adds up, next to the largest logit ``peak``; 0 of -inf."""
    return tl.exp((logits - peak) * sharp)


@triton.jit
def tally(row, size, sharp, peak, low, middle, high, BY_MASS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Ids, or their mass, whose keys are at least ``low``, ``middle`` and ``high``."""
    lane = tl.arange(0, BLOCK)
    low, middle, high = low.to(tl.int32), middle.to(tl.int32), high.to(tl.int32)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    third = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        place = start + lane
        logits = tl.load(row + place, mask=place < size, other=-float("inf")).to(tl.float32)
        keys = order(logits, BITS)
        counted = power(logits, sharp, peak) if BY_MASS else tl.where(place < size, 1.0, 0.0)
        first += tl.where(keys >= low, counted, 0.0)
        second += tl.where(keys >= middle, counted, 0.0)
        third += tl.where(keys >= high, counted, 0.0)
    return tl.sum(first.to(tl.float64), axis=0), tl.sum(second.to(tl.float64), axis=0), tl.sum(third.to(tl.float64), axis=0)


@triton.jit
def search(row, size, sharp, peak, top, wanted, BY_MASS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key that ``wanted`` ids, or ids of the mass ``wanted``, have or exceed: two bits a pass.

    Most laws end near their largest key ``top``, so the first pass asks how near.
    """
    near = tl.maximum(top.to(tl.int64) + 1 - (1 << (BITS - 8)), LEAST_KEY)
    far = tl.maximum(top.to(tl.int64) + 1 - (1 << (BITS - 6)), LEAST_KEY)
    farther = tl.maximum(top.to(tl.int64) + 1 - (1 << (BITS - 4)), LEAST_KEY)
    first, second, third = tally(row, size, sharp, peak, farther, far, near, BY_MASS, BITS, BLOCK)
    found = tl.zeros((), tl.int64) - (1 << (BITS - 1))
    step = tl.full((), 1 << (BITS - 2), tl.int64)
    if third >= wanted:
        found, step = near, step >> 8
    elif second >= wanted:
        found, step = far, step >> 6
    elif first >= wanted:
        found, step = farther, step >> 4
    while step > 0:
        first, second, third = tally(row, size, sharp, peak, found + step, found + 2 * step, found + 3 * step, BY_MASS, BITS, BLOCK)
        found += ((first >= wanted).to(tl.int64) + (second >= wanted).to(tl.int64) + (third >= wanted).to(tl.int64)) * step
        step = step >> 2
    return found.to(tl.int32)


@triton.jit
def above(row, size, sharp, peak, least, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """(ids, mass) of keys over ``least``, and ids of just this key."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    equal = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        place = start + lane
        logits = tl.load(row + place, mask=place < size, other=-float("inf")).to(tl.float32)
        keys = order(logits, BITS)
        count += ((keys > least) & (place < size)).to(tl.float32)
        mass += tl.where(keys > least, power(logits, sharp, peak), 0.0)
        equal += ((keys == least) & (place < size)).to(tl.float32)
    return tl.sum(count.to(tl.float64), axis=0), tl.sum(mass.to(tl.float64), axis=0), tl.sum(equal.to(tl.float64), axis=0)


@triton.jit
def last_of(row, size, least, number, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The ``number``-th id, in ascending order, of those whose key is ``least``."""
    last = tl.zeros((), tl.int32)
    seen = tl.zeros((), tl.int32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        logits = tl.load(row + place, mask=place < size, other=-float("inf")).to(tl.float32)
        is_tie = (order(logits, BITS) == least) & (place < size)
        ordinal = seen + tl.cumsum(is_tie.to(tl.int32), axis=0)
        last = tl.maximum(last, tl.max(tl.where(is_tie & (ordinal <= number), place, 0), axis=0))
        seen += tl.sum(is_tie.to(tl.int32), axis=0)
    return last


@triton.jit
def is_kept(keys, place, least, last):
    return (keys > least) | ((keys == least) & (place <= last))


@triton.jit
def winner(leading, wheres, size):
    """Of the largest value of all lanes, the first id."""
    best = tl.max(leading, axis=0)
    return tl.minimum(tl.min(tl.where(leading == best, wheres, size), axis=0), size - 1)  # NaN equals nothing


@triton.jit
def truncates(top_k, top_p, min_p, size):
    return ((top_k > 0) & (top_k < size)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def survey(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    highs,
    places,
    sums,
    weights,
    winners,
    size,
    logits_row,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a chunk of a row: its largest logit and the id of that; at a temperature the sum of its powers next to that one, and, unless
    something truncates, who wins the race in it and with which weight."""
    n, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top_k = tl.load(top_ks + n).to(tl.int32)
    if top_k >= 0:
        at = n * CHUNKS + chunk
        place = chunk * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(logits + n * logits_row + place, mask=place < size, other=-float("inf")).to(tl.float32)
        high = tl.max(values, axis=0)
        tl.store(highs + at, high)
        tl.store(places + at, winner(values, place, size))
        temperature = tl.load(temperatures + n)
        if temperature > 0.0:
            sharp = sharpness(temperature)
            powers = tl.where(values > -float("inf"), power(values, sharp, high), 0.0)
            tl.store(sums + at, tl.sum(powers, axis=0))
            if not truncates(top_k, tl.load(top_ps + n), tl.load(min_ps + n), size):
                key = row_key(tl.load(seeds + n), tl.load(positions + n), TOKEN, 0)
                raced = tl.where(place < size, powers / exponential(key, place), -1.0)
                tl.store(weights + at, tl.max(raced, axis=0))
                tl.store(winners + at, winner(raced, place, size))


@triton.jit
def settle(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    highs,
    places,
    sums,
    weights,
    winners,
    tokens,
    peaks,
    norms,
    leasts,
    lasts,
    masses,
    size,
    logits_row,
    CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The five numbers of a row's law, and its token, from what ``survey`` found; nothing where ``top_k`` is below 0."""
    n = tl.program_id(0).to(tl.int64)
    top_k = tl.load(top_ks + n).to(tl.int32)
    if top_k >= 0:
        row = logits + n * logits_row
        temperature = tl.load(temperatures + n)
        chunk = tl.arange(0, CHUNK_BLOCK)
        at, real = n * CHUNKS + chunk, chunk < CHUNKS
        high = tl.load(highs + at, mask=real, other=-float("inf"))
        best = tl.max(high, axis=0)
        token = winner(high, tl.load(places + at, mask=real, other=size), size)
        peak = best
        norm = tl.full((), 1.0, tl.float64)
        kept_mass = tl.full((), 1.0, tl.float64)
        least = tl.full((), LEAST_KEY, tl.int32)
        last = tl.full((), 0, tl.int32) + size
        if temperature > 0.0:
            sharp = sharpness(temperature)
            scales = tl.where(high > -float("inf"), power(high, sharp, peak), 0.0)  # of chunks next to the whole row
            norm = tl.sum(scales.to(tl.float64) * tl.load(sums + at, mask=real, other=0.0).to(tl.float64), axis=0)
            kept_mass = norm
            top_p = tl.load(top_ps + n)
            min_p = tl.load(min_ps + n)
            if not truncates(top_k, top_p, min_p, size):
                raced = tl.where(real, scales * tl.load(weights + at, mask=real, other=0.0), -1.0)
                token = winner(raced, tl.load(winners + at, mask=real, other=size), size)
            else:
                lane = tl.arange(0, BLOCK)
                top = order(best, BITS)
                wanted = tl.where((top_k > 0) & (top_k < size), top_k, size).to(tl.float64)
                if min_p > 0.0:
                    likely = tl.zeros((BLOCK,), tl.float32)
                    for start in range(0, size, BLOCK):
                        place = start + lane
                        values = tl.load(row + place, mask=place < size, other=-float("inf")).to(tl.float32)
                        likely += (power(values, sharp, peak).to(tl.float64) >= min_p).to(tl.float32)
                    wanted = tl.minimum(wanted, tl.sum(likely.to(tl.float64), axis=0))
                ties = tl.full((), 1.0, tl.float64) * size
                equal = ties
                if wanted < size:
                    least = search(row, size, sharp, peak, top, wanted, False, BITS, BLOCK)
                    count, over, equal = above(row, size, sharp, peak, least, BITS, BLOCK)
                    ties = tl.minimum(tl.maximum(wanted - count, 1.0), equal)
                    kept_mass = over + ties * power(logit_of(least, BITS), sharp, peak).to(tl.float64)
                if top_p < 1.0:
                    target = top_p * kept_mass
                    reached = search(row, size, sharp, peak, top, target, True, BITS, BLOCK)
                    if reached >= least:
                        count, over, together = above(row, size, sharp, peak, reached, BITS, BLOCK)
                        each = power(logit_of(reached, BITS), sharp, peak).to(tl.float64)
                        needed = tl.minimum(tl.maximum(tl.ceil((target - over) / each), 1.0), together)
                        ties = tl.where(reached > least, needed, tl.minimum(ties, needed))
                        equal = together
                        least = reached
                        kept_mass = over + ties * each
                if ties < equal:
                    last = last_of(row, size, least, ties.to(tl.int32), BITS, BLOCK)
                key = row_key(tl.load(seeds + n), tl.load(positions + n), TOKEN, 0)
                leading = tl.full((BLOCK,), -1.0, tl.float32)
                wheres = lane
                for start in range(0, size, BLOCK):
                    place = start + lane
                    values = tl.load(row + place, mask=place < size, other=-float("inf")).to(tl.float32)
                    raced_here = power(values, sharp, peak) / exponential(key, place)
                    raced_here = tl.where(is_kept(order(values, BITS), place, least, last) & (place < size), raced_here, -1.0)
                    wheres = tl.where(raced_here > leading, place, wheres)
                    leading = tl.maximum(leading, raced_here)
                token = winner(leading, wheres, size)
        tl.store(tokens + n, token.to(tl.int64))
        tl.store(peaks + n, peak)
        tl.store(norms + n, norm.to(tl.float32))
        tl.store(leasts + n, least)
        tl.store(lasts + n, last)
        tl.store(masses + n, kept_mass / norm)


@triton.jit
def law_at(logits, temperatures, peaks, norms, leasts, lasts, masses, n, logits_row, place, inside, BITS: tl.constexpr):
    """Probabilities of row ``n``'s law at ids ``place``, fp32; 0 where not ``inside``."""
    sharp = sharpness(tl.load(temperatures + n))
    values = tl.load(logits + n * logits_row + place, mask=inside, other=-float("inf")).to(tl.float32)
    probs = tl.div_rn(power(values, sharp, tl.load(peaks + n)), tl.load(norms + n))
    kept = inside & is_kept(order(values, BITS), place, tl.load(leasts + n), tl.load(lasts + n))
    return tl.where(kept, (probs.to(tl.float64) / tl.load(masses + n)).to(tl.float32), 0.0)


@triton.jit
def write_laws(logits, temperatures, peaks, norms, leasts, lasts, masses, out, size, logits_row, BITS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    probs = law_at(logits, temperatures, peaks, norms, leasts, lasts, masses, n, logits_row, place, inside, BITS)
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
    BITS: tl.constexpr,
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
            target = law_at(logits, temperatures, peaks, norms, leasts, lasts, masses, row, logits_row, token, token >= 0, BITS)
            ratio = tl.where(draft_prob > 0.0, target.to(tl.float64) / tl.where(draft_prob > 0.0, draft_prob, 1.0), 0.0)
            after = tl.minimum(before * ratio, 1.0)
            shared = tl.zeros((), tl.float64)
            if j + 1 < count:
                next_token = tl.load(drafts + r * LENGTH + j + 1).to(tl.int32)
                next_ids = tl.load(law_ids + at + WIDTH, mask=place < WIDTH, other=0).to(tl.int32)
                next_probs = tl.load(law_probs + at + WIDTH, mask=place < WIDTH, other=0.0)
                is_law = tl.sum(tl.where(next_ids == next_token, next_probs, 0.0), axis=0) > 0.0
                support = law_at(
                    logits, temperatures, peaks, norms, leasts, lasts, masses, row + 1, logits_row, next_ids, next_probs > 0.0, BITS
                )
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
def survey_residual(
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
    accepted_counts,
    joints,
    marks,
    weights,
    winners,
    size,
    logits_row,
    marks_row,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a chunk of the vocabulary: who wins the race of joint * target among the ids that are not in the law of the draft that fell."""
    r, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    accepted = tl.load(accepted_counts + r)
    if (tl.load(rules + r) == RATIO) & (accepted < tl.load(counts + r)):
        n = tl.load(first_rows + r).to(tl.int64) + accepted
        key = row_key(tl.load(seeds + r), tl.load(base_lens + r) + accepted, TOKEN, 0)
        sharp = sharpness(tl.load(temperatures + n))
        scale = (tl.load(joints + r).to(tl.float64) / (tl.load(norms + n).to(tl.float64) * tl.load(masses + n))).to(tl.float32)
        place = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        values = tl.load(logits + n * logits_row + place, mask=inside, other=-float("inf")).to(tl.float32)
        words = tl.load(marks + r * marks_row + place // 32, mask=inside, other=0)
        kept = inside & is_kept(order(values, BITS), place, tl.load(leasts + n), tl.load(lasts + n)) & (((words >> (place % 32)) & 1) == 0)
        raced = power(values, sharp, tl.load(peaks + n)) * scale / exponential(key, place)
        raced = tl.where(kept, raced, 0.0)
        tl.store(weights + r * CHUNKS + chunk, tl.max(raced, axis=0))
        tl.store(winners + r * CHUNKS + chunk, winner(raced, place, size))


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
    weights,
    winners,
    size,
    logits_row,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    LAW_BLOCK: tl.constexpr,
):
    """The token behind a fallen draft of the ratio rule, from max(0, joint * target - draft); the target's own where nothing is left."""
    r = tl.program_id(0).to(tl.int64)
    accepted = tl.load(accepted_counts + r)
    if (tl.load(rules + r) == RATIO) & (accepted < tl.load(counts + r)):
        n = tl.load(first_rows + r).to(tl.int64) + accepted
        key = row_key(tl.load(seeds + r), tl.load(base_lens + r) + accepted, TOKEN, 0)
        place = tl.arange(0, LAW_BLOCK)
        at = (r * LENGTH + accepted) * WIDTH + place
        ids = tl.load(law_ids + at, mask=place < WIDTH, other=0).to(tl.int32)
        probs = tl.load(law_probs + at, mask=place < WIDTH, other=0.0)
        token = tl.load(drafts + r * LENGTH + accepted).to(tl.int32)
        is_law = tl.sum(tl.where(ids == token, probs, 0.0), axis=0) > 0.0
        target = law_at(logits, temperatures, peaks, norms, leasts, lasts, masses, n, logits_row, ids, probs > 0.0, BITS)
        left = tl.maximum(target * tl.load(joints + r) - tl.where(is_law, probs, 0.0), 0.0)
        raced = left / exponential(key, ids)
        narrow, best = tl.max(raced, axis=0), winner(raced, ids, size)
        chunk = tl.arange(0, CHUNK_BLOCK)
        real = chunk < CHUNKS
        others = tl.load(weights + r * CHUNKS + chunk, mask=real, other=-1.0)
        wide, found = tl.max(others, axis=0), winner(others, tl.load(winners + r * CHUNKS + chunk, mask=real, other=size), size)
        best = tl.where((wide > narrow) | ((wide == narrow) & (found < best)), found, best)
        if tl.maximum(wide, narrow) > 0.0:
            tl.store(out + r * (LENGTH + 1) + accepted, best.to(tl.int64))
