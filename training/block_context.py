"""Attention of many blocks over dense contexts: what ``PagedContext`` is to serving, this is to training.

::

    R = B * A blocks; block r belongs to sequence r // A and its anchor sits at anchors[r // A, r % A]
    q            [R, S, H, D]      k, v [R, S, Hkv, D]       of the blocks' own inputs
    keys, values [B, L, Hkv, D]    of the context, one pair a layer
    visible      [B, A * S, L + A * S] bool

A block position sees context positions before its anchor, and its own block; never another block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.workers.drafter.module_config import LayerMask, ModuleConfig


@dataclass(slots=True)
class DenseContext:
    """Contexts of B sequences for A blocks each."""

    config: ModuleConfig
    anchors: Tensor  # [B, A]
    kv: Sequence[tuple[Tensor, Tensor]]
    masks: dict[LayerMask, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output [R, S, H, D]."""
        keys, values = self.kv[layer]
        batch, fold = keys.shape[0], q.shape[2] // k.shape[2]
        mask = self._mask(self.config.layer_masks[layer], keys.shape[1])
        query, own_k, own_v = (part.reshape(batch, -1, *part.shape[2:]) for part in (q, k, v))
        all_k = torch.cat((keys, own_k), dim=1).transpose(1, 2)
        all_v = torch.cat((values, own_v), dim=1).transpose(1, 2)
        if fold > 1:
            all_k, all_v = all_k.repeat_interleave(fold, dim=1), all_v.repeat_interleave(fold, dim=1)
        bias = mask.to(attention_dtype(query)).unsqueeze(1)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), all_k, all_v, attn_mask=bias, scale=self.config.attention_scale)
        return attended.transpose(1, 2).reshape(q.shape)

    def _mask(self, kind: LayerMask, length: int) -> Tensor:
        """Additive mask, made once a kind of layer."""
        if kind not in self.masks:
            visible = block_visibility(self.anchors, length, self.config.num_slots, kind)
            bias = torch.zeros(visible.shape, dtype=torch.bfloat16 if visible.is_cuda else torch.float32, device=visible.device)
            self.masks[kind] = bias.masked_fill_(~visible, float("-inf"))
        return self.masks[kind]


def block_visibility(anchors: Tensor, length: int, num_slots: int, kind: LayerMask) -> Tensor:
    """Who sees whom: [B, A * S, length + A * S] bool for anchors [B, A] over contexts of ``length`` positions."""
    batch, count = anchors.shape
    device = anchors.device
    slots = torch.arange(num_slots, device=device)
    anchor = anchors.repeat_interleave(num_slots, dim=1).unsqueeze(-1)  # of each query
    position = (anchors.unsqueeze(-1) + slots).flatten(1).unsqueeze(-1)
    places = torch.arange(length, device=device)
    context = places < anchor
    if kind.window is not None:
        context &= (places >= anchor - kind.window) if kind.from_anchor else (places > position - kind.window)
    block = torch.arange(count, device=device).repeat_interleave(num_slots)
    slot = slots.repeat(count)
    own = block.unsqueeze(1) == block
    if kind.causal:
        own = own & (slot.unsqueeze(1) >= slot)
    if kind.window is not None and not kind.from_anchor:
        own = own & (slot > slot.unsqueeze(1) - kind.window)
    return torch.cat((context, own.expand(batch, -1, -1)), dim=-1)


def attention_dtype(query: Tensor) -> torch.dtype:
    """What attention will compute in: autocast casts queries, but not a mask of another dtype."""
    return torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else query.dtype
