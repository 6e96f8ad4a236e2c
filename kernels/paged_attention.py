"""Attention of ragged query rows over paged KV: prefill chunks, decode and verify rows are one case.

Shapes (T tokens on one flat axis, S = num_blocks * block_size slots, G = H / Hkv query heads a KV head)::

    query    [T, H, D]        key_cache [S, Hkv, D]      value_cache [S, Hkv, Dv]      out [T, H, Dv]
    row r owns tokens starts[r] .. starts[r] + lengths[r] and attends to its first contexts[r] positions
    (its own new tokens included, already written); its first token sits at position contexts[r] - lengths[r].
    slot of position p of row r: tables[r][p // block_size] * block_size + p % block_size
    window   w: a query at position i sees positions > i - w        softcap c: scores become c * tanh(scores / c)
    first    positions before it are seen by nobody; every query's own must not be one of them
    sinks    [H]: one extra logit a head in the softmax's denominator
    visible  per row, optional [n, n] bool: which of its new tokens each new token sees (draft trees); None is causal

``reference`` is the specification. ``PagedBatch.plan`` groups rows of like size once a step; ``paged_attention`` then
does one padded gather and one scaled_dot_product_attention a group and layer, query heads of a KV head folded into the
query axis (measured on CPU, bf16, 16 rows of 300: 0.45 ms against 3.6 ms row by row).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_WIDTHS = (16, 64)  # rows are grouped with rows of the same width class; those of more tokens are computed alone


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One row of the batch, on the host."""

    start: int
    length: int
    context: int
    table: Sequence[int]
    visible: Tensor | None = None


@dataclass(slots=True)
class RowGroup:
    """Rows that are computed together, padded to ``width`` queries and ``depth`` positions."""

    num_rows: int
    width: int
    depth: int
    tokens: Tensor  # [R * width] int64, flat token index of each query (padding repeats a row's first token)
    slots: Tensor  # [R * depth] int64 (padding repeats slot of position 0)
    distance: Tensor  # [R, width, depth] int32: query position - key position, for windows
    visible: Tensor  # [R, width, depth] bool
    real: Tensor | None  # [n] int64 into R * width: the queries that are not padding; None: all are real
    is_full: bool  # nothing is masked without a window
    masks: dict[tuple[int | None, int, int, torch.dtype], Tensor | None] = field(default_factory=dict)

    def mask(self, shape: AttentionShape, fold: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [R, 1, width * fold, depth], computed once a step for layers that see alike; None: nothing is masked."""
        key = (shape.window, shape.first, fold, dtype)
        if key not in self.masks:
            self.masks[key] = self._make_mask(shape.window, shape.first, fold, dtype)
        return self.masks[key]

    def _make_mask(self, window: int | None, first: int, fold: int, dtype: torch.dtype) -> Tensor | None:
        visible = self.visible
        if window is not None and int(self.distance.max()) >= window:
            visible = visible & (self.distance < window)
        elif self.is_full and not first:
            return None
        if first:
            visible = visible & (torch.arange(self.depth, device=visible.device) >= first)
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
        return mask.repeat_interleave(fold, dim=1).unsqueeze(1)


@dataclass(slots=True)
class PagedBatch:
    """The rows of one step, grouped for ``paged_attention``; shared by all layers."""

    num_tokens: int
    groups: list[RowGroup]

    @staticmethod
    def plan(rows: Sequence[AttentionRow], block_size: int, device: torch.device) -> PagedBatch:
        """Group rows so that padding at most about doubles the work of a group."""
        groups = [_make_group(part, block_size, device) for part in _split(rows)]
        return PagedBatch(sum(row.length for row in rows), groups)


def _split(rows: Sequence[AttentionRow]) -> list[list[AttentionRow]]:
    """Rows in parts of like query width and context depth."""
    parts: list[list[AttentionRow]] = []
    for row in sorted((r for r in rows if r.length), key=lambda r: (_width_class(r), r.context)):
        first = parts[-1][0] if parts else None
        is_alike = first is not None and _width_class(row) == _width_class(first) < len(GROUP_WIDTHS)
        if first is not None and is_alike and row.context <= 2 * first.context + 64:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _width_class(row: AttentionRow) -> int:
    return bisect_left(GROUP_WIDTHS, row.length)


def _make_group(rows: Sequence[AttentionRow], block_size: int, device: torch.device) -> RowGroup:
    count, width, depth = len(rows), max(r.length for r in rows), max(r.context for r in rows)
    lengths = torch.tensor([r.length for r in rows])
    contexts = torch.tensor([r.context for r in rows])
    starts = torch.tensor([r.start for r in rows])
    num_blocks = -(-depth // block_size)
    tables = torch.tensor([list(r.table[:num_blocks]) + [r.table[0]] * (num_blocks - len(r.table)) for r in rows])
    slots = (tables.unsqueeze(-1) * block_size + torch.arange(block_size)).view(count, -1)[:, :depth]
    query = torch.arange(width).expand(count, width)
    is_real = query < lengths.unsqueeze(1)
    position = (contexts - lengths).unsqueeze(1) + query.clamp(max=width - 1)
    key = torch.arange(depth)
    distance = position.unsqueeze(-1) - key
    visible = (distance >= 0) & (key < contexts.view(-1, 1, 1))
    slots = torch.where(key < contexts.unsqueeze(1), slots, slots[:, :1])
    for i, row in enumerate(rows):
        if row.visible is not None:
            base = row.context - row.length
            depths = row.visible.sum(-1) - 1
            distance[i, : row.length, :base] = (base + depths).unsqueeze(1) - torch.arange(base)
            distance[i, : row.length, base : row.context] = depths.unsqueeze(1) - depths.unsqueeze(0)
            visible[i, : row.length, :base] = True
            visible[i, : row.length, base : row.context] = row.visible
    distance = torch.where(is_real.unsqueeze(-1), distance, distance.new_zeros(()))
    visible = torch.where(is_real.unsqueeze(-1), visible, key == 0)  # a padded query must see something: no NaN
    tokens = torch.where(is_real, starts.unsqueeze(1) + query, starts.unsqueeze(1))
    real = None if bool(is_real.all()) else is_real.view(-1).nonzero().squeeze(1).to(device)
    return RowGroup(
        num_rows=count,
        width=width,
        depth=depth,
        tokens=tokens.reshape(-1).to(device),
        slots=slots.reshape(-1).to(device),
        distance=distance.to(device=device, dtype=torch.int32),
        visible=visible.to(device),
        real=real,
        is_full=bool(visible.all()),
    )


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one layer asks of its attention besides the tensors."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    first: int = 0


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch, shape: AttentionShape, sinks: Tensor | None = None
) -> Tensor:
    """Attention output [T, H, Dv]; rows of ``query`` that belong to no row of the batch (padding) come out as zero."""
    heads, kv_heads = query.shape[1], key_cache.shape[1]
    fold = heads // kv_heads
    out = query.new_zeros(query.shape[0], heads, value_cache.shape[-1])
    for group in batch.groups:
        rows, width, depth = group.num_rows, group.width, group.depth
        keys = key_cache.index_select(0, group.slots).view(rows, depth, kv_heads, -1).transpose(1, 2)
        values = value_cache.index_select(0, group.slots).view(rows, depth, kv_heads, -1).transpose(1, 2)
        queries = query.index_select(0, group.tokens).view(rows, width, kv_heads, fold, -1)
        queries = queries.permute(0, 2, 1, 3, 4).reshape(rows, kv_heads, width * fold, -1)
        mask = group.mask(shape, fold, query.dtype)
        if shape.softcap is None and sinks is None:
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=shape.scale)
        else:
            attended = _attend(queries, keys, values, mask, shape, _fold_sinks(sinks, kv_heads, fold, width))
        attended = attended.view(rows, kv_heads, width, fold, -1).permute(0, 2, 1, 3, 4).reshape(rows * width, heads, -1)
        if group.real is None:
            out.index_copy_(0, group.tokens, attended)
        else:
            out.index_copy_(0, group.tokens[group.real], attended[group.real])
    return out


def _fold_sinks(sinks: Tensor | None, kv_heads: int, fold: int, width: int) -> Tensor | None:
    """Sink logits [H] as [1, Hkv, width * fold, 1], in the order of folded queries."""
    if sinks is None:
        return None
    return sinks.float().view(1, kv_heads, 1, fold).expand(1, kv_heads, width, fold).reshape(1, kv_heads, width * fold, 1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
    """Softmax attention in fp32 with the parts that scaled_dot_product_attention lacks."""
    scores = (queries.float() @ keys.float().transpose(-1, -2)) * shape.scale
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    if mask is not None:
        scores = scores + mask.float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(scores.shape[0], -1, -1, 1)], dim=-1).softmax(-1)[..., :-1]
    else:
        scores = scores.softmax(-1)
    return (scores @ values.float()).to(queries.dtype)


def reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: Sequence[AttentionRow],
    block_size: int,
    shape: AttentionShape,
    sinks: Tensor | None = None,
) -> Tensor:
    """The specification: one query and one head at a time, in fp64."""
    heads, kv_heads = query.shape[1], key_cache.shape[1]
    out = query.new_zeros(query.shape[0], heads, value_cache.shape[-1])
    for row in rows:
        slots = [row.table[p // block_size] * block_size + p % block_size for p in range(row.context)]
        base = row.context - row.length
        for i in range(row.length):
            seen = [p for p in _seen(row, base, i, shape.window) if p >= shape.first]
            for head in range(heads):
                keys = key_cache[[slots[p] for p in seen], head * kv_heads // heads].double()
                values = value_cache[[slots[p] for p in seen], head * kv_heads // heads].double()
                scores = keys @ query[row.start + i, head].double() * shape.scale
                if shape.softcap is not None:
                    scores = torch.tanh(scores / shape.softcap) * shape.softcap
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head].double().view(1)])
                weights = scores.softmax(-1)[: len(seen)]
                out[row.start + i, head] = (weights @ values).to(out.dtype)
    return out


def _seen(row: AttentionRow, base: int, i: int, window: int | None) -> list[int]:
    """Positions in storage order that new token ``i`` of a row attends to."""
    if row.visible is None:
        position = base + i
        return [p for p in range(position + 1) if window is None or position - p < window]
    depth = [int(row.visible[j].sum()) - 1 for j in range(row.length)]
    position = base + depth[i]
    old = [p for p in range(base) if window is None or position - p < window]
    new = [base + j for j in range(row.length) if bool(row.visible[i, j]) and (window is None or depth[i] - depth[j] < window)]
    return old + new
