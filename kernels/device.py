"""Which GPU a thread launches kernels on, and how."""

from __future__ import annotations

from functools import lru_cache

import torch


def use_device(device: torch.device) -> None:
    """Make a GPU this thread's own: Triton launches on that of the thread, wherever the tensors are. Nothing happens for other devices."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


@lru_cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended (``chain_triton.py``): on Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
