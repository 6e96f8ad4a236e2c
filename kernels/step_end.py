"""What a step of the target leaves on the device for those who follow it before the host has read it.

::

    best    [L] int64   the best token behind every wanted row          ids [T] int64   the step's tokens
    wanted  [L] int64   the rows of the step that were asked for
    own     [L] int64   best, kept      matched [L] bool   whether the token behind a wanted row is its best one
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def note_best(best: Tensor, ids: Tensor, wanted: Tensor, own: Tensor, matched: Tensor) -> None:
    """Fill ``own`` and ``matched``."""
    (launch if best.is_cuda else reference)(best, ids, wanted, own, matched)


def reference(best: Tensor, ids: Tensor, wanted: Tensor, own: Tensor, matched: Tensor) -> None:
    """``note_best`` in plain torch."""
    own.copy_(best)
    behind = ids.index_select(0, (wanted + 1).clamp(max=len(ids) - 1))
    torch.eq(best, behind, out=matched)


def launch(best: Tensor, ids: Tensor, wanted: Tensor, own: Tensor, matched: Tensor) -> None:
    """``note_best`` by the Triton kernel."""
    from dspark.kernels.layer_triton import note_best as kernel

    count = best.shape[0]
    kernel[(-(-count // BLOCK),)](best, ids, wanted, own, matched, count, ids.shape[0], BLOCK=BLOCK)
