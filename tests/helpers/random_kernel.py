"""A kernel that writes down random numbers, to compare them with those of ``keyed_random``."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark.kernels.random_triton import exponential, row_key


@triton.jit
def _write(seeds, positions, purpose, salts, ids, out, COUNT: tl.constexpr):
    row = tl.program_id(0)
    place = tl.arange(0, COUNT)
    key = row_key(tl.load(seeds + row), tl.load(positions + row), purpose, tl.load(salts + row))
    tl.store(out + row * COUNT + place, exponential(key, tl.load(ids + place)))


def exponentials(seeds: Tensor, positions: Tensor, purpose: int, salts: Tensor, ids: Tensor) -> Tensor:
    """[R, n] of keys [R] and ids [n]."""
    out = torch.empty(len(seeds), len(ids), device=seeds.device)
    _write[(len(seeds),)](seeds, positions, purpose, salts, ids, out, COUNT=len(ids))
    return out
