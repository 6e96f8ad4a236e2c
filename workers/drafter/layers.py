"""The drafter's transformer layers: attention of a short block over an injected context, and a gated MLP.

::

    x          [R, S, d]        block rows: R requests, S inputs each
    features   [N, d]           projected target features of N context positions, of any requests
    positions  [...] int64      absolute positions
    q          [R, S, H, D]     k, v  [..., Hkv, D]

DSpark section 3.1 (KV injection): keys and values of the context are W_k and W_v applied to the features, so a context
entry depends on the target's features at its position and on nothing else, and can be kept in paged blocks.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dspark.errors import ConfigError
from dspark.kernels.rotary import reference_cos_sin
from dspark.workers.drafter.module_config import LayerStyle, ModuleConfig

# The other types change with the length of the text, and KV of earlier tokens could not be kept.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "proportional", "yarn")


class BlockContext(Protocol):
    """The context of R blocks: whoever holds it computes the attention over it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of block queries [R, S, H, D] over each row's context and its own block's k, v: [R, S, H, D]."""


class RMSNorm(nn.Module):
    """x / rms(x), times a learned weight if there is one; computed in fp32."""

    def __init__(self, size: int, eps: float, has_weight: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if has_weight else None
        self.size = size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)  # in training the weights are fp32 and x may be bf16
        return F.rms_norm(x, (self.size,), weight, self.eps)


class Rotary(nn.Module):
    """Rotary embedding of q and k, with the frequencies of a ``rope_parameters`` dict.

    The frequencies are no buffer: a module cast to bf16 must keep them in fp32.
    """

    def __init__(self, config: ModuleConfig) -> None:
        super().__init__()
        frequencies, self.scale = rope_frequencies(config)
        self._frequencies = {frequencies.device: frequencies}

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., 1, D] of positions [...], ready to multiply [..., heads, D]."""
        cos, sin = reference_cos_sin(positions, self.frequencies(positions.device), self.scale, dtype)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def frequencies(self, device: torch.device) -> Tensor:
        """[D / 2] fp32 on a device."""
        if device not in self._frequencies:
            self._frequencies[device] = next(iter(self._frequencies.values())).to(device)
        return self._frequencies[device]


def rope_frequencies(config: ModuleConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [D / 2] on CPU and the factor on cos and sin; ConfigError for types that change with the text's length."""
    rope_type = str(config.rope.get("rope_type", "default"))
    if rope_type not in STATIC_ROPE_TYPES:
        raise ConfigError(f"drafter rope_parameters.rope_type {rope_type!r} is not supported; supported are {', '.join(STATIC_ROPE_TYPES)}")
    if rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        return 1.0 / (float(config.rope["rope_theta"]) ** exponents), 1.0
    shape = Qwen3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rope_parameters=dict(config.rope),
    )
    with torch.device("cpu"):  # the module may be under construction on the meta device
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](shape, torch.device("cpu"))
    return frequencies, float(scale)


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary to x [..., heads, D]: the first half of a head pairs with the second."""
    cos, sin = cos_sin
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class DraftAttention(nn.Module):
    """Projections of one layer; the attention itself belongs to the ``BlockContext``."""

    def __init__(self, config: ModuleConfig) -> None:
        super().__init__()
        d, bias = config.hidden_size, config.attention_bias
        width = 2 * d if config.is_autoregressive else d  # EAGLE-3 reads a token and a feature
        is_gemma = config.style is LayerStyle.GEMMA4
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = None if config.keys_are_values else nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, d, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.v_norm = RMSNorm(config.head_dim, config.rms_norm_eps, has_weight=False) if is_gemma else None

    def keys_values(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """k and v [..., Hkv, D] of inputs or of features [..., d]."""
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = k if self.v_proj is None else self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.v_norm is not None:
            v = self.v_norm(v)
        return rotate(k, cos_sin), v

    def queries(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """q [..., H, D]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(q if self.q_norm is None else self.q_norm(q), cos_sin)


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModuleConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self._activation = ACT2FN[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x)))


class DraftLayer(nn.Module):
    """One draft layer in Qwen3's or Gemma 4's arrangement of norms."""

    layer_scalar: Tensor

    def __init__(self, config: ModuleConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn = DraftAttention(config)
        self.mlp = GatedMlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_gemma = config.style is LayerStyle.GEMMA4
        if self.is_gemma:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], context: BlockContext) -> Tensor:
        attended = self._attend(self.input_layernorm(x), cos_sin, context)
        if not self.is_gemma:
            x = x + attended
            return x + cast(Tensor, self.mlp(self.post_attention_layernorm(x)))
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar

    def _attend(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], context: BlockContext) -> Tensor:
        q = self.self_attn.queries(x, cos_sin)
        k, v = self.self_attn.keys_values(x, cos_sin)
        return cast(Tensor, self.self_attn.o_proj(context.attend(self.index, q, k, v).flatten(-2)))
