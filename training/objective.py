"""One batch through target and drafter: the loss, and how well the drafts would have been accepted.

::

    block r of sequence b    anchor a: inputs x_a and masks, labels x_{a+1} .. x_{a+γ}, laws of the target at a .. a+γ-1
    rows                     [N] flat indices into [B * A * γ]: block positions that have a label
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.training.batches import Batch
from dspark.training.config import LossConfig
from dspark.training.drafting import Drafted, draft
from dspark.training.feature_cache import CachedReader
from dspark.training.features import FeatureReader
from dspark.training.laws_loss import LawResult, LawRows, LawTerms, law_loss
from dspark.training.model import Module
from dspark.workers.drafter.target_head import TargetHead

DECAY_OF_BLOCK = 4.0 / 7.0  # of γ, when decay is not set


@dataclass(slots=True)
class Outcome:
    """``loss`` is differentiable, the rest detached; per-position tensors are [B * A, γ] with 0 where a block has no label."""

    loss: Tensor
    cross_entropy: Tensor
    law: Tensor
    confidence: Tensor
    overlap: Tensor
    is_match: Tensor
    is_whole: Tensor  # [B * A] blocks whose γ positions all have labels

    def acceptance_length(self) -> Tensor:
        """Expected tokens a round under the ratio rule at temperature 1, over whole blocks (NaN without one); waits for nothing."""
        whole = self.is_whole.to(self.overlap.dtype)
        return 1.0 + (self.overlap.cumprod(-1).sum(-1) * whole).sum() / whole.sum()


class Objective(nn.Module):
    """Loss of a module, its only part with parameters, against its target."""

    def __init__(
        self, module: Module, reader: FeatureReader | CachedReader, head: TargetHead, settings: LossConfig, compiled: bool = False
    ) -> None:
        super().__init__()
        self.module = module
        self.reader = reader
        self.settings = settings
        self.terms = LawTerms(settings.cross_entropy, settings.law, settings.chunk_rows, head, compiled)
        block = module.config.block_size
        decay = settings.decay or DECAY_OF_BLOCK * block
        self.position_weights = torch.exp(-torch.arange(block) / decay)

    def forward(self, batch: Batch) -> Outcome:
        """The loss of a batch on the CPU; nothing here waits for the device."""
        block, device = self.module.config.block_size, self.reader.target.device
        rows, weights, is_whole = self._rows(batch, block)
        rows, weights, is_whole = (part.to(device, non_blocking=True) for part in (rows, weights, is_whole))
        batch = batch.to(device)
        places = batch.anchors.unsqueeze(-1) + torch.arange(block, device=device)  # a .. a + γ - 1
        taps, hidden = self.reader.read(batch)
        previous = _at(batch.tokens, places).flatten(0, 1)
        labels = _at(batch.tokens, places + 1).flatten()[rows]
        goal = _rows_of(hidden, places, rows)
        with self._autocast():
            drafted = draft(self.module, batch, taps, previous)
        with torch.autocast(device.type, enabled=False):
            found = self._laws(drafted, rows, LawRows(goal, labels, weights))
            confidence = self._confidence(drafted.confidence, rows, found, weights)
        return self._outcome(found, confidence, weights, rows, is_whole)

    def _rows(self, batch: Batch, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows with labels, their weights (summing to 1), and which blocks are whole."""
        last = batch.anchors.unsqueeze(-1) + torch.arange(1, block + 1)
        has_label = (last < batch.lengths.view(-1, 1, 1)) & batch.is_real.unsqueeze(-1)
        rows = has_label.flatten().nonzero().squeeze(1)
        weights = self.position_weights.expand_as(last).flatten()[rows]
        return rows, weights / weights.sum(), has_label.all(-1).flatten()

    def _autocast(self) -> AbstractContextManager[None]:
        target = self.reader.target
        return nullcontext() if target.dtype == torch.float32 else torch.autocast(target.device.type, dtype=torch.bfloat16)

    def _laws(self, drafted: Drafted, rows: Tensor, goals: LawRows) -> LawResult:
        latent = None if drafted.latents is None else drafted.latents.flatten(0, 1)[rows]
        return law_loss(drafted.hidden.flatten(0, 1)[rows], latent, drafted.w2, goals, self.terms)

    def _confidence(self, sure: Tensor | None, rows: Tensor, found: LawResult, weights: Tensor) -> Tensor:
        if sure is None:
            return found.loss.new_zeros(())
        each = F.binary_cross_entropy_with_logits(sure.flatten()[rows].float(), found.overlap.clamp(0.0, 1.0), reduction="none")
        return (each * weights).sum()

    def _outcome(self, found: LawResult, confidence: Tensor, weights: Tensor, rows: Tensor, is_whole: Tensor) -> Outcome:
        shape = (len(is_whole), self.module.config.block_size)
        overlap, is_match = found.overlap.new_zeros(shape), found.overlap.new_zeros(shape)
        overlap.view(-1)[rows] = found.overlap
        is_match.view(-1)[rows] = found.is_match.to(is_match.dtype)
        return Outcome(
            loss=found.loss + self.settings.confidence * confidence,
            cross_entropy=(found.cross_entropy * weights).sum(),
            law=(2.0 * (1.0 - found.overlap) * weights).sum(),
            confidence=confidence.detach(),
            overlap=overlap,
            is_match=is_match,
            is_whole=is_whole,
        )


def _at(values: Tensor, places: Tensor) -> Tensor:
    """values [B, L] at places [B, A, γ]; places behind the end give the last value."""
    flat = places.flatten(1).clamp_max(values.shape[1] - 1)
    return values.gather(1, flat).view(places.shape)


def _rows_of(hidden: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """hidden [B, L, d] at the flat ``rows`` of places [B, A, γ]: [N, d]."""
    length = hidden.shape[1]
    offsets = torch.arange(len(hidden), device=hidden.device).view(-1, 1, 1) * length
    flat = (offsets + places.clamp_max(length - 1)).flatten()[rows]
    return hidden.flatten(0, 1)[flat]


def _chain(accepted: Tensor) -> Tensor:
    return 1.0 + accepted.cumprod(-1).sum(-1).mean()


def mean_outcomes(outcomes: Iterator[tuple[Outcome, Tensor]]) -> dict[str, float]:
    """Held-out figures over several batches, each with its blocks' answer temperatures [B * A]."""
    parts = [(o.overlap[o.is_whole], o.is_match[o.is_whole], t.to(o.is_whole.device)[o.is_whole]) for o, t in outcomes]
    overlap, is_match, heat = (torch.cat([part[i] for part in parts]) for i in range(3))
    greedy = is_match[heat == 0]
    figures = {"acceptance_length": float(_chain(overlap))}
    figures |= {f"acceptance_{k + 1}": value for k, value in enumerate(_conditional(overlap))}
    if len(greedy):
        figures["greedy_length"] = float(_chain(greedy))
    return figures


def _conditional(accepted: Tensor) -> list[float]:
    """Acceptance of each position given that all before it were accepted."""
    survival = torch.cat((torch.ones(len(accepted), 1, device=accepted.device), accepted.cumprod(-1)), dim=1).mean(0)
    return (survival[1:] / survival[:-1].clamp_min(1e-9)).tolist()
