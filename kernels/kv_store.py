"""Write new tokens' keys and values to their slots of the paged KV.

::

    key    [T, Hkv, D]      value [T, Hkv, Dv]      any strides
    caches [S, Hkv, D]      and [S, Hkv, Dv], contiguous
    slots  [T] integer      where each token's KV goes; -1: nowhere (padding)
"""

from __future__ import annotations

from torch import Tensor

from dspark.kernels.ragged_attention import power_of_2


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
