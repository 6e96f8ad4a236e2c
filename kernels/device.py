"""Which GPU a thread launches kernels on."""

from __future__ import annotations

import torch


def use_device(device: torch.device) -> None:
    """Make a GPU this thread's own: Triton launches on that of the thread, wherever the tensors are. Nothing happens for other devices."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
