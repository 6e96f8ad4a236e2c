"""Chains of entries over paged contexts: attention of an EAGLE-3 drafter while it drafts.

::

    pools      one layer's k and v under the target's block ids; the entry of position p at its slot
    lengths    [R]           context positions of each request; positions 1 .. length - 1 hold entries, its chain starts at length
    q          [R, H, D]     k, v of the step's entries [R, Hkv, D]

The contexts are gathered once a round, with room behind them for the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.workers.drafter.paged_context import DraftPools, split_rows


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests attended together: rows [G], keys and values [G, depth + steps, Hkv, D], and the context places they see [G, depth]."""

    rows: Tensor
    keys: Tensor
    values: Tensor
    sees: Tensor


class PagedChain:
    """The contexts of R requests and the chains behind them, as a ``ChainContext``; good for ``num_steps`` steps."""

    def __init__(self, pools: DraftPools, tables: Sequence[Sequence[int]], lengths: Sequence[int], num_steps: int) -> None:
        self._pools = pools
        self._step = 0
        self._groups = [self._make_group(part, tables, lengths, num_steps) for part in split_rows(lengths, pools.block_size)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this step's entries over context and chain; the chain grows by them."""
        out = torch.empty_like(q)
        for group in self._groups:
            out[group.rows] = self._attend_group(group, q[group.rows], k[group.rows], v[group.rows])
        self._step += 1
        return out

    def _attend_group(self, group: _Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config = self._pools.config
        depth = group.sees.shape[1]
        end = depth + self._step + 1
        group.keys[:, end - 1], group.values[:, end - 1] = k, v
        sees = torch.cat((group.sees, group.sees.new_ones(len(q), self._step + 1)), dim=1)
        # Query heads that share a KV head are rows of one attention: keys and values are read once.
        folded = q.view(len(q), config.num_kv_heads, -1, config.head_dim)
        keys, values = group.keys[:, :end].transpose(1, 2), group.values[:, :end].transpose(1, 2)
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=sees[:, None, None], scale=config.attention_scale)
        return out.flatten(1, 2)

    def _make_group(self, part: Sequence[int], tables: Sequence[Sequence[int]], lengths: Sequence[int], num_steps: int) -> _Group:
        size, device = self._pools.block_size, self._pools.device
        counts = [-(-lengths[row] // size) for row in part]
        depth = max(counts)
        width = depth + -(-num_steps // size)
        blocks = torch.tensor([[*tables[row][:n], *[0] * (width - n)] for row, n in zip(part, counts, strict=True)], dtype=torch.int64)
        keys, values = self._pools.gather(0, blocks.to(device))
        places = torch.arange(depth * size)
        sees = (places >= 1) & (places < torch.tensor([lengths[row] for row in part]).unsqueeze(1))
        return _Group(torch.tensor(part, device=device), keys, values, sees.to(device))
