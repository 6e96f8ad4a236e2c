"""What a drafter says of a batch whose tokens are known: the form of drafting that training differentiates.

::

    tokens    [B, L] int64     taps [B, L, m * d]     anchors [B, A]       R = B * A blocks
    previous  [R, γ] int64     x_0 .. x_{γ-1}: what position k of a block follows
    hidden    [R, γ, d]        what the output head reads      latents  [R, γ, r] of the sequential head, None without one
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.training.batches import Batch
from dspark.training.block_context import DenseContext
from dspark.training.chain_context import DenseChain
from dspark.training.model import Module
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.eagle3_module import Eagle3Module


@dataclass(frozen=True, slots=True)
class Drafted:
    """A batch's blocks. ``w2`` [V, r] turns latents into biases; ``confidence`` [R, γ] are logits."""

    hidden: Tensor
    latents: Tensor | None = None
    w2: Tensor | None = None
    confidence: Tensor | None = None


def draft(module: Module, batch: Batch, taps: Tensor, previous: Tensor) -> Drafted:
    """All blocks of the batch, each position given the true tokens before it."""
    if isinstance(module, Eagle3Module):
        return Drafted(_chains(module, batch, taps, previous))
    hidden = _blocks(module, batch, taps)
    head = module.markov_head
    confidence = module.confidence_logits(hidden, previous)
    if head is None:
        return Drafted(hidden, confidence=confidence)
    return Drafted(hidden, head.block_latents(previous, hidden), head.markov_w2.weight, confidence)


def _blocks(module: DSparkModule, batch: Batch, taps: Tensor) -> Tensor:
    """h_1 .. h_γ of every block, all positions at once."""
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    context = DenseContext(module.config, batch.anchors, module.context_kv(module.project(taps), positions))
    return module.block_hidden(batch.tokens.gather(1, batch.anchors).flatten(), batch.anchors.flatten(), context)


def _chains(module: Eagle3Module, batch: Batch, taps: Tensor, previous: Tensor) -> Tensor:
    """γ steps of every chain, each fed with the features of the one before: what serving does, on the true tokens."""
    features = module.project(taps)
    before = torch.cat((torch.zeros_like(features[:, :1]), features[:, :-1]), dim=1)
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    chain = DenseChain(module.config, batch.anchors, *module.context_kv(batch.tokens, before, positions))
    places = batch.anchors.unsqueeze(-1).expand(-1, -1, before.shape[-1])
    drafted, steps = before.gather(1, places).flatten(0, 1), []
    for k in range(module.config.block_size):
        drafted = module.step(previous[:, k], drafted, batch.anchors.flatten() + k, chain)
        steps.append(module.hidden(drafted))
    return torch.stack(steps, dim=1)
