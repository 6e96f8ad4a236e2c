"""The drafter's KV pools under the target's block ids, and attention of blocks over them.

::

    pools      per layer k and v [num_blocks, block_size * Hkv * D]: one entry a token position, as the target's blocks
    slots      [N] int64     block id * block_size + place of N positions
    tables     per request   block ids in order
    lengths    [R]           context positions of each request; its block starts at that position
    q          [R, S, H, D]  k, v of the block [R, S, Hkv, D]

Blocks are gathered whole (one row copy a block, five to ten times as fast as a copy a position), requests of similar
length together, so that padding at most doubles the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dspark.types import BlockTables
from dspark.workers.drafter.module_config import LayerMask, ModuleConfig


def unplanned_attention(device: torch.device) -> AbstractContextManager[None]:
    """Attention by kernels that take any shape: cuDNN's is planned anew for each, and contexts have another length every round."""
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if device.type == "cuda" else nullcontext()


def block_slots(tables: BlockTables, request_id: str, start: int, count: int) -> Tensor:
    """Pool slots [count] of a request's positions ``start ..``; its table must cover them."""
    size = tables.block_size
    first, last = start // size, (start + count - 1) // size
    blocks = torch.tensor(tables.table(request_id)[first : last + 1], dtype=torch.int64)
    slots = (blocks.unsqueeze(1) * size + torch.arange(size)).flatten()
    return slots[start - first * size :][:count]


class DraftPools:
    """Storage of the drafter's context keys and values for every block of the target's pool."""

    def __init__(self, config: ModuleConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self._entry = (config.num_kv_heads, config.head_dim)
        shape = (num_blocks * block_size, *self._entry)
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in self._keys + self._values)

    @staticmethod
    def bytes_per_token(config: ModuleConfig, itemsize: int) -> int:
        """Bytes of one position over all layers."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value pool [num_blocks * block_size, Hkv, D] of a layer."""
        return self._keys[layer], self._values[layer]

    def by_block(self) -> dict[str, Tensor]:
        """All pools as [num_blocks, block_size, Hkv, D], the same memory."""
        shape = (self.num_blocks, self.block_size, *self._entry)
        pools = {f"key {layer}": pool.view(shape) for layer, pool in enumerate(self._keys)}
        return pools | {f"value {layer}": pool.view(shape) for layer, pool in enumerate(self._values)}

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [N, Hkv, D] at ``slots`` [N]."""
        self._keys[layer][slots] = k
        self._values[layer][slots] = v

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy what the slots ``sources`` [n] hold to the slots ``targets`` [n], in every pool; the two may overlap."""
        for pool in (*self._keys, *self._values):
            pool.index_copy_(0, targets, pool.index_select(0, sources))

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [R, B * block_size, Hkv, D] of block ids [R, B]."""
        return self._gather(self._keys[layer], blocks), self._gather(self._values[layer], blocks)

    def _gather(self, pool: Tensor, blocks: Tensor) -> Tensor:
        rows = pool.view(self.num_blocks, -1).index_select(0, blocks.flatten())
        return rows.view(blocks.shape[0], blocks.shape[1] * self.block_size, *self._entry)


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests attended together: their rows [G] in the batch (None: all, in order), block ids [G, B], a mask a layer kind."""

    rows: Tensor | None
    blocks: Tensor
    masks: dict[LayerMask, Tensor]


class PagedContext:
    """The contexts of R requests in the pools, as a ``BlockContext``; built once a round, used by every layer."""

    def __init__(self, pools: DraftPools, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        self._pools = pools
        self._fold = pools.config.num_heads // pools.config.num_kv_heads
        parts = split_rows(lengths, pools.block_size)
        self._groups = [self._make_group(part, tables, lengths, len(parts) == 1) for part in parts]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of q over context and block; padding takes no part."""
        if len(self._groups) == 1:
            return self._attend_group(self._groups[0], layer, q, k, v)
        out = torch.empty_like(q)
        for group in self._groups:
            rows = group.rows
            out[rows] = self._attend_group(group, layer, q[rows], k[rows], v[rows])
        return out

    def _attend_group(self, group: _Group, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config = self._pools.config
        num_rows, num_slots = q.shape[:2]
        mask = group.masks[config.layer_masks[layer]]
        keys, values = (gathered[:, : mask.shape[-1]] for gathered in self._pools.gather(layer, group.blocks))
        keys[:, -num_slots:], values[:, -num_slots:] = k, v
        # Query heads that share a KV head become further query rows: keys and values are then read once, not repeated.
        folded = q.view(num_rows, num_slots, config.num_kv_heads, self._fold, config.head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=config.attention_scale)
        return out.view(num_rows, -1, self._fold, num_slots, config.head_dim).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _make_group(self, part: Sequence[int], tables: Sequence[Sequence[int]], lengths: Sequence[int], is_all: bool) -> _Group:
        size = self._pools.block_size
        counts = [-(-lengths[row] // size) for row in part]
        depth = max(counts)
        # The copy of the context leaves room behind it for the block's own keys and values.
        width = depth + -(-self._pools.config.num_slots // size)
        blocks = torch.tensor([[*tables[row][:n], *[0] * (width - n)] for row, n in zip(part, counts, strict=True)], dtype=torch.int64)
        bounds = torch.tensor([lengths[row] for row in part]).view(-1, 1, 1)
        config, device = self._pools.config, self._pools.device
        masks = {
            kind: _mask(kind, bounds, depth * size, config.num_slots, self._fold, self._pools.dtype).to(device)
            for kind in set(config.layer_masks)
        }
        rows = None if is_all else torch.tensor(part, device=device)
        return _Group(rows, blocks.to(device), masks)


def split_rows(lengths: Sequence[int], block_size: int) -> list[list[int]]:
    """Rows in parts whose longest context is at most about twice the shortest; one part keeps the rows' order."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: lengths[r]):
        if parts and lengths[row] <= 2 * lengths[parts[-1][0]] + 4 * block_size:
            parts[-1].append(row)
        else:
            parts.append([row])
    return [sorted(part) for part in parts]


def _mask(kind: LayerMask, lengths: Tensor, depth: int, num_slots: int, fold: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [G, 1, fold * S, depth + S] of ``lengths`` [G, 1, 1]: 0 where a block query sees a key, -inf elsewhere."""
    query = torch.arange(num_slots).view(1, -1, 1)
    context, block = torch.arange(depth).view(1, 1, -1), torch.arange(num_slots).view(1, 1, -1)
    sees_context = (context < lengths).expand(-1, num_slots, -1)
    sees_block = (block <= query) if kind.causal else torch.ones(1, num_slots, num_slots, dtype=torch.bool)
    if kind.window is not None and kind.from_anchor:
        sees_context = sees_context & (context >= lengths - kind.window)
    elif kind.window is not None:
        sees_context = sees_context & (context > lengths + query - kind.window)
        sees_block = sees_block & (block > query - kind.window)
    sees = torch.cat((sees_context, sees_block.expand(len(lengths), -1, -1)), dim=-1)
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf"))
    return mask.repeat(1, fold, 1).unsqueeze(1)
