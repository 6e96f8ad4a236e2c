"""What a drafter borrows from its target: embedding, output head, and the shapes they must fit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TargetHead:
    """The target's frozen ends, shared and never copied.

    ``embed`` and ``lm_head`` are [V, d] (the same tensor when tied). ``embed_scale`` multiplies embeddings (Gemma);
    ``softcap`` c turns logits into c * tanh(logits / c). ``num_layers`` bounds the layers that can be tapped.
    """

    embed: Tensor
    lm_head: Tensor
    hidden_size: int
    vocab_size: int
    num_layers: int
    model_type: str
    embed_scale: float = 1.0
    softcap: float | None = None
