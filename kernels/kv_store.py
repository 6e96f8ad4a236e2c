"""Write new tokens' keys and values to their slots of the paged KV.

::

    key    [T, Hkv, D]      value [T, Hkv, Dv]      any strides
    caches [S, Hkv, D]      and [S, Hkv, Dv], contiguous
    slots  [T] integer      where each token's KV goes; -1: nowhere (padding)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dspark.kernels.device import launches_early
from dspark.kernels.ragged_attention import power_of_2
from dspark.kernels.rotary import HEADS_A_PROGRAM, HeadNorms, rotate_heads


@dataclass(frozen=True, slots=True)
class Projected:
    """A layer's merged projection heads [T, H + 2 * Hkv, D] (queries, keys, values), and how queries and keys are to be turned."""

    heads: Tensor
    cos: Tensor
    sin: Tensor
    num_query: int
    num_key: int
    norms: HeadNorms | None = None


def rotate_and_store(new: Projected, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> Tensor:
    """``rotate_heads`` and ``store_kv`` in one launch: the turned queries [T, H, D]."""
    if new.heads.is_cuda:
        return launch_rotating(new, key_cache, value_cache, slots)
    turned = rotate_heads(new.heads, new.cos, new.sin, new.num_query, new.num_key, new.norms)
    rotated = new.num_query + new.num_key
    store_kv(turned[:, new.num_query :], new.heads[:, rotated:], key_cache, value_cache, slots)
    return turned[:, : new.num_query]


def launch_rotating(new: Projected, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> Tensor:
    """``rotate_and_store`` by the Triton kernel, a program for every few heads of a token."""
    from dspark.kernels import attention_triton as code

    heads, norms = new.heads, new.norms
    tokens, count, dim = heads.shape
    assert (heads.stride(2), heads.stride(1), new.cos.stride(1), new.sin.stride(1), new.cos.shape[1]) == (1, dim, 1, 1, dim)
    assert all(cache.is_contiguous() and cache.shape[1:] == (new.num_key, dim) for cache in (key_cache, value_cache))
    assert count == new.num_query + 2 * new.num_key
    query = heads.new_empty(tokens, new.num_query, dim)
    code.rotate_store[(tokens, -(-count // HEADS_A_PROGRAM))](
        heads,
        new.cos,
        new.sin,
        heads if norms is None else norms.query,
        heads if norms is None else norms.key,
        query,
        key_cache,
        value_cache,
        slots,
        heads.stride(0),
        new.cos.stride(0),
        new.sin.stride(0),
        0.0 if norms is None else norms.eps,
        QUERY_HEADS=new.num_query,
        KEY_HEADS=new.num_key,
        HALF=dim // 2,
        HAS_NORM=norms is not None,
        HEAD_BLOCK=HEADS_A_PROGRAM,
        BLOCK=power_of_2(dim // 2),
        IS_CHAINED=launches_early(heads.device),
        num_warps=2,
        launch_pdl=launches_early(heads.device),
    )
    return query


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Store every token that has a slot; two tokens must not share one. On CUDA nothing waits for the device."""
    if key.is_cuda:
        launch(key, value, key_cache, value_cache, slots)
        return
    kept = (slots >= 0).nonzero().squeeze(1)
    at = slots[kept].long()
    key_cache.index_copy_(0, at, key[kept])
    value_cache.index_copy_(0, at, value[kept])


def launch(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Run the Triton kernel."""
    from dspark.kernels import attention_triton as code

    assert all(cache.is_contiguous() for cache in (key_cache, value_cache))
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    key_size, value_size = key_cache[0].numel(), value_cache[0].numel()
    code.store_kv[(key.shape[0],)](
        key,
        value,
        key_cache,
        value_cache,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        KEY_DIM=key.shape[2],
        VALUE_DIM=value.shape[2],
        KEY_BLOCK=power_of_2(key_size),
        VALUE_BLOCK=power_of_2(value_size),
    )
