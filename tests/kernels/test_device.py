"""Threads take the GPU of what they run; what is no GPU is left alone."""

from __future__ import annotations

import pytest
import torch

from dspark.kernels.device import use_device


def test_only_a_gpu_with_a_number_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("cpu", "cuda", "cuda:1"):
        use_device(torch.device(name))
    assert taken == [torch.device("cuda:1")]
