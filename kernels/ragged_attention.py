"""Attention of ragged query rows over paged KV, described on the device: the form that CUDA graphs can hold.

The function is that of ``paged_attention`` (whose ``reference`` is the specification). There rows are Python objects and padding
depends on them; here everything that changes from step to step is read from tensors whose sizes stay::

    query      [T, H, D]      key_cache [S, Hkv, D]      value_cache [S, Hkv, Dv]      out [T, H, Dv]
    positions  [T] int64      where each token sits (a tree's node at the depth of its path)
    starts     [R + 1] int32  row r owns tokens starts[r] .. starts[r + 1]; rows may be empty, and together they cover all T
    contexts   [R] int32      positions that row r attends to, its new tokens included; 0: its tokens come out as zero (padding)
    tables     [N] int32      block ids of all rows; those of row r from table_starts[r] on
    ancestors  [T] int64      bit j: the token sees new token j of its row (draft trees of at most 63 nodes); 0: causal

On CUDA a Triton kernel serves prefill, verify and decode rows alike; where rows are few, the context is split between programs, and
the one that comes last joins the parts. Elsewhere the rows are read back and ``paged_attention`` computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.kernels.device import launches_early
from dspark.kernels.paged_attention import AttentionRow, AttentionShape, PagedBatch, paged_attention

MAX_TREE_TOKENS = 63  # a node's ancestors are bits of an int64, whose sign is not used
MIN_TILE_ROWS, MAX_TILE_ROWS = 16, 64  # 16 is the least a matrix product takes
NUM_COUNTERS = 4096
ROWS_BLOCKS = (64, 512)  # row bounds that a program reads at once: each size is a compilation
_COUNTERS: dict[torch.device, Tensor] = {}
SPLITS = (8, 4)  # at most so many programs share a context; few choices: each is a compilation
PROGRAMS_A_PROCESSOR = 4  # that splitting makes at most


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """The rows of one step, on the device. ``longest``: tokens of the longest row to be expected, a hint for the size of tiles."""

    positions: Tensor
    starts: Tensor
    contexts: Tensor
    table_starts: Tensor
    tables: Tensor
    block_size: int
    longest: int = 1
    ancestors: Tensor | None = None
    sees_all: bool = False  # every new token sees its whole row, behind itself too (a drafter's block)
    is_given: bool = False  # no kernel that may still run when attention begins has written these, or KV of tokens that are not new

    @property
    def num_rows(self) -> int:
        return self.contexts.shape[0]

    @staticmethod
    def plan(rows: Sequence[AttentionRow], block_size: int, device: torch.device, num_tokens: int | None = None) -> RaggedBatch:
        """The rows, which follow one another on the token axis, and a row of padding up to ``num_tokens``."""
        positions: list[int] = []
        ancestors: list[int] = []
        tables: list[int] = []
        table_starts: list[int] = []
        for row in rows:
            bits = row_ancestors(row)
            base = row.context - row.length
            positions.extend([base + word.bit_count() - 1 for word in bits] if any(bits) else range(base, row.context))
            ancestors.extend(bits)
            table_starts.append(len(tables))
            tables.extend(row.table[: -(-row.context // block_size)])
        total = len(positions)
        padding = (total if num_tokens is None else num_tokens) - total
        starts = [row.start for row in rows] + [total, total + padding]
        return RaggedBatch(
            positions=torch.tensor(positions + [0] * padding, device=device),
            starts=torch.tensor(starts, dtype=torch.int32, device=device),
            contexts=torch.tensor([row.context for row in rows] + [0], dtype=torch.int32, device=device),
            table_starts=torch.tensor([*table_starts, 0], dtype=torch.int32, device=device),
            tables=torch.tensor(tables or [0], dtype=torch.int32, device=device),
            block_size=block_size,
            longest=max((row.length for row in rows), default=1),
            ancestors=torch.tensor(ancestors + [0] * padding, device=device) if any(ancestors) else None,
        )

    def host_rows(self) -> list[AttentionRow]:
        """The rows as ``paged_attention`` takes them; padding and empty rows left out."""
        starts, contexts = self.starts.tolist(), self.contexts.tolist()
        rows = []
        for r, (context, first) in enumerate(zip(contexts, self.table_starts.tolist(), strict=True)):
            length = starts[r + 1] - starts[r]
            if length and context:
                table = self.tables[first : first - (-context // self.block_size)].tolist()
                rows.append(AttentionRow(starts[r], length, context, table, self._visible(starts[r], length)))
        return rows

    def _visible(self, start: int, length: int) -> Tensor | None:
        if self.sees_all:
            return torch.ones(length, length, dtype=torch.bool)
        if self.ancestors is None or not bool(self.ancestors[start]):
            return None
        bits = self.ancestors[start : start + length].cpu()
        return (bits.unsqueeze(1) >> torch.arange(length)) & 1 != 0


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is cut: a function of the problem's sizes alone, so that it is the same for every step of a graph."""

    tokens: int  # of one row, with the query heads of one KV head
    rows: int  # of the matrix product they are folded into
    keys: int  # positions at a time
    splits: int  # programs that share a context
    warps: int
    stages: int


def tiling(num_tokens: int, num_rows: int, longest: int, heads: int, kv_heads: int, head_dim: int, num_processors: int) -> Tiling:
    """The tiling for T tokens in R rows on a device of so many multiprocessors."""
    group = heads // kv_heads
    rows = min(max(power_of_2(group * longest), MIN_TILE_ROWS, power_of_2(group)), max(MAX_TILE_ROWS, power_of_2(group)))
    tokens = rows // group
    programs = (num_tokens // tokens + num_rows) * kv_heads
    splits = next((count for count in SPLITS if programs * count <= PROGRAMS_A_PROCESSOR * num_processors), 1)
    if splits == 1 and rows == MIN_TILE_ROWS and head_dim <= 64:  # many contexts, little to do for each: as much under way as fits
        return Tiling(tokens, rows, 128, 1, 4, 3)
    return Tiling(tokens, rows, 64 if head_dim <= 128 else 32, splits, 4, 2)


def ragged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: RaggedBatch, shape: AttentionShape, sinks: Tensor | None = None
) -> Tensor:
    """Attention output [T, H, Dv]. Caches must be contiguous. On CUDA nothing waits for the device."""
    if query.is_cuda:
        return launch(query, key_cache, value_cache, batch, shape, sinks)
    rows = PagedBatch.plan(batch.host_rows(), batch.block_size, query.device)
    if not batch.sees_all or shape.window is None:
        return paged_attention(query, key_cache, value_cache, rows, shape, sinks)
    raise NotImplementedError("windows over rows that see all of themselves are for the kernel only")


def launch(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: RaggedBatch, shape: AttentionShape, sinks: Tensor | None = None
) -> Tensor:
    """Run the Triton kernel."""
    from dspark.kernels import attention_triton as code

    num_tokens, heads, key_dim = query.shape
    kv_heads, value_dim = value_cache.shape[1], value_cache.shape[2]
    assert all(cache.is_contiguous() for cache in (key_cache, value_cache))
    query = query if query.stride(2) == 1 else query.contiguous()
    cut = tiling(num_tokens, batch.num_rows, batch.longest, heads, kv_heads, key_dim, _num_processors(query.device))
    out = query.new_empty(num_tokens, heads, value_dim)
    partial = weights = out
    if cut.splits > 1:
        partial = query.new_empty(cut.splits, num_tokens, heads, value_dim, dtype=torch.float32)
        weights = query.new_empty(2, cut.splits, num_tokens, heads, dtype=torch.float32)
    optional_sinks = out if sinks is None else sinks
    num_tiles = num_tokens // cut.tokens + batch.num_rows
    code.attend[(num_tiles, kv_heads, cut.splits)](
        query,
        key_cache,
        value_cache,
        out,
        partial,
        weights,
        out if cut.splits == 1 else _arrived(num_tiles * kv_heads, query.device),
        batch.positions,
        batch.starts,
        batch.contexts,
        batch.table_starts,
        batch.tables,
        batch.positions if batch.ancestors is None else batch.ancestors,
        optional_sinks,
        num_tokens,
        batch.num_rows,
        shape.window or 0,
        shape.scale,
        shape.softcap or 1.0,
        query.stride(0),
        query.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_BLOCK=max(16, power_of_2(key_dim)),
        VALUE_BLOCK=max(16, power_of_2(value_dim)),
        BLOCK_SIZE=batch.block_size,
        TILE_TOKENS=cut.tokens,
        TILE_ROWS=cut.rows,
        TILE_KEYS=cut.keys,
        SPLITS=cut.splits,
        ROWS_BLOCK=next((size for size in ROWS_BLOCKS if size >= batch.num_rows), power_of_2(batch.num_rows)),
        HAS_ANCESTORS=batch.ancestors is not None,
        HAS_WINDOW=shape.window is not None,
        HAS_SOFTCAP=shape.softcap is not None,
        HAS_SINKS=sinks is not None,
        SEES_ALL=batch.sees_all,
        FIRST=shape.first,
        IS_CHAINED=launches_early(query.device),
        IS_GIVEN=batch.is_given,
        num_warps=cut.warps,
        num_stages=cut.stages,
        launch_pdl=launches_early(query.device),
    )
    return out


def slots_of(batch: RaggedBatch, positions: Tensor) -> Tensor:
    """The slot [T] int64 of position ``positions[i]`` of the row that token i belongs to; -1 where it is negative. Waits for nothing."""
    size, places = batch.block_size, positions.clamp(min=0)
    tokens = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    rows = torch.searchsorted(batch.starts[1:], tokens, right=True).clamp(max=batch.num_rows - 1)
    blocks = batch.tables.index_select(0, batch.table_starts.index_select(0, rows) + places // size)
    return torch.where(positions >= 0, blocks * size + places % size, -1)


def row_ancestors(row: AttentionRow) -> list[int]:
    """For each token of a row the bits of the row's tokens that it sees; zeros for a chain."""
    if row.visible is None:
        return [0] * row.length
    assert row.length <= MAX_TREE_TOKENS, "a tree has more nodes than bits"
    weights = 1 << torch.arange(row.length)
    words: list[int] = (row.visible * weights).sum(-1).tolist()
    return words


def power_of_2(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()


def _arrived(count: int, device: torch.device) -> Tensor:
    """Counters that are 0 between launches; launches that split contexts must follow one another, as those of one stream do."""
    assert count <= NUM_COUNTERS  # graphs hold them: they may never move
    if device not in _COUNTERS:
        _COUNTERS[device] = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    return _COUNTERS[device]


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
