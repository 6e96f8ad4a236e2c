"""Row counts that steps and matrix products are padded to: on a CPU in 16-bit types, and for CUDA graphs.

On a CPU a library compiles a kernel for every new number of rows: 1.2 ms for each weight shape on two cores where the product itself
takes 0.2 ms, so that a step of a size that never ran before takes 20 ms longer than the same step again. Steps of a serving engine
have any size; padded to few sizes, nearly all of them have been compiled before. A CUDA graph is captured for one size of a step.
"""

from __future__ import annotations

import torch

SMALL = 16  # every size up to here is its own


def bucket(num_rows: int) -> int:
    """The size that ``num_rows`` is padded to: at most an eighth more beyond 64."""
    if num_rows <= SMALL:
        return num_rows
    step = 8 if num_rows <= 128 else 16 if num_rows <= 256 else 32
    return -(-num_rows // step) * step


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether padding pays on this device."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def padded_size(num_rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """``bucket`` where it pays, otherwise the size as it is."""
    return bucket(num_rows) if pays(device, dtype) else num_rows


def pad_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[n, ...] with rows of zeros up to ``padded_size``; the tensor itself if there is nothing to add."""
    size = padded_size(tensor.shape[0], tensor.device, tensor.dtype)
    if size == tensor.shape[0]:
        return tensor
    padded = tensor.new_zeros(size, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    return padded


def graph_sizes(largest: int) -> tuple[int, ...]:
    """The token counts that graphs are captured for, rising; ``largest`` is the last. Padding is at most 7 below 128, then 15, 31, 127."""
    sizes = [size for size in (1, 2, 4, *(range(8, 128, 8)), *range(128, 256, 16), *range(256, 512, 32)) if size < largest]
    return (*sizes, *range(512, largest, 128), largest)
