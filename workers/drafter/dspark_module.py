"""The DSpark drafter as a torch module: parallel backbone, sequential head, confidence head (DSpark section 3).

::

    taps       [N, m * d]      concatenated outputs of the tapped target layers at N positions
    features   [N, d]          project(taps): what a drafter keeps KV of
    anchors    [R] int64       last known token of each request; positions [R]: where it sits
    hidden     [R, γ, d]       h_1 .. h_γ, after the final norm
    logits     [R, γ, Vd]      base logits U over the draft vocabulary

The embedding and the output head are the target's own tensors: they are neither parameters nor saved.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.workers.drafter.calibration import default_signals
from dspark.workers.drafter.heads import ConfidenceHead, MarkovHead
from dspark.workers.drafter.layers import BlockContext, DraftLayer, RMSNorm, Rotary
from dspark.workers.drafter.module_config import HeadType, ModuleConfig
from dspark.workers.drafter.target_head import TargetHead


class FeatureProjection(nn.Module):
    """From taps to context features: the part of a drafter that runs beside the target, wherever the rest does."""

    def __init__(self, config: ModuleConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * d, d, bias=False)
        self.hidden_norm = RMSNorm(d, config.rms_norm_eps)
        self.signals = default_signals(config.has_confidence)  # how the drafter's trees are to be read

    def project(self, taps: Tensor) -> Tensor:
        """Context features [N, d] of concatenated taps [N, m * d]."""
        return cast(Tensor, self.hidden_norm(self.fc(taps.to(self.fc.weight.dtype))))


class DSparkModule(FeatureProjection):
    """Drafts blocks of ``config.block_size`` tokens from target features; holds no state of any request."""

    def __init__(self, config: ModuleConfig, head: TargetHead) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.layers = nn.ModuleList(DraftLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.markov_head = None if config.head_type is HeadType.NONE else MarkovHead(config)
        self.confidence_head = ConfidenceHead(config) if config.has_confidence else None
        self.rotary = Rotary(config)
        # Plain attributes: the tensors belong to the target. Detached: a Parameter would become one of this module's.
        self._shared = head
        self._lm_head = head.lm_head.detach()
        self._target_ids: Tensor | None = None
        self.confidence_temperatures: Tensor | None = None  # [γ], from calibration

    def use_draft_vocabulary(self, target_ids: Tensor, lm_head: Tensor | None) -> None:
        """Predict only ``target_ids`` [Vd], with the rows of the target's head, or with the checkpoint's own ``lm_head`` [Vd, d]."""
        self._target_ids = target_ids
        self._lm_head = self._shared.lm_head[target_ids] if lm_head is None else lm_head

    @property
    def num_target_layers(self) -> int:
        """Layers of the target it drafts for."""
        return self._shared.num_layers

    @property
    def draft_lm_head(self) -> Tensor:
        """The output head in use [Vd, d]."""
        return self._lm_head

    @property
    def draft_target_ids(self) -> Tensor | None:
        """Target ids of the draft vocabulary [Vd], strictly increasing; None when it is the whole vocabulary."""
        return self._target_ids

    def context_kv(self, features: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [N, Hkv, D] of every layer for context positions."""
        cos_sin = self.rotary(positions, features.dtype)
        return [cast(DraftLayer, layer).self_attn.keys_values(features, cos_sin) for layer in self.layers]

    def block_hidden(self, anchors: Tensor, positions: Tensor, context: BlockContext) -> Tensor:
        """h_1 .. h_γ [R, γ, d] of blocks that start with ``anchors`` [R] at ``positions`` [R]."""
        slots = torch.arange(self.config.num_slots, device=positions.device)
        x = self.embed(torch.where(slots == 0, anchors.unsqueeze(1), self.config.mask_token_id))
        cos_sin = self.rotary(positions.unsqueeze(1) + slots, x.dtype)
        for layer in self.layers:
            x = layer(x, cos_sin, context)
        x = self.norm(x)
        return cast(Tensor, x if self.config.sample_from_anchor else x[:, 1:])

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embeddings of tokens [...]: [..., d], in the module's dtype."""
        x = F.embedding(tokens, self._shared.embed).to(self.fc.weight.dtype)
        return x if self._shared.embed_scale == 1.0 else x * torch.tensor(self._shared.embed_scale, dtype=x.dtype, device=x.device)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """U [..., Vd] of hidden [..., d]."""
        logits = F.linear(hidden.to(self._lm_head.dtype), self._lm_head)
        cap = self._shared.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def confidence_logits(self, hidden: Tensor, previous: Tensor) -> Tensor | None:
        """Logits of c_1 .. c_n [R, n], calibrated if the module is, from h_k [R, n, d] and x_{k-1} [R, n]; None without a head."""
        if self.confidence_head is None:
            return None
        embedded = None if self.markov_head is None else self.markov_head.markov_w1(previous)
        logits = cast(Tensor, self.confidence_head(hidden, embedded))
        temperatures = self.confidence_temperatures
        return logits if temperatures is None else logits / temperatures[: logits.shape[-1]]

    def branch_confidence_logits(self, position: int, hidden: Tensor, previous: Tensor) -> Tensor | None:
        """Logits of c at one position (from 0) after B nodes of each request [R, B], from h [R, d] and their tokens [R, B]."""
        if self.confidence_head is None:
            return None
        embedded = None if self.markov_head is None else self.markov_head.markov_w1(previous)
        logits = cast(Tensor, self.confidence_head(hidden.unsqueeze(1).expand(-1, previous.shape[1], -1), embedded))
        temperatures = self.confidence_temperatures
        return logits if temperatures is None else logits / temperatures[position]
