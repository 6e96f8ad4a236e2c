"""Our paged attention as a transformers attention function.

``AttentionInterface.register`` without a mask function makes transformers build no mask and hand over only the new
tokens' keys and values; every model keyword it does not know reaches the function. The step's data (block tables, pools)
travels that way, as the argument ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dspark.kernels.kv_store import Projected, rotate_and_store, store_kv
from dspark.kernels.paged_attention import AttentionRow, AttentionShape, PagedBatch, paged_attention
from dspark.kernels.ragged_attention import RaggedBatch, ragged_attention, slots_of

ATTENTION_NAME = "dspark_paged"


class AttentionStep(Protocol):
    """What a forward carries to every attention layer."""

    def attend(self, layer: int, tensors: QKV, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
        """Attention output [T, H, Dv] of one layer."""


@dataclass(frozen=True, slots=True)
class QKV:
    """One layer's new tensors on the flat axis: query [T, H, D], key [T, Hkv, D], value [T, Hkv, Dv]."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV shape of one attention layer; ``source`` is the layer whose pool it reads (itself, unless KV is shared)."""

    kv_heads: int
    key_dim: int
    value_dim: int
    source: int


class KVStore:
    """Key and value pools [num_slots, kv_heads, head_dim] of every layer that owns KV."""

    def __init__(self, layers: dict[int, LayerShape], num_blocks: int, block_size: int, like: Tensor) -> None:
        self.layers = layers
        self.block_size = block_size
        self.device = like.device
        slots = num_blocks * block_size
        # zeros, not empty: a masked slot still enters 0 * value, and garbage may be NaN
        self.keys = {i: like.new_zeros(slots, s.kv_heads, s.key_dim) for i, s in layers.items() if s.source == i}
        self.values = {i: like.new_zeros(slots, s.kv_heads, s.value_dim) for i, s in layers.items() if s.source == i}

    def by_block(self) -> dict[str, Tensor]:
        """The pools by name, as views [num_blocks, block_size, kv_heads, head_dim]."""
        named = {f"key {i}": pool for i, pool in self.keys.items()} | {f"value {i}": pool for i, pool in self.values.items()}
        return {name: pool.view(-1, self.block_size, *pool.shape[1:]) for name, pool in named.items()}

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy what the slots ``sources`` [n] int64 hold to the slots ``targets`` [n], in every pool; the two may overlap."""
        for pool in (*self.keys.values(), *self.values.values()):
            pool.index_copy_(0, targets, pool.index_select(0, sources))

    @staticmethod
    def bytes_per_token(layers: dict[int, LayerShape], itemsize: int) -> int:
        """Bytes of KV that one position takes over all layers."""
        return sum(s.kv_heads * (s.key_dim + s.value_dim) for i, s in layers.items() if s.source == i) * itemsize


@dataclass(slots=True)
class PagedStep:
    """One forward's data: where new KV goes, what each row sees, and the taps it leaves behind."""

    store: KVStore
    batch: PagedBatch
    slots: Tensor  # [num_real] int64: the slot of each real token; padding tokens at the tail have none
    rows: Sequence[AttentionRow]
    taps: dict[int, Tensor] = field(default_factory=dict)

    def slots_before(self, positions: Tensor) -> Tensor:
        """Where KV of the position before each token lies; -1: there is none."""
        size = self.store.block_size
        tables = [row.table for row in self.rows for _ in range(row.length)]
        before = [position - 1 for position in positions.tolist()]
        found = [-1 if p < 0 else table[p // size] * size + p % size for p, table in zip(before, tables, strict=True)]
        return torch.tensor(found, device=positions.device)

    def attend(self, layer: int, tensors: QKV, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
        source = self.store.layers[layer].source
        keys, values = self.store.keys[source], self.store.values[source]
        if source == layer:
            count = self.slots.shape[0]
            keys.index_copy_(0, self.slots, tensors.key[:count])
            values.index_copy_(0, self.slots, tensors.value[:count])
        return paged_attention(tensors.query, keys, values, self.batch, shape, sinks)


@dataclass(slots=True)
class RaggedStep:
    """The same as ``PagedStep`` from data on the device alone: what CUDA runs, and what a graph can hold."""

    store: KVStore
    batch: RaggedBatch
    slots: Tensor  # [T] the slot of each token; -1 for padding
    taps: dict[int, Tensor] = field(default_factory=dict)

    def slots_before(self, positions: Tensor) -> Tensor:
        """Where KV of the position before each token lies; -1: there is none."""
        return torch.where(self.slots >= 0, slots_of(self.batch, positions - 1), -1)

    def attend(self, layer: int, tensors: QKV, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
        source = self.store.layers[layer].source
        keys, values = self.store.keys[source], self.store.values[source]
        if source == layer:
            store_kv(tensors.key, tensors.value, keys, values, self.slots)
        return ragged_attention(tensors.query, keys, values, self.batch, shape, sinks)

    def attend_projected(self, layer: int, new: Projected, shape: AttentionShape) -> Tensor:
        """``attend`` of a layer with KV of its own, from its merged projection: [T, H, D]."""
        keys, values = self.store.keys[layer], self.store.values[layer]
        return ragged_attention(rotate_and_store(new, keys, values, self.slots), keys, values, self.batch, shape)


def make_step(store: KVStore, rows: Sequence[AttentionRow], slots: list[int], padding: int) -> PagedStep | RaggedStep:
    """One forward over ``rows``, whose tokens go to ``slots``, and ``padding`` tokens behind them."""
    device = store.device
    if device.type == "cuda":
        batch = RaggedBatch.plan(rows, store.block_size, device, len(slots) + padding)
        return RaggedStep(store, batch, torch.tensor(slots + [-1] * padding, device=device))
    return PagedStep(store, PagedBatch.plan(rows, store.block_size, device), torch.tensor(slots, device=device), rows)


@dataclass(slots=True)
class ProbeStep:
    """A forward that only notes each layer's KV shape, and which layers are handed another layer's KV."""

    seen: dict[int, QKV] = field(default_factory=dict)

    def attend(self, layer: int, tensors: QKV, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
        self.seen[layer] = tensors
        tokens, heads, _ = tensors.query.shape
        return tensors.query.new_zeros(tokens, heads, tensors.value.shape[-1])

    def layers(self) -> dict[int, LayerShape]:
        """The shapes, with shared KV resolved to the layer that computed it."""
        found: dict[int, LayerShape] = {}
        for layer, seen in sorted(self.seen.items()):
            source = next((i for i in sorted(found) if self._same(self.seen[i], seen)), layer)
            found[layer] = LayerShape(seen.key.shape[1], seen.key.shape[2], seen.value.shape[2], source)
        return found

    @staticmethod
    def _same(a: QKV, b: QKV) -> bool:
        return a.key.data_ptr() == b.key.data_ptr() and a.value.data_ptr() == b.value.data_ptr() and a.key.shape == b.key.shape


def paged_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: AttentionStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, Hkv, T, D] of the new tokens only."""
    shape = AttentionShape(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    tensors = QKV(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    return step.attend(module.layer_idx, tensors, shape, s_aux).unsqueeze(0), None  # type: ignore[arg-type]


def register() -> None:
    """Make ``attn_implementation="dspark_paged"`` known to transformers (idempotent)."""
    AttentionInterface.register(ATTENTION_NAME, paged_forward)


TapHook = Callable[..., None]


def tap_hook(tap: int) -> TapHook:
    """A forward hook that leaves a layer's output [T, d] in the step's taps."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        step = kwargs.get("step")
        if isinstance(step, (PagedStep, RaggedStep)):
            step.taps[tap] = (output if isinstance(output, torch.Tensor) else output[0])[0]

    return hook


def embedding_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of the first layer that leaves the embeddings [T, d] as tap -1."""
    step = kwargs.get("step")
    if isinstance(step, (PagedStep, RaggedStep)):
        step.taps[-1] = (args[0] if args else kwargs["hidden_states"])[0]
