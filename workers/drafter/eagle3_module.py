"""The EAGLE-3 drafter as a torch module: one layer that reads a token and the feature before it, and feeds its own feature on.

::

    taps       [N, m * d]      concatenated outputs of the tapped target layers at N positions
    features   [N, d]          project(taps) of the target, or what a step of this module gave
    entry p    token p with the feature of position p - 1; position 0 has no entry
    drafted    [R, d]          features after a step: fed back, and the output head reads their norm

Entry p gives the law of token p + 1: the anchor's entry the first draft. Keys and values of entry p are a function of token p and
of one feature, so they are kept in paged blocks like those of any drafter. (Li et al. 2025, "EAGLE-3".)
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from dspark.workers.drafter.grafted import GraftedModule
from dspark.workers.drafter.layers import DraftAttention, GatedMlp, RMSNorm, Rotary
from dspark.workers.drafter.module_config import ModuleConfig
from dspark.workers.drafter.target_head import TargetHead

CosSin = tuple[Tensor, Tensor]


class ChainContext(Protocol):
    """The contexts of R chains, which grow by an entry a step."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take in the entries' k and v [R, Hkv, D]; attention of q [R, H, D] over context and chain, themselves included: [R, H, D]."""


class Eagle3Layer(nn.Module):
    """Attention over (token, feature) pairs, and a gated MLP; the residual stream is the feature's."""

    def __init__(self, config: ModuleConfig) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DraftAttention(config)
        self.mlp = GatedMlp(config)

    def pairs(self, embedded: Tensor, features: Tensor) -> Tensor:
        """What attention reads of entries: [..., 2 d]."""
        return torch.cat((self.input_layernorm(embedded), self.hidden_norm(features)), dim=-1)

    def forward(self, embedded: Tensor, features: Tensor, cos_sin: CosSin, context: ChainContext) -> Tensor:
        """Features [R, d] after the entries of tokens ``embedded`` [R, d] and ``features`` [R, d]."""
        pairs = self.pairs(embedded, features)
        q = self.self_attn.queries(pairs, cos_sin)
        k, v = self.self_attn.keys_values(pairs, cos_sin)
        attended = self.self_attn.o_proj(context.attend(q, k, v).flatten(-2))
        x = attended + (self.hidden_norm(features) if self.norm_before_residual else features)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Eagle3Module(GraftedModule):
    """Drafts ``config.block_size`` tokens one after the other; holds no state of any request."""

    def __init__(self, config: ModuleConfig, head: TargetHead) -> None:
        super().__init__(config, head)
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)

    def context_kv(self, tokens: Tensor, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., Hkv, D] of entries: tokens [...], the features [..., d] before them, positions [...]."""
        cos_sin = self.rotary(positions, features.dtype)
        return self.midlayer.self_attn.keys_values(self.midlayer.pairs(self.embed(tokens), features), cos_sin)

    def step(self, tokens: Tensor, features: Tensor, positions: Tensor, context: ChainContext) -> Tensor:
        """Features [R, d] behind one more entry a chain: tokens [R] at ``positions`` [R], with the features [R, d] before them."""
        return cast(Tensor, self.midlayer(self.embed(tokens), features, self.rotary(positions, features.dtype), context))

    def hidden(self, drafted: Tensor) -> Tensor:
        """What the output head reads of features [..., d]."""
        return cast(Tensor, self.norm(drafted))
