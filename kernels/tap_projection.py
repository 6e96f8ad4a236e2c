"""Context features of chosen tokens: RMSNorm(W_c · concat(taps)) (DSpark section 3.1).

::

    taps         m tensors [T, d]   outputs of the tapped layers, all with the same strides, columns dense
    rows         [n] int64          the tokens whose features are wanted; below 0: padding, comes out as zeros
    weight       [f, m * d]         W_c
    norm_weight  [f]
    features     [n, f]

The kernel gathers the chosen rows of all taps into their concatenation in one launch, so that no concatenation of all T rows
is made; the product is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.kernels.rms_norm import rms_norm

BLOCK = 1024


def project_taps(taps: Sequence[Tensor], rows: Tensor, weight: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """Features of the chosen rows, in the dtype of ``weight``."""
    return rms_norm(F.linear(gather_taps(taps, rows).to(weight.dtype), weight), norm_weight, eps)


def gather_taps(taps: Sequence[Tensor], rows: Tensor) -> Tensor:
    """[n, m * d]: the chosen rows of all taps side by side."""
    return launch(taps, rows) if rows.is_cuda else reference(taps, rows)


def reference(taps: Sequence[Tensor], rows: Tensor) -> Tensor:
    """``gather_taps`` in plain torch."""
    at = rows.clamp(min=0)
    chosen = torch.cat([tap.index_select(0, at) for tap in taps], dim=-1)
    return chosen.masked_fill_((rows < 0).unsqueeze(1), 0.0)


def launch(taps: Sequence[Tensor], rows: Tensor) -> Tensor:
    """``gather_taps`` by the Triton kernel."""
    from triton import cdiv

    from dspark.kernels import layer_triton as code

    count, size = rows.shape[0], taps[0].shape[1]
    assert {(tap.stride(), tap.dtype) for tap in taps} == {((taps[0].stride(0), 1), taps[0].dtype)}
    out = taps[0].new_empty(count, len(taps) * size)
    if count:
        code.gather_taps[(count, cdiv(size, BLOCK))](tuple(taps), rows, out, size, taps[0].stride(0), NUM_TAPS=len(taps), BLOCK=BLOCK)
    return out
