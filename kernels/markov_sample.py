"""The sequential loop of a drafted block in one launch: bias, truncation, draw and confidence of every position (DSpark 3.1, 3.2).

::

    base        [R, n, K]  fp32 or bf16   base logits of K candidates a position, in any order
    candidates  [R, n, K]  int64          their ids in the draft vocabulary
    anchors     [R]        int64          x_0
    w1          [V, r], w2 [Vd, r]        the vanilla Markov head: the bias of id v after token x is w2[v] · w1[x]; None: no head
    target_ids  [Vd]       int64          ids of the target's vocabulary, None where it is the draft's
    hidden      [R, n, d]                 h_1 .. h_n, read by the confidence head
    temperature [R] fp32; seeds, base_lens [R] int64; coupled [R] bool
    tokens      [R, n]     int64          x_1 .. x_n
    ids, probs  [R, n, W]  int64, fp32    the law each token was drawn from, W = min(width, K): from the best down, or all candidates
    margin, confidence [R, n] fp32        see ``draft_draw.log_odds``; without a head the confidence is sigmoid(margin)

One program does a request: its positions follow from one another, its candidates' bias is W2's rows times one latent, and the
truncation is a sort of K keys in registers. A law of all candidates keeps their order, and nothing is sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.kernels.draft_draw import draw, law_of, log_odds, truncate_law

RANK_BLOCK = 16  # columns of W1 and W2 at a time: CANDIDATES x RANK_BLOCK weights are held in registers
HIDDEN_BLOCK = 1024
MAX_CANDIDATES = 2048  # more would not fit the registers of a program


@dataclass(frozen=True, slots=True)
class BlockHeads:
    """The weights that the loop reads."""

    w1: Tensor | None
    w2: Tensor | None
    target_ids: Tensor | None
    confidence: ConfidenceWeights | None


@dataclass(frozen=True, slots=True)
class ConfidenceWeights:
    """weight [1, d] or, where the head reads w1[x_{k-1}] as well, [1, d + r]; bias [1]; temperatures [n or more] from calibration."""

    weight: Tensor
    bias: Tensor
    temperatures: Tensor | None


@dataclass(frozen=True, slots=True)
class BlockRows:
    """What the loop needs to know of each request: tensors [R]."""

    anchors: Tensor
    temperature: Tensor
    seeds: Tensor
    base_lens: Tensor
    coupled: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """The outcome; shapes in the module's docstring."""

    tokens: Tensor
    ids: Tensor
    probs: Tensor
    margin: Tensor
    confidence: Tensor


def markov_sample(base: Tensor, candidates: Tensor, hidden: Tensor, rows: BlockRows, heads: BlockHeads, width: int) -> Block:
    """Draw x_1 .. x_n left to right, each from its own law truncated to ``width`` of its candidates."""
    fits = base.is_cuda and base.shape[2] <= MAX_CANDIDATES
    return (launch if fits else reference)(base, candidates, hidden, rows, heads, width)


def reference(base: Tensor, candidates: Tensor, hidden: Tensor, rows: BlockRows, heads: BlockHeads, width: int) -> Block:
    """``markov_sample`` in plain torch."""
    previous, before, parts = rows.anchors, [], []
    for k in range(base.shape[1]):
        logits, chosen = base[:, k].to(torch.float32), candidates[:, k]
        latent = None if heads.w1 is None else F.embedding(previous, heads.w1)
        if latent is not None and heads.w2 is not None:
            logits = logits + torch.bmm(latent.unsqueeze(1), F.embedding(chosen, heads.w2).transpose(1, 2)).squeeze(1)
        margin = log_odds(logits)
        if width < base.shape[2]:
            local, probs = truncate_law(logits, rows.temperature, width)
            ids = chosen.gather(1, local)
        else:
            ids, probs = chosen, law_of(logits, rows.temperature)
        ids = ids if heads.target_ids is None else heads.target_ids[ids]
        before.append(previous)
        previous = draw(ids, probs, rows.seeds, rows.base_lens + k, rows.base_lens, rows.coupled)
        parts.append((previous, ids, probs, margin))
    tokens, ids, probs, margin = (torch.stack(part, dim=1) for part in zip(*parts, strict=True))
    logits = margin if heads.confidence is None else _confidence_logits(heads.confidence, hidden, torch.stack(before, dim=1), heads.w1)
    return Block(tokens, ids, probs, margin, torch.sigmoid(logits))


def _confidence_logits(head: ConfidenceWeights, hidden: Tensor, previous: Tensor, w1: Tensor | None) -> Tensor:
    reads_markov = w1 is not None and head.weight.shape[1] > hidden.shape[2]
    features = torch.cat((hidden, F.embedding(previous, w1)), dim=-1) if w1 is not None and reads_markov else hidden
    logits = F.linear(features, head.weight, head.bias).squeeze(-1).to(torch.float32)
    return logits if head.temperatures is None else logits / head.temperatures[: logits.shape[-1]]


def launch(base: Tensor, candidates: Tensor, hidden: Tensor, rows: BlockRows, heads: BlockHeads, width: int) -> Block:
    """``markov_sample`` by the Triton kernel, one program a request."""
    from triton import next_power_of_2

    from dspark.kernels.markov_triton import draw_block

    num_requests, length, count = base.shape
    assert all(part.is_contiguous() for part in (base, candidates))
    hidden = hidden.contiguous()  # a module may leave its anchor's row out
    width, device = min(width, count), base.device
    block = Block(
        torch.empty(num_requests, length, dtype=torch.int64, device=device),
        torch.empty(num_requests, length, width, dtype=torch.int64, device=device),
        *(torch.empty(num_requests, length, *more, dtype=torch.float32, device=device) for more in ((width,), (), ())),
    )
    if not num_requests:
        return block
    head = heads.confidence
    has_markov = heads.w1 is not None and heads.w2 is not None
    temperatures = None if head is None else head.temperatures
    draw_block[(num_requests,)](
        base,
        candidates,
        rows.anchors,
        base if heads.w1 is None else heads.w1,
        base if heads.w2 is None else heads.w2,
        candidates if heads.target_ids is None else heads.target_ids,
        rows.temperature,
        rows.seeds,
        rows.base_lens,
        rows.coupled,
        base if head is None else head.weight,
        base if head is None else head.bias,
        hidden,
        base if temperatures is None else temperatures,
        block.tokens,
        block.ids,
        block.probs,
        block.margin,
        block.confidence,
        LENGTH=length,
        CANDIDATES=count,
        WIDTH=width,
        RANK=1 if heads.w1 is None else heads.w1.shape[1],
        HIDDEN=hidden.shape[2],
        HAS_MARKOV=has_markov,
        HAS_IDS=heads.target_ids is not None,
        HAS_HEAD=head is not None,
        HEAD_READS_MARKOV=head is not None and head.weight.shape[1] > hidden.shape[2],
        HAS_HEAD_TEMPERATURES=temperatures is not None,
        CANDIDATE_BLOCK=next_power_of_2(count),
        RANK_BLOCK=RANK_BLOCK,
        HIDDEN_BLOCK=HIDDEN_BLOCK,
        num_warps=8,
    )
    return block
