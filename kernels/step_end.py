"""What a step of the target leaves on the device for those who follow it before the host has read it.

::

    best    [L] int64   the best token behind every wanted row          ids [T] int64   the step's tokens
    wanted  [L] int64   the rows of the step that were asked for
    own     [L] int64   best, kept      matched [L] bool   whether the token behind a wanted row is its best one

Behind a step that was judged by laws (``chain_judge.py``) ``own`` holds, from row ``first_rows[r]`` on, the drafts of request r that
stand, the target's token and then -1; ``matched`` says which of them are drafts.
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


def note_chains(tokens: Tensor, accepted: Tensor, first_rows: Tensor, counts: Tensor, own: Tensor, matched: Tensor) -> None:
    """Fill the rows of ``own`` and ``matched`` of the requests whose ``counts`` [R] drafts were judged; tokens [R, n + 1], accepted [R]."""
    if tokens.is_cuda:
        launch_chains(tokens, accepted, first_rows, counts, own, matched)
        return
    places = torch.arange(tokens.shape[1], device=tokens.device)
    inside = places <= counts.unsqueeze(1)
    rows = (first_rows.unsqueeze(1) + places)[inside].long()
    own[rows] = tokens[inside]
    matched[rows] = (places < accepted.unsqueeze(1))[inside]


def launch_chains(tokens: Tensor, accepted: Tensor, first_rows: Tensor, counts: Tensor, own: Tensor, matched: Tensor) -> None:
    """``note_chains`` by the Triton kernel."""
    from dspark.kernels.layer_triton import note_chains as kernel
    from dspark.kernels.ragged_attention import power_of_2

    count, length = tokens.shape
    kernel[(count,)](tokens, accepted, first_rows, counts, own, matched, LENGTH=length, BLOCK=power_of_2(length), num_warps=1)


def launch(best: Tensor, ids: Tensor, wanted: Tensor, own: Tensor, matched: Tensor) -> None:
    """``note_best`` by the Triton kernel."""
    from dspark.kernels.layer_triton import note_best as kernel

    count = best.shape[0]
    kernel[(-(-count // BLOCK),)](best, ids, wanted, own, matched, count, ids.shape[0], BLOCK=BLOCK)
