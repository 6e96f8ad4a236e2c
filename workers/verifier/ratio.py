"""The arithmetic of the ratio rule (DSpark section 3.1), as functions of laws: nothing is drawn here.

::

    target            [B, V]  the target's law at a row, each row sums to 1
    ids, probs        [B, k]  the law the row's draft was drawn from; unused places hold probability 0 (and any id)
    tokens            [B]     the drafted tokens

A round over drafts x_1 .. x_n: x_j stands with ``accept_probability``; the first that falls is replaced by a draw from
``residual_weights``; if all stand, the next token comes from the target's law at the next row. Whether a draft was trimmed
there does not matter: nothing was rejected, so there is no residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.types import DraftLaw


def accept_probability(target_prob: Tensor, draft_prob: Tensor) -> Tensor:
    """min(1, target / draft) at drafted tokens; 0 where the draft law denies the token that it was said to give."""
    return torch.where(draft_prob > 0, (target_prob / draft_prob).clamp(max=1.0), 0.0)


def residual_weights(target: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    """max(0, target - draft), not normalised [B, V]: the law of the token that replaces a rejected draft.

    Where rounding leaves nothing at all (the two laws are equal) it is the target's law.
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
