"""Fused decoder layers for Llama-class targets: merged q/k/v and gate/up, one rotary pass, fused norms.

The same function as transformers' layer with fewer and larger calls: on a GPU four products, norm, rotary, norm with residual,
gate, and the attention step, where the modules make some thirty launches. SmolLM2-135M on two CPU cores, one row, bf16: the
211 products of a step become 121 and a step loses several of its 36 ms, most of it interpreter time.

Tensor-parallel shares are fused as well: heads and inner width are read from the share's own weights, and ``RowParallel``
sums over the ranks before the residual is added.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dspark.kernels.kv_store import Projected
from dspark.kernels.merged_linear import add_product, merge
from dspark.kernels.paged_attention import AttentionShape
from dspark.kernels.rms_norm import add_rms_norm, rms_norm
from dspark.kernels.rotary import HeadNorms, cos_sin, rotate_heads
from dspark.kernels.small_linear import MAX_ROWS, small_linear
from dspark.kernels.swiglu import swiglu
from dspark.workers.verifier.attention import QKV, AttentionStep, RaggedStep
from dspark.workers.verifier.parallel.sharding import RowParallel
from dspark.workers.verifier.targets import Target

FAMILIES = ("Llama", "Mistral", "Qwen3")
FUSABLE = {f"{family}DecoderLayer" for family in FAMILIES}
FUSABLE_NORMS = {f"{family}RMSNorm" for family in FAMILIES}
FUSABLE_ROTARIES = {f"{family}RotaryEmbedding" for family in FAMILIES}
STATIC_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # others change with the length of the text


class FusedLayer(nn.Module):
    """One decoder layer [1, T, d] -> [1, T, d] around ``step.attend``; weights are merged copies of ``layer``'s."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.shape = AttentionShape(attention.scaling, getattr(attention, "sliding_window", _window(attention)))
        self.qkv = merge(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = merge(mlp.gate_proj, mlp.up_proj)
        self.o_proj, self.down_proj = attention.o_proj, mlp.down_proj
        self.norms = _head_norms(attention)
        # Not a rank's share, whose products are sums of several ranks; and gates without bias.
        self.joins_products = True  # unless that was measured not to pay
        self.is_whole = type(attention.o_proj) is type(mlp.down_proj) is nn.Linear and self.gate_up[1] is None
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm

    def forward(
        self, hidden_states: Tensor, *unused: Any, position_embeddings: tuple[Tensor, Tensor], step: AttentionStep, **others: Any
    ) -> Tensor:
        """``position_embeddings``: cos and sin [1, T, head_dim]."""
        hidden = hidden_states[0]
        if self.has_few_rows(hidden) and isinstance(step, RaggedStep):
            return self.few_rows(hidden, position_embeddings, step).unsqueeze(0)
        normed = rms_norm(hidden, self.input_norm.weight, self.input_norm.variance_epsilon)
        attended = self.o_proj(self._attend(normed, position_embeddings, step))
        normed, hidden = add_rms_norm(attended, hidden, self.post_norm.weight, self.post_norm.variance_epsilon)
        return add_product(hidden, swiglu(F.linear(normed, *self.gate_up)), self.down_proj).unsqueeze(0)

    def has_few_rows(self, hidden: Tensor) -> bool:
        """Whether ``few_rows`` is to compute the layer."""
        return hidden.is_cuda and hidden.shape[0] <= MAX_ROWS and self.is_whole and self.joins_products

    def few_rows(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], step: RaggedStep) -> Tensor:
        """``forward`` of few tokens [T, d]: norms, gate and residuals are part of the four products, which read the weights once."""
        qkv, bias = self.qkv
        norm = (self.input_norm.weight, self.input_norm.variance_epsilon)
        attended = self._attend_projected(small_linear(hidden, qkv, bias, norm), rotary, step)
        hidden = small_linear(attended, self.o_proj.weight, self.o_proj.bias, residual=hidden)
        norm = (self.post_norm.weight, self.post_norm.variance_epsilon)
        inner = small_linear(hidden, self.gate_up[0], norm=norm, is_gated=True)
        return small_linear(inner, self.down_proj.weight, self.down_proj.bias, residual=hidden)

    def _attend_projected(self, projected: Tensor, rotary: tuple[Tensor, Tensor], step: RaggedStep) -> Tensor:
        tokens = projected.shape[0]
        heads = projected.view(tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        new = Projected(heads, rotary[0][0], rotary[1][0], self.heads, self.kv_heads, self.norms)
        return step.attend_projected(self.layer_idx, new, self.shape).reshape(tokens, -1)

    def _attend(self, normed: Tensor, rotary: tuple[Tensor, Tensor], step: AttentionStep) -> Tensor:
        tokens, rotated = normed.shape[0], self.heads + self.kv_heads
        projected = F.linear(normed, *self.qkv)
        if isinstance(step, RaggedStep):
            return self._attend_projected(projected, rotary, step)
        heads = projected.view(tokens, rotated + self.kv_heads, self.head_dim)
        cos, sin = rotary
        turned = rotate_heads(heads, cos[0], sin[0], self.heads, self.kv_heads, self.norms)
        tensors = QKV(turned[:, : self.heads], turned[:, self.heads :], heads[:, rotated:])
        return step.attend(self.layer_idx, tensors, self.shape, None).reshape(tokens, -1)


class FusedNorm(nn.Module):
    """The norm behind the last layer, [1, T, d] -> [1, T, d], in one launch."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states[0], self.weight, self.eps).unsqueeze(0)


class FusedRotary(nn.Module):
    """cos and sin [1, T, D] of positions [1, T] in one launch, for frequencies that no text changes."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.frequencies, self.scale = rotary.inv_freq, float(rotary.attention_scaling)

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin(position_ids[0], self.frequencies, self.scale, hidden_states.dtype)
        return cos.unsqueeze(0), sin.unsqueeze(0)


def fuse(target: Target) -> bool:
    """Replace a target's decoder layers by fused ones where their class is known, and what lies around them; whether it did."""
    layers = target.decoder_layers()
    if not all(type(layer).__name__ in FUSABLE and _is_plain(layer) for layer in layers):
        return False
    for index, layer in enumerate(layers):
        layers[index] = FusedLayer(layer)
    decoder: Any = target.model.get_decoder()  # type: ignore[no-untyped-call]
    if type(decoder.norm).__name__ in FUSABLE_NORMS:
        decoder.norm = FusedNorm(decoder.norm)
    rotary = decoder.rotary_emb
    if type(rotary).__name__ in FUSABLE_ROTARIES and rotary.rope_type in STATIC_ROPE_TYPES:
        decoder.rotary_emb = FusedRotary(rotary)
    return True


def join_products(target: Target, joins: bool) -> None:
    """Whether fused layers compute few tokens with norms, gates and residuals as part of their products."""
    for layer in target.decoder_layers():
        if isinstance(layer, FusedLayer):
            layer.joins_products = joins


def _is_plain(layer: Any) -> bool:
    """Ordinary linear layers or shares of them, and SiLU: nothing quantised or adapted."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return all(type(linear) in (nn.Linear, RowParallel) for linear in linears) and "silu" in type(mlp.act_fn).__name__.lower()


def _window(attention: Any) -> int | None:
    """Mistral keeps its window in the configuration, Llama has none."""
    return getattr(attention.config, "sliding_window", None) if type(attention).__name__ == "MistralAttention" else None


def _head_norms(attention: Any) -> HeadNorms | None:
    """Qwen3 norms every query and key head."""
    query, key = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return None if query is None or key is None else HeadNorms(query.weight, key.weight, query.variance_epsilon)
