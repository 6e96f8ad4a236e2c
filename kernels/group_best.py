"""A few candidates of each row of logits in one launch: the best of each of K groups of columns.

::

    values   [N, V]           fp32 or bf16; rows contiguous
    best     [N, K]           group g holds columns g, g + K, g + 2K, …; values of its largest, the first among equals
    columns  [N, K] int64     where they are

A sequential head that only sees K candidates of a position (``markov_sample``) would like the K largest. Finding those takes a radix
select, a dozen launches and several passes over the logits; this reads them once. What is lost is a token that shares its group with a
larger one: of two candidates, one time in K.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dspark.kernels.device import launches_early

MEMBERS = 128  # of a group that are looked at together
GROUPS = 64  # a program


def best_of_groups(values: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The best of each group: ([N, K], [N, K] int64); K is at most V."""
    assert values.is_contiguous()
    assert 0 < num_groups <= values.shape[1]
    return (launch if values.is_cuda else reference)(values, num_groups)


def reference(values: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """``best_of_groups`` in plain torch."""
    num_rows, width = values.shape
    members = -(-width // num_groups)
    padded = values.new_full((num_rows, members * num_groups), -math.inf)
    padded[:, :width] = values
    best, member = padded.view(num_rows, members, num_groups).max(dim=1)
    return best, member * num_groups + torch.arange(num_groups, device=values.device)


def launch(values: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """``best_of_groups`` by the Triton kernel, one program a row and ``GROUPS`` groups."""
    from dspark.kernels.group_best_triton import best_of_groups as kernel

    num_rows, width = values.shape
    best = values.new_empty(num_rows, num_groups)
    columns = torch.empty(num_rows, num_groups, dtype=torch.int64, device=values.device)
    is_chained = launches_early(values.device)
    kernel[(num_rows, -(-num_groups // GROUPS))](
        values,
        best,
        columns,
        WIDTH=width,
        NUM_GROUPS=num_groups,
        MEMBERS=MEMBERS,
        GROUPS=GROUPS,
        IS_CHAINED=is_chained,
        num_warps=4,
        launch_pdl=is_chained,
    )
    return best, columns
