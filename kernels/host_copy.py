"""Copies from the device to the host that nobody waits for until they are read."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """``value`` of any shape, on its way into the beginning of ``host``, which is pinned where the device is a GPU."""

    def __init__(self, value: Tensor, host: Tensor) -> None:
        self._host = host.flatten()[: value.numel()].view(value.shape)
        self._host.copy_(value, non_blocking=True)
        self._done: torch.cuda.Event | None = None
        if value.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def read(self, count: int | None = None) -> Tensor:
        """Wait for it: its first ``count`` rows, as a tensor of their own (the buffer is filled again)."""
        if self._done is not None:
            self._done.synchronize()
        return self._host[:count].clone()
