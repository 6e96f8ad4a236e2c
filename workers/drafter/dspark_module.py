"""The DSpark drafter as a torch module: parallel backbone, sequential head, confidence head (DSpark section 3).

::

    taps       [N, m * d]      concatenated outputs of the tapped target layers at N positions
    features   [N, d]          project(taps): what a drafter keeps KV of
    anchors    [R] int64       last known token of each request; positions [R]: where it sits
    hidden     [R, γ, d]       h_1 .. h_γ, after the final norm
    logits     [R, γ, Vd]      base logits U over the draft vocabulary
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dspark.workers.drafter.grafted import GraftedModule
from dspark.workers.drafter.heads import ConfidenceHead, MarkovHead
from dspark.workers.drafter.layers import BlockContext, DraftLayer, RMSNorm, Rotary
from dspark.workers.drafter.module_config import HeadType, ModuleConfig
from dspark.workers.drafter.target_head import TargetHead


class DSparkModule(GraftedModule):
    """Drafts blocks of ``config.block_size`` tokens from target features; holds no state of any request."""

    def __init__(self, config: ModuleConfig, head: TargetHead) -> None:
        super().__init__(config, head)
        d = config.hidden_size
        self.layers = nn.ModuleList(DraftLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.markov_head = None if config.head_type is HeadType.NONE else MarkovHead(config)
        self.confidence_head = ConfidenceHead(config) if config.has_confidence else None
        self.rotary: nn.Module = Rotary(config)
        self.confidence_temperatures: Tensor | None = None  # [γ], from calibration

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
