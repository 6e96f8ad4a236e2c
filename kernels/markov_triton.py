"""Triton code of ``markov_sample``; imported when the kernel is first launched, never before."""

# mypy: ignore-errors
# (triton's decorator and the arguments of kernels have no types)

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.random_triton import exponential, row_key

DRAFT = tl.constexpr(2)
LEAST_REST = tl.constexpr(6.14421235332821e-06)  # exp(-12): log-odds end at 12


@triton.jit
def draw_block(
    base,
    candidates,
    anchors,
    w1,
    w2,
    target_ids,
    temperatures,
    seeds,
    base_lens,
    is_coupled,
    head_weight,
    head_bias,
    hidden,
    head_temperatures,
    tokens,
    law_ids,
    law_probs,
    margins,
    confidences,
    LENGTH: tl.constexpr,
    CANDIDATES: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_MARKOV: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_HEAD: tl.constexpr,
    HEAD_READS_MARKOV: tl.constexpr,
    HAS_HEAD_TEMPERATURES: tl.constexpr,
    CANDIDATE_BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
):
    """All positions of one request, one after the other: the token drawn at one is what the next one's bias hangs on."""
    r = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CANDIDATE_BLOCK)
    inside = place < CANDIDATES
    temperature = tl.load(temperatures + r)
    scale = tl.maximum(temperature, 1e-30)
    seed = tl.load(seeds + r)
    base_len = tl.load(base_lens + r)
    coupled = tl.load(is_coupled + r).to(tl.int64)
    purpose = (1 - coupled) * DRAFT
    salt = (1 - coupled) * base_len
    previous = tl.load(anchors + r)
    for k in range(0, LENGTH):
        row = r * LENGTH + k
        ids = tl.load(candidates + row * CANDIDATES + place, mask=inside, other=0)
        logits = tl.load(base + row * CANDIDATES + place, mask=inside, other=-float("inf")).to(tl.float32)
        if HAS_MARKOV:
            bias = tl.zeros((CANDIDATE_BLOCK,), tl.float32)
            for start in range(0, RANK, RANK_BLOCK):
                column = start + tl.arange(0, RANK_BLOCK)
                real = column < RANK
                latent = tl.load(w1 + previous * RANK + column, mask=real, other=0.0).to(tl.float32)
                weight = tl.load(w2 + ids[:, None] * RANK + column[None, :], mask=inside[:, None] & real[None, :], other=0.0)
                bias += tl.sum(weight.to(tl.float32) * latent[None, :], axis=1)
            logits += bias.to(w2.dtype.element_ty).to(tl.float32)  # rounded as the product of the modules is
        peak = tl.max(logits, axis=0)
        rest = tl.sum(tl.exp(logits - peak), axis=0) - 1.0
        margin = -tl.log(tl.maximum(rest, LEAST_REST))
        tl.store(margins + row, margin)

        if WIDTH == 1:  # the best alone, with certainty, the first among equals
            winner = tl.argmax(logits, axis=0)
            chosen = tl.load(candidates + row * CANDIDATES + winner)
            if HAS_IDS:
                chosen = tl.load(target_ids + chosen)
            tl.store(law_ids + row, chosen)
            tl.store(law_probs + row, 1.0)
        else:
            kept = place < WIDTH
            if WIDTH == CANDIDATES:
                values = logits
                first = tl.argmax(logits, axis=0)
            else:
                # One 64-bit key orders logits, equal ones by place: the bits of a float, made to order as integers, above the place.
                bits = logits.to(tl.int32, bitcast=True)
                ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
                keys = tl.sort((ordered << 32) | (0x7FFFFFFF - place).to(tl.int64), descending=True)
                order = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
                bits = (keys >> 32).to(tl.int32)
                values = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
                ids = tl.load(candidates + row * CANDIDATES + order, mask=kept, other=0)
                first = 0
            powers = tl.where(kept, tl.exp(tl.div_rn(values - peak, scale)), 0.0)
            probs = tl.div_rn(powers, tl.sum(powers, axis=0))
            probs = tl.where(temperature == 0.0, (place == first).to(tl.float32), probs)
            if HAS_IDS:
                ids = tl.load(target_ids + ids, mask=kept, other=0)
            tl.store(law_ids + row * WIDTH + place, ids, mask=kept)
            tl.store(law_probs + row * WIDTH + place, probs, mask=kept)

        if HAS_HEAD:
            logit = tl.load(head_bias).to(tl.float32)
            for start in range(0, HIDDEN, HIDDEN_BLOCK):
                column = start + tl.arange(0, HIDDEN_BLOCK)
                real = column < HIDDEN
                state = tl.load(hidden + row * HIDDEN + column, mask=real, other=0.0).to(tl.float32)
                logit += tl.sum(state * tl.load(head_weight + column, mask=real, other=0.0).to(tl.float32), axis=0)
            if HEAD_READS_MARKOV:
                for start in range(0, RANK, RANK_BLOCK):
                    column = start + tl.arange(0, RANK_BLOCK)
                    real = column < RANK
                    latent = tl.load(w1 + previous * RANK + column, mask=real, other=0.0).to(tl.float32)
                    logit += tl.sum(latent * tl.load(head_weight + HIDDEN + column, mask=real, other=0.0).to(tl.float32), axis=0)
            logit = logit.to(head_weight.dtype.element_ty).to(tl.float32)
            if HAS_HEAD_TEMPERATURES:
                logit = tl.div_rn(logit, tl.load(head_temperatures + k))
        else:
            logit = margin
        tl.store(confidences + row, tl.sigmoid(logit))

        if WIDTH == 1:
            previous = chosen
        else:
            key = row_key(seed, base_len + k, purpose, salt)
            race = tl.where(kept, tl.div_rn(probs, exponential(key, ids.to(tl.int32))), -1.0)
            winner = tl.argmax(race, axis=0)
            previous = tl.sum(tl.where(place == winner, ids, 0), axis=0)
        tl.store(tokens + row, previous)
