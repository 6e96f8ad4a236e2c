"""Rotary embedding of queries and keys in one pass, with the norm that some models put on every head first.

::

    heads     [T, H + Hkv (+ more), D]   queries, keys (and values, left alone) of one merged projection; heads and columns dense
    cos, sin  [T, D]                     as transformers gives them: column i of a head turns with column i + D / 2
    query_norm, key_norm  [D]            weights of an RMSNorm over D (Qwen3), or None
    out       [T, H + Hkv, D]            queries, then keys

Computed in fp32 by the kernel, in the dtype of ``heads`` by the reference. ``cos_sin`` makes cos and sin [T, D] from positions [T] and
frequencies [D / 2] fp32, whose factor ``scale`` some kinds of scaling use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS_A_PROGRAM = 8


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of each query and key head before it turns."""

    query: Tensor
    key: Tensor
    eps: float


def rotate_heads(heads: Tensor, cos: Tensor, sin: Tensor, num_query: int, num_key: int, norms: HeadNorms | None = None) -> Tensor:
    """Queries and keys of the first ``num_query + num_key`` heads, normed and turned."""
    run = launch if heads.is_cuda else reference
    return run(heads, cos, sin, num_query, num_key, norms)


def reference(heads: Tensor, cos: Tensor, sin: Tensor, num_query: int, num_key: int, norms: HeadNorms | None = None) -> Tensor:
    """``rotate_heads`` in plain torch."""
    turning = heads[:, : num_query + num_key]
    if norms is not None:
        query = F.rms_norm(turning[:, :num_query], norms.query.shape, norms.query, norms.eps)
        key = F.rms_norm(turning[:, num_query:], norms.key.shape, norms.key, norms.eps)
        turning = torch.cat([query, key], dim=1)
    left, right = turning.chunk(2, dim=-1)
    return turning * cos.unsqueeze(1) + torch.cat((-right, left), dim=-1) * sin.unsqueeze(1)


def launch(heads: Tensor, cos: Tensor, sin: Tensor, num_query: int, num_key: int, norms: HeadNorms | None = None) -> Tensor:
    """``rotate_heads`` by the Triton kernel, a program for every few heads of a token."""
    from triton import cdiv, next_power_of_2

    from dspark.kernels.layer_triton import rotate

    tokens, _, dim = heads.shape
    count = num_query + num_key
    assert (heads.stride(2), heads.stride(1), cos.stride(1), sin.stride(1), cos.shape[1]) == (1, dim, 1, 1, dim)
    out = heads.new_empty(tokens, count, dim)
    if tokens:
        rotate[(tokens, cdiv(count, HEADS_A_PROGRAM))](
            heads,
            cos,
            sin,
            heads if norms is None else norms.query,
            heads if norms is None else norms.key,
            out,
            heads.stride(0),
            cos.stride(0),
            sin.stride(0),
            0.0 if norms is None else norms.eps,
            QUERY_HEADS=num_query,
            HEADS=count,
            HALF=dim // 2,
            HAS_NORM=norms is not None,
            HEAD_BLOCK=HEADS_A_PROGRAM,
            BLOCK=next_power_of_2(dim // 2),
        )
    return out


def cos_sin(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of positions [T]."""
    return (launch_cos_sin if positions.is_cuda else reference_cos_sin)(positions, frequencies, scale, dtype)


def reference_cos_sin(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``cos_sin`` in plain torch."""
    angles = positions.unsqueeze(-1).to(torch.float32) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def launch_cos_sin(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``cos_sin`` by the Triton kernel, a program for every token."""
    from triton import next_power_of_2

    from dspark.kernels.layer_triton import angles

    tokens, half = positions.shape[0], frequencies.shape[0]
    assert positions.is_contiguous()
    cos, sin = (torch.empty(tokens, 2 * half, dtype=dtype, device=positions.device) for _ in range(2))
    if tokens:
        angles[(tokens,)](positions, frequencies, cos, sin, scale, HALF=half, BLOCK=next_power_of_2(half), num_warps=1)
    return cos, sin
