"""The loss of DSpark section 3.3 over many block positions, a few at a time, with its gradients computed on the way.

::

    N rows       block positions of one batch
    hidden       [N, d]    h_k                      latent  [N, r]   W2 @ latent is the Markov bias (r = 0 without a head)
    target       [N, d]    target's hidden states at the positions whose law the row should meet
    labels       [N]       x*_k                     weights [N]      w_k, 0 for rows that do not count
    z = softcap(hidden @ head^T) + latent @ w2^T    draft = softmax(z)     law = softmax(softcap(target @ head^T))

    loss     = sum_n w_n (ce * -log draft[label] + l1 * ||draft - law||_1)
    overlap  [N] = 1 - ||draft - law||_1 / 2        (what a drafted token is accepted with)
    dloss/dz = w (draft * (l1 * (s - <draft, s>) + ce) - ce * onehot(label)),   s = sign(draft - law)

Nothing of size [N, V] outlives its chunk: forward turns each chunk's dz into gradients of hidden, latent and w2 at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dspark.workers.drafter.target_head import TargetHead


@dataclass(frozen=True, slots=True)
class LawTerms:
    """Weights of the two terms, the chunk, and the frozen head."""

    cross_entropy: float
    law: float
    chunk_rows: int
    head: TargetHead
    compile: bool = False


@dataclass(frozen=True, slots=True)
class LawRows:
    """What the rows are to be compared with; no gradients flow here."""

    target: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class LawResult:
    """``loss`` is the weighted sum, differentiable; the rest is [N] and detached. ``is_match``: draft's argmax is the label."""

    loss: Tensor
    cross_entropy: Tensor
    overlap: Tensor
    is_match: Tensor


def law_loss(hidden: Tensor, latent: Tensor | None, w2: Tensor | None, rows: LawRows, terms: LawTerms) -> LawResult:
    """Loss and measurements of all rows; gradients reach hidden, latent and w2."""
    if latent is None or w2 is None:
        latent, w2 = hidden.new_zeros(len(hidden), 0), hidden.new_zeros(terms.head.vocab_size, 0)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _ChunkedLoss.apply(hidden, latent, w2, rows, terms)  # type: ignore[no-untyped-call]
    return LawResult(*found)


class _ChunkedLoss(torch.autograd.Function):
    """Forward computes the gradients too; backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, latent: Tensor, w2: Tensor, rows: LawRows, terms: LawTerms) -> tuple[Tensor, ...]:
        head = terms.head
        compute = head.lm_head.dtype
        inputs = (hidden.to(compute), latent.to(compute), w2.to(compute))
        grads = (torch.empty_like(inputs[0]), torch.empty_like(inputs[1]), torch.zeros_like(w2, dtype=torch.float32))
        count = len(hidden)
        entropy, overlap = hidden.new_empty(count, dtype=torch.float32), hidden.new_empty(count, dtype=torch.float32)
        is_match = torch.empty(count, dtype=torch.bool, device=hidden.device)
        law = _law_gradient(terms.compile)
        for begin in range(0, count, terms.chunk_rows):
            part = slice(begin, begin + terms.chunk_rows)
            h, m = inputs[0][part], inputs[1][part]
            base = h @ head.lm_head.T
            bias = m @ inputs[2].T
            goal = rows.target[part].to(compute) @ head.lm_head.T
            found = law(base, bias, goal, rows.labels[part], rows.weights[part], terms.cross_entropy, terms.law, head.softcap)
            entropy[part], overlap[part], is_match[part], dbase, dbias = found
            grads[0][part] = dbase @ head.lm_head
            grads[1][part] = dbias @ inputs[2]
            grads[2].add_(dbias.T @ m)
        ctx.save_for_backward(*grads)
        ctx.dtypes = (hidden.dtype, latent.dtype, w2.dtype)
        loss = (rows.weights * (terms.cross_entropy * entropy + terms.law * 2.0 * (1.0 - overlap))).sum()
        ctx.mark_non_differentiable(entropy, overlap, is_match)
        return loss, entropy, overlap, is_match

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [(grad * upstream[0]).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*scaled, None, None)


Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@lru_cache(maxsize=2)
def _law_gradient(compiled: bool) -> Callable[..., Found]:
    return torch.compile(law_gradient, dynamic=True) if compiled else law_gradient


def law_gradient(
    base: Tensor, bias: Tensor, goal: Tensor, labels: Tensor, weights: Tensor, ce: float, l1: float, cap: float | None
) -> Found:
    """(cross-entropy, overlap, argmax is label, dloss/dbase, dloss/dbias) of a chunk, the last two [n, V] in base's dtype."""
    wide = torch.promote_types(base.dtype, torch.float32)
    logits, goals = base.to(wide), goal.to(wide)
    if cap is not None:
        logits, goals = torch.tanh(logits / cap) * cap, torch.tanh(goals / cap) * cap
    slope = None if cap is None else 1.0 - (logits / cap) ** 2
    z = logits + bias.to(wide)
    log_draft = torch.log_softmax(z, dim=-1)
    draft = log_draft.exp()
    difference = draft - torch.softmax(goals, dim=-1)
    distance = difference.abs().sum(-1)
    sign = difference.sign_()
    at = labels.unsqueeze(1)
    entropy = -log_draft.gather(1, at).squeeze(1)
    mean_sign = (draft * sign).sum(-1, keepdim=True)
    dz = draft * ((sign - mean_sign) * l1 + ce)
    dz.scatter_add_(1, at, torch.full_like(at, -ce, dtype=dz.dtype))
    dz = dz * weights.unsqueeze(1).to(wide)
    dbase = dz if slope is None else dz * slope
    return entropy, 1.0 - 0.5 * distance, z.argmax(-1) == labels, dbase.to(base.dtype), dz.to(base.dtype)
