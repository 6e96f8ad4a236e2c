"""The shape of a DSpark module, whatever dialect it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class HeadType(StrEnum):
    """The sequential heads of DSpark section 3.1; ``none`` is DFlash."""

    NONE = "none"
    VANILLA = "vanilla"
    GATED = "gated"
    RNN = "rnn"


class LayerStyle(StrEnum):
    """Where a draft layer has its norms: as Qwen3's (before each half), or as Gemma 4's (before and after each half)."""

    QWEN3 = "qwen3"
    GEMMA4 = "gemma4"


@dataclass(frozen=True, slots=True)
class LayerMask:
    """What a draft layer's block positions see.

    ``window`` w limits the context: a block position at p sees context positions > p - w, or, with ``from_anchor``, all
    block positions see those >= anchor - w. ``causal`` makes the block itself causal instead of bidirectional.
    """

    window: int | None = None
    from_anchor: bool = False
    causal: bool = False


@dataclass(frozen=True, slots=True)
class ModuleConfig:
    """All sizes and conventions of a DSpark drafter.

    ``block_size`` γ is the number of drafted tokens. With ``sample_from_anchor`` the block has γ inputs, the anchor and
    γ - 1 masks, and each predicts the token after its own position; without it there are 1 + γ inputs and each mask
    predicts its own position (DFlash). ``target_layer_ids`` are taps: id L is the output of layer L, -1 the embeddings.
    ``draft_vocab_size`` is less than ``vocab_size`` when the drafter predicts a part of the vocabulary only.
    ``rope`` is a transformers 5 ``rope_parameters`` dict of one layer type.
    ``is_autoregressive``: EAGLE-3, one layer run γ times, its features fed back; no mask token takes part, and layer masks are
    causal. ``norm_before_residual``: its residual is the normed feature.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_masks: tuple[LayerMask, ...]
    target_layer_ids: tuple[int, ...]
    block_size: int
    mask_token_id: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float = 1e-6
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_positions: int = 32768
    sample_from_anchor: bool = True
    head_type: HeadType = HeadType.VANILLA
    markov_rank: int = 256
    has_confidence: bool = True
    confidence_with_markov: bool = True
    attention_bias: bool = False
    qk_norm: bool = True
    activation: str = "silu"
    style: LayerStyle = LayerStyle.QWEN3
    keys_are_values: bool = False
    is_autoregressive: bool = False
    norm_before_residual: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layer_masks)

    @property
    def num_slots(self) -> int:
        """Inputs of a block."""
        return self.block_size if self.sample_from_anchor else self.block_size + 1

    @property
    def attention_scale(self) -> float:
        return 1.0 if self.style is LayerStyle.GEMMA4 else self.head_dim**-0.5
