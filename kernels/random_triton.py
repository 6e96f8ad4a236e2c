"""The numbers of ``keyed_random`` inside Triton kernels, bit for bit up to the last operation (a logarithm)."""

# mypy: ignore-errors
# (triton's decorator and the arguments of kernels have no types)

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels import keyed_random

GOLDEN = tl.constexpr(keyed_random._GOLDEN)
FIRST64 = tl.constexpr(keyed_random._MIX64[0])
SECOND64 = tl.constexpr(keyed_random._MIX64[1])
FIRST32 = tl.constexpr(keyed_random._MIX32[0])
SECOND32 = tl.constexpr(keyed_random._MIX32[1])
UNIT = tl.constexpr(keyed_random._UNIT)
PURPOSES = tl.constexpr(keyed_random.NUM_PURPOSES)


@triton.jit
def mix64(word):
    word = (word ^ ((word >> 30) & 0x3FFFFFFFF)) * FIRST64
    word = (word ^ ((word >> 27) & 0x1FFFFFFFFF)) * SECOND64
    return word ^ ((word >> 31) & 0x1FFFFFFFF)


@triton.jit
def row_key(seed, position, purpose, salt):
    """The 64-bit key of a row of numbers; int64 all."""
    key = mix64(seed + GOLDEN)
    key = mix64(key + position * GOLDEN)
    return mix64(key + (salt * PURPOSES + purpose + 1) * GOLDEN)


@triton.jit
def exponential(key, ids):
    """Exp(1) numbers of ids (int32) under a key."""
    word = (ids ^ ((ids >> 16) & 0xFFFF)) * FIRST32
    word = (word ^ ((word >> 15) & 0x1FFFF)) * SECOND32
    word = word ^ ((word >> 16) & 0xFFFF)
    word = (word ^ key.to(tl.int32)) * FIRST32
    word = (word ^ (word >> 15)) + (key >> 32).to(tl.int32)
    word = word * SECOND32
    word = word ^ ((word >> 16) & 0xFFFF)
    unit = -(tl.abs(word.to(tl.float32) + 0.25) * UNIT)
    whole = 1.0 + unit  # log1p: what the addition rounds away is put back by the quotient
    return -tl.where(whole == 1.0, unit, tl.log(whole) * tl.div_rn(unit, tl.where(whole == 1.0, 1.0, whole - 1.0)))


@triton.jit
def uniform(key):
    """A uniform between 0 and 1, fp64."""
    return (((key >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) + 0.5) * 2.220446049250313e-16
