"""Attention of many chains over dense contexts: what ``PagedChain`` is to serving, this is to training.

::

    R = B * A chains; chain r belongs to sequence r // A and starts at anchors[r // A, r % A]
    keys, values [B, L, Hkv, D]    entries of the context; position 0 has none
    q [R, H, D]                    k, v [R, Hkv, D] of a step's entries
    visible      [B, A, L + A * n] bool, at step n: the context before the anchor, and the chain's own n entries
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.training.block_context import attention_dtype
from dspark.workers.drafter.module_config import ModuleConfig


@dataclass(slots=True)
class DenseChain:
    """The contexts of B sequences for A chains each, which grow by an entry a step."""

    config: ModuleConfig
    anchors: Tensor  # [B, A]
    keys: Tensor
    values: Tensor
    chain: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output [R, H, D]; the chains grow by the entries."""
        self.chain.append((k, v))
        batch, fold = len(self.keys), q.shape[1] // k.shape[1]
        own_k, own_v = (torch.stack(part, dim=1).reshape(batch, -1, *k.shape[1:]) for part in zip(*self.chain, strict=True))
        keys = torch.cat((self.keys, own_k), dim=1).transpose(1, 2)
        values = torch.cat((self.values, own_v), dim=1).transpose(1, 2)
        if fold > 1:
            keys, values = keys.repeat_interleave(fold, dim=1), values.repeat_interleave(fold, dim=1)
        query = q.view(batch, -1, *q.shape[1:]).transpose(1, 2)
        visible = chain_visibility(self.anchors, self.keys.shape[1], len(self.chain))
        bias = torch.zeros(visible.shape, dtype=attention_dtype(query), device=q.device).masked_fill_(~visible, float("-inf"))
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias.unsqueeze(1), scale=self.config.attention_scale)
        return attended.transpose(1, 2).reshape(q.shape)


def chain_visibility(anchors: Tensor, length: int, num_steps: int) -> Tensor:
    """Who sees whom: [B, A, length + A * num_steps] bool for anchors [B, A] over contexts of ``length`` positions."""
    count, device = anchors.shape[1], anchors.device
    places = torch.arange(length, device=device)
    context = (places >= 1) & (places < anchors.unsqueeze(-1))
    owner = torch.arange(count, device=device).repeat_interleave(num_steps)
    own = owner == torch.arange(count, device=device).unsqueeze(1)
    return torch.cat((context, own.expand(len(anchors), -1, -1)), dim=-1)
