"""Random numbers that are a pure function of (seed, position, purpose, id, salt): no state, no stream, no order.

::

    seeds, positions   int64 tensors, any shapes that broadcast       the request's seed; the token position drawn for
    purpose, salt      int, or int64 tensors that broadcast as well    what the number is for; see the constants
    ids                integer tensor that broadcasts as well          token ids
    result             fp32 (exponential, gumbel) or fp64 (uniform)

Verifier and drafter call these with equal keys and get equal numbers, whatever the batch row, the step, the batch size
or the device: the hashing is integer arithmetic modulo 2^32 and 2^64, the same on CPU and GPU bit for bit, and what
follows is elementwise.

One 64-bit key is mixed per (seed, position, purpose, salt) and one 32-bit word per id; a short chain joins the two,
so that a row of V numbers costs about ten 32-bit operations an id. A row's numbers have 32 bits: ``exponential`` comes
from u = (j + 1/2) / 2^32, so that a race between exponentials follows the wanted law to about 2^-32.

The multipliers are published ones: splitmix64 (Steele, Lea and Flood 2014) for keys, lowbias32 (Wellons 2018) for ids.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dspark.kernels.top import first_argmax

TOKEN = 0  # the target's token at a position (coupled rule), and the target's own draw there (ratio rule)
ACCEPT = 1  # the uniform that accepts or rejects a draft at a position (ratio rule)
DRAFT = 2  # the drafter's draw (ratio rule); its salt is the round's base_len, so that a redrafted position draws afresh

NUM_PURPOSES = 16
CHUNK_ELEMENTS = 1 << 17  # rows a race works on at once on CPU: what stays in a core's cache


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of an unsigned constant."""
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN = _signed(0x9E3779B97F4A7C15, 64)
_MIX64 = (_signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64))
_MIX32 = (0x7FEB352D, _signed(0x846CA68B, 32))
# fp32(|h|) reaches 2^31; this factor keeps u below 1, so that no exponential is infinite.
_UNIT = (2.0**24 - 1) * 2.0**-55


def _mix64(word: Tensor) -> Tensor:
    """A bijection of int64 in which every bit of the input reaches every bit of the output."""
    word = (word ^ ((word >> 30) & (2**34 - 1))) * _MIX64[0]
    word = (word ^ ((word >> 27) & (2**37 - 1))) * _MIX64[1]
    return word ^ ((word >> 31) & (2**33 - 1))


def _key(seeds: Tensor, positions: Tensor, purpose: int | Tensor, salt: int | Tensor) -> Tensor:
    """The 64-bit key of a row of random numbers, int64, of the broadcast shape."""
    key = _mix64(seeds + _GOLDEN)
    key = _mix64(key + positions * _GOLDEN)
    tag = salt * NUM_PURPOSES + purpose + 1
    stride = _signed(tag * _GOLDEN % 2**64, 64) if isinstance(tag, int) else tag * _GOLDEN
    return _mix64(key + stride)


def _mix_ids(ids: Tensor) -> Tensor:
    """A bijection of int32 words; costs one row however many keys meet it."""
    word = ids.to(torch.int32)
    word = (word ^ ((word >> 16) & 0xFFFF)) * _MIX32[0]
    word = (word ^ ((word >> 15) & 0x1FFFF)) * _MIX32[1]
    return word ^ ((word >> 16) & 0xFFFF)


@lru_cache(maxsize=16)
def _vocabulary(width: int, device: torch.device) -> Tensor:
    """The mixed words of ids 0 .. width - 1."""
    return _mix_ids(torch.arange(width, dtype=torch.int32, device=device))


def _exponential(key: Tensor, id_words: Tensor) -> Tensor:
    """Exponentials of the broadcast of keys and mixed ids, fp32 in [2^-33, 16.7]."""
    halves = key.unsqueeze(-1).contiguous().view(torch.int32)
    word = id_words ^ halves[..., 0]
    # The first shift may keep its sign bits (one operation fewer): the second key half follows, so nothing is lost by it.
    word = word.mul_(_MIX32[0]).bitwise_xor_(word >> 15).add_(halves[..., 1])
    word = word.mul_(_MIX32[1]).bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))
    # |word + 1/4| takes 2^32 different values and is finest next to 0, where the winner of a race is found.
    unit = word.to(torch.float32).add_(0.25).abs_().mul_(-_UNIT)
    return unit.log1p_().neg_()


def exponential(seeds: Tensor, positions: Tensor, purpose: int | Tensor, ids: Tensor, salt: int | Tensor = 0) -> Tensor:
    """Independent Exp(1) numbers for every (key, id) of the broadcast shape, fp32, over 0 and finite."""
    return _exponential(_key(seeds, positions, purpose, salt), _mix_ids(ids))


def gumbel(seeds: Tensor, positions: Tensor, purpose: int | Tensor, ids: Tensor, salt: int | Tensor = 0) -> Tensor:
    """Independent standard Gumbel numbers, fp32: minus the logarithm of ``exponential`` at the same key."""
    return exponential(seeds, positions, purpose, ids, salt).log_().neg_()


def uniform(seeds: Tensor, positions: Tensor, purpose: int | Tensor, salt: int | Tensor = 0) -> Tensor:
    """Independent uniforms strictly between 0 and 1 for every key, fp64 with 52 bits."""
    key = _key(seeds, positions, purpose, salt)
    return (((key >> 12) & (2**52 - 1)).to(torch.float64) + 0.5) * 2.0**-52


def race(
    weights: Tensor, seeds: Tensor, positions: Tensor, purpose: int | Tensor = TOKEN, ids: Tensor | None = None, salt: int | Tensor = 0
) -> Tensor:
    """Draw one column a row with probability weight / sum of weights: the argmax of weight / exponential.

    weights [R, V] >= 0 with at least one over 0 a row; seeds, positions (and purpose, salt where tensors) [R];
    ids None (column = id), [V] or [R, V]. Returns columns [R] int64. Equal keys and ids give equal exponentials, so this
    is the argmax of log weight + ``gumbel``, and two laws raced under one key agree as often as they overlap.
    """
    keys = _key(seeds, positions, purpose, salt)[:, None]
    words = _vocabulary(weights.shape[1], weights.device) if ids is None else _mix_ids(ids)
    num_rows = weights.shape[0]
    chunk = num_rows if weights.is_cuda else max(1, CHUNK_ELEMENTS // weights.shape[1])
    if num_rows <= chunk:
        return first_argmax(weights / _exponential(keys, words))
    winners = []
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        row_words = words[rows] if words.dim() == 2 else words
        winners.append(first_argmax(weights[rows] / _exponential(keys[rows], row_words)))
    return torch.cat(winners)
