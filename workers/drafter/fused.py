"""Draft layers in few launches, for serving: merged q/k/v and gate/up, one rotary pass with the heads' norms, fused norms and gate.

The same function as ``DraftLayer`` in Qwen3's arrangement, whose modules it replaces. Training keeps those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.kernels.kv_store import Projected, rotate_and_store
from dspark.kernels.merged_linear import add_product, merge
from dspark.kernels.rms_norm import add_rms_norm, rms_norm
from dspark.kernels.rotary import HeadNorms, cos_sin, rotate_heads
from dspark.kernels.small_linear import FEW_ROWS_WIDTH, MAX_ROWS, small_linear
from dspark.kernels.swiglu import swiglu
from dspark.workers.drafter.dspark_blocks import RaggedContext
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.layers import BlockContext, DraftAttention, DraftLayer, Rotary
from dspark.workers.drafter.module_config import LayerStyle
from dspark.workers.drafter.paged_context import DraftPools


class FusedDraftAttention(nn.Module):
    """The projections of one layer, merged."""

    def __init__(self, attention: DraftAttention, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        assert attention.v_proj is not None
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, attention.head_dim
        self.weight, self.bias = merge(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj
        query, key = attention.q_norm, attention.k_norm
        self.norms: HeadNorms | None = None
        if query is not None and key is not None and query.weight is not None and key.weight is not None:
            self.norms = HeadNorms(query.weight, key.weight, query.eps)

    def keys_values(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """k and v [N, Hkv, D] of features [N, d]; cos and sin [N, 1, D]."""
        begin = self.num_heads * self.head_dim
        heads = F.linear(x, self.weight[begin:], None if self.bias is None else self.bias[begin:])
        heads = heads.view(-1, 2 * self.num_kv_heads, self.head_dim)
        cos, sin = (part.squeeze(-2) for part in cos_sin)
        return rotate_heads(heads, cos, sin, 0, self.num_kv_heads, self.norms), heads[:, self.num_kv_heads :]

    def projected(self, heads: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Projected:
        """The merged projection [T, (H + 2 * Hkv) * D] of a block's inputs; cos and sin [T, D]."""
        heads = heads.view(heads.shape[0], -1, self.head_dim)
        return Projected(heads, *cos_sin, self.num_heads, self.num_kv_heads, self.norms)

    def queries_keys_values(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D], k and v [T, Hkv, D] of inputs [T, d]; cos and sin [T, D]."""
        heads = F.linear(x, self.weight, self.bias).view(x.shape[0], -1, self.head_dim)
        turned = rotate_heads(heads, *cos_sin, self.num_heads, self.num_kv_heads, self.norms)
        return turned[:, : self.num_heads], turned[:, self.num_heads :], heads[:, self.num_heads + self.num_kv_heads :]


class FusedDraftLayer(nn.Module):
    """``DraftLayer`` [R, S, d] -> [R, S, d]; weights are merged copies of ``layer``'s."""

    def __init__(self, layer: DraftLayer, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.index = layer.index
        self.self_attn = FusedDraftAttention(layer.self_attn, num_heads, num_kv_heads)
        self.gate_up, _ = merge(layer.mlp.gate_proj, layer.mlp.up_proj)
        self.down_proj = layer.mlp.down_proj
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm
        widths = (self.self_attn.weight.shape[1], self.self_attn.o_proj.in_features, self.down_proj.in_features)
        self.is_narrow = max(widths) <= FEW_ROWS_WIDTH

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], context: BlockContext) -> Tensor:
        """cos and sin [R, S, 1, D]."""
        block = x.shape[:2]
        cos, sin = (part.flatten(0, 1).squeeze(1) for part in cos_sin)
        flat = x.flatten(0, 1)
        if flat.is_cuda and flat.shape[0] <= MAX_ROWS and self.is_narrow and isinstance(context, RaggedContext):
            return self._few_rows(flat, (cos, sin), context).view(x.shape)
        normed = rms_norm(flat, cast(Tensor, self.input_norm.weight), self.input_norm.eps)
        q, k, v = (part.view(*block, *part.shape[1:]) for part in self.self_attn.queries_keys_values(normed, (cos, sin)))
        attended = context.attend(self.index, q, k, v).reshape(flat.shape[0], -1)
        normed, flat = add_rms_norm(self.self_attn.o_proj(attended), flat, cast(Tensor, self.post_norm.weight), self.post_norm.eps)
        return add_product(flat, swiglu(F.linear(normed, self.gate_up)), self.down_proj).view(x.shape)

    def _few_rows(self, flat: Tensor, cos_sin: tuple[Tensor, Tensor], context: RaggedContext) -> Tensor:
        """``forward`` of few tokens [T, d]: norms, gate and residuals are part of the four products."""
        attention = self.self_attn
        norm = (cast(Tensor, self.input_norm.weight), self.input_norm.eps)
        heads = small_linear(flat, attention.weight, attention.bias, norm)
        attended = context.attend_projected(self.index, attention.projected(heads, cos_sin)).flatten(1)
        flat = small_linear(attended, attention.o_proj.weight, attention.o_proj.bias, residual=flat)
        norm = (cast(Tensor, self.post_norm.weight), self.post_norm.eps)
        inner = small_linear(flat, self.gate_up, norm=norm, is_gated=True)
        return small_linear(inner, self.down_proj.weight, self.down_proj.bias, residual=flat)


class FusedRotary(nn.Module):
    """``Rotary`` in one launch."""

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self._rotary = rotary

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., 1, D] of positions [...]."""
        frequencies = self._rotary.frequencies(positions.device)
        parts = cos_sin(positions.flatten(), frequencies, self._rotary.scale, dtype)
        cos, sin = (part.view(*positions.shape, 1, -1) for part in parts)
        return cos, sin


class FusedContext:
    """Keys and values of all layers from the same features: one product, and one launch a layer that turns and stores them."""

    def __init__(self, layers: Sequence[FusedDraftLayer]) -> None:
        attentions = [layer.self_attn for layer in layers]
        first = attentions[0]
        begin = first.num_heads * first.head_dim
        self._weight = torch.cat([attention.weight[begin:] for attention in attentions])
        biases = [attention.bias for attention in attentions]
        self._bias = torch.cat([bias[begin:] for bias in biases if bias is not None]) if all(b is not None for b in biases) else None
        self._norms = [attention.norms for attention in attentions]
        self._shape = (len(attentions), 2 * first.num_kv_heads, first.head_dim)
        self._num_kv_heads = first.num_kv_heads

    def store(self, features: Tensor, cos_sin: tuple[Tensor, Tensor], pools: DraftPools, slots: Tensor) -> None:
        """Put keys and values of features [N, d] to slots [N] (-1: nowhere); cos and sin [N, 1, D]."""
        heads = F.linear(features, self._weight, self._bias).view(-1, *self._shape)
        cos, sin = (part.squeeze(-2) for part in cos_sin)
        for layer, norms in enumerate(self._norms):
            new = Projected(heads[:, layer], cos, sin, 0, self._num_kv_heads, norms)
            rotate_and_store(new, *pools.layer(layer), slots)


def fuse_context(module: DSparkModule) -> FusedContext | None:
    """The context's keys and values of a module whose layers are fused; None for others."""
    layers = [layer for layer in module.layers if isinstance(layer, FusedDraftLayer)]
    return FusedContext(layers) if layers and len(layers) == len(module.layers) else None


def fuse_layers(module: DSparkModule) -> bool:
    """Replace a module's layers by fused ones where they are of Qwen3's kind; whether it did."""
    config = module.config
    if config.style is LayerStyle.GEMMA4 or config.keys_are_values or config.activation != "silu":
        return False
    for index, layer in enumerate(module.layers):
        module.layers[index] = FusedDraftLayer(cast(DraftLayer, layer), config.num_heads, config.num_kv_heads)
    module.rotary = FusedRotary(cast(Rotary, module.rotary))
    return True
