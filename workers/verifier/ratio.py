"""The arithmetic of the ratio rule (DSpark section 3.1), as functions of laws: nothing is drawn here.

::

    target            [B, V]  the target's law at a row, each row sums to 1
    ids, probs        [B, k]  the law the row's draft was drawn from; unused places hold probability 0 (and any id)
    tokens            [B]     the drafted tokens

Drafts are verified as a block (Sun et al. 2024, "Block verification accelerates speculative decoding"). Of a round over
drafts x_1 .. x_n let r_j = target(x_j) / draft(x_j), p_0 = 1 and p_j = min(1, p_{j-1} r_j): the joint ratio. Prefix x_1 .. x_j is
taken with

    h_n = p_n,    h_j = (p_j - s_j) / (1 - s_j)  for j < n,    s_j = sum_v min(p_j target(v), draft(v)) at the row behind x_j

independently for every j, and the longest prefix taken stands. Behind it comes a draw from max(0, p_j target - draft), or, when
all n stand, from the target's law at the next row. Then P(at least j stand | x_1 .. x_j) = p_j, wherever the draft ends behind x_j:

* as for acceptance token by token, the law of the text is the target's if no draft decides about its own verification, for
  the end of the verified draft may depend on the drafts before it and on nothing behind;
* p_j is at least the product of min(1, r_i) over i <= j, which token by token would give: no round accepts less on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dspark.types import DraftLaw


def token_ratios(target_prob: Tensor, draft_prob: Tensor) -> Tensor:
    """target / draft at drafted tokens; 0 where the draft law denies the token that it was said to give."""
    return torch.where(draft_prob > 0, target_prob / draft_prob, 0.0)


def accept_probability(target_prob: Tensor, draft_prob: Tensor) -> Tensor:
    """min(1, target / draft): what a drafted token is accepted with by itself."""
    return token_ratios(target_prob, draft_prob).clamp(max=1.0)


def block_chances(ratios: Tensor, support: Tensor, probs: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(joint [B], chance [B]) of the drafts of several rounds in a row, round i owning ``counts[i]`` of them, all fp64.

    ``ratios`` [B] are r_j (0 where the draft law denies the token); ``support`` [B, k] is the target's law at the ids of the
    draft law ``probs``. ``joint`` is p_{j-1}, the joint ratio before the draft; ``chance`` is h_j.
    """
    before = _joint_ratios(ratios, counts)
    after = (before * ratios).clamp(max=1.0)
    shared = torch.minimum(before.unsqueeze(1) * support, probs).sum(-1)
    behind = torch.cat((shared[1:], shared.new_zeros(1)))  # s_j belongs to the draft behind x_j
    ends = torch.tensor([end - 1 for end in accumulate(counts) if end], dtype=torch.int64, device=ratios.device)
    behind[ends] = 0.0
    chance = ((after - behind) / (1.0 - behind)).clamp(0.0, 1.0)
    return before, torch.where(after < 1.0, chance, 1.0)  # 0 / 0 where both laws behind are one


def _joint_ratios(ratios: Tensor, counts: Sequence[int]) -> Tensor:
    """p_{j-1} of every draft [B]."""
    rounds = [(i, j) for i, count in enumerate(counts) for j in range(count)]
    index = torch.tensor(rounds, dtype=torch.int64, device=ratios.device).view(-1, 2).unbind(1)
    table = ratios.new_ones(len(counts), max(counts, default=0) + 1)
    padded = ratios.new_zeros(table.shape).index_put_(index, ratios)
    for j in range(1, table.shape[1]):
        table[:, j] = (table[:, j - 1] * padded[:, j - 1]).clamp(max=1.0)
    return table[index]


def residual_weights(target: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    """max(0, target - draft), not normalised [B, V]: the law of the token that replaces a rejected draft.

    ``target`` may be the target's law times a joint ratio. Where rounding leaves nothing at all (the two laws are equal) it is
    the target's law.
    """
    residual = target.scatter_add(1, ids, -probs).clamp_(min=0.0)
    return torch.where(residual.amax(-1, keepdim=True) > 0, residual, target)


def shrink(left: Tensor, total: Tensor, ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """What a rejected candidate leaves for its next sibling: max(0, left - total * draft) and its sum, not normalised.

    ``left`` [B, V] with sums ``total`` [B] fp64 is what its predecessors left, in proportion to the law that it was tried
    against. Where nothing would remain at all, left and total stay as they are.
    """
    smaller = left.scatter_add(1, ids, -(total[:, None] * probs).to(left.dtype)).clamp_(min=0.0)
    sums = smaller.sum(-1, dtype=torch.float64)
    is_left = sums > 0
    return torch.where(is_left[:, None], smaller, left), torch.where(is_left, sums, total)


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Some drafted tokens with the law of each: tokens [B], ids and probs [B, k], token_probs [B]."""

    tokens: Tensor
    ids: Tensor
    probs: Tensor
    token_probs: Tensor

    @staticmethod
    def gather(tokens: Sequence[int], laws: Sequence[tuple[int, DraftLaw | None]], device: torch.device) -> DraftRows:
        """Lay out tokens and, for each run of them, (length, law rows or None for one-hot), padded to the widest law.

        A law that denies its own token is not the law it was drawn from. It is forgotten, its token is never accepted, and
        the target draws alone: still exactly the target's law.
        """
        width = max((law.ids.shape[1] for _, law in laws if law is not None), default=1)
        token_ids = torch.tensor(tokens, dtype=torch.int64, device=device)
        ids = torch.zeros(len(tokens), width, dtype=torch.int64, device=device)
        probs = torch.zeros(len(tokens), width, device=device)
        start = 0
        for count, law in laws:
            stop = start + count
            if law is None:
                ids[start:stop, 0] = token_ids[start:stop]
                probs[start:stop, 0] = 1.0
            else:
                ids[start:stop, : law.ids.shape[1]] = law.ids.to(device)
                probs[start:stop, : law.probs.shape[1]] = law.probs.to(device)
            start = stop
        token_probs = (probs * (ids == token_ids[:, None])).sum(-1)
        probs.mul_((token_probs > 0)[:, None])
        return DraftRows(token_ids, ids, probs, token_probs)
