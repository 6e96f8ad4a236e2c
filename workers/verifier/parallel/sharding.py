"""Cut a loaded model down to one rank's share, by the shape of its modules and not by a list of families.

::

    attention   q, k, v by heads (MLA: q_b, kv_b), o by the same heads; ends in a sum over ranks
    gated MLP   gate and up by rows, down by columns; ends in a sum over ranks
    experts     whole experts to groups, their inner width within a group; ends in a sum over ranks
    lm_head     columns of the logits, gathered on the leader, which keeps it whole for its drafter

Everything else (embeddings, norms, routers, attention of other shapes) stays whole on every rank. What a family does
differently from its shapes shows in the logits, which are compared with the whole model's at load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspark.workers.verifier.parallel.group import RankGroup
from dspark.workers.verifier.parallel.layout import check_experts, check_heads
from dspark.workers.verifier.targets import decoder_layers

BY_QUERY_HEAD = ("q_proj", "q_b_proj", "kv_b_proj")
BY_KV_HEAD = ("k_proj", "v_proj")


class RowParallel(nn.Linear):
    """A linear layer that holds a share of its inputs: [..., share] -> [..., outputs], summed over the ranks."""

    def __init__(self, linear: nn.Linear, columns: range, group: RankGroup) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = len(columns), linear.out_features
        self.weight = _cut(linear.weight, columns, dim=1)
        self.bias = linear.bias
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        out = self._group.all_reduce(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


class SplitHead(nn.Module):
    """The output head: every rank computes its share of the columns; the leader gets all of them, the others their own."""

    def __init__(self, head: nn.Linear, group: RankGroup) -> None:
        super().__init__()
        self.out_features, self._group = head.out_features, group
        self._rows = group.layout.share(head.out_features)
        self._is_whole = group.layout.is_leader
        self.weight = head.weight if self._is_whole else _cut(head.weight, self._rows, dim=0)
        self.bias = head.bias if self._is_whole or head.bias is None else _cut(head.bias, self._rows, dim=0)

    def forward(self, x: Tensor) -> Tensor:
        own = slice(len(self._rows)) if self._is_whole else slice(None)
        out = F.linear(x, self.weight[own], None if self.bias is None else self.bias[own])
        return self._group.gather_columns(out, self.out_features)


class SplitExperts(nn.Module):
    """A layer's experts: this rank's share of them works for the tokens that chose it; the sum over ranks is the layer's.

    ``load`` counts the tokens that chose each expert.
    """

    def __init__(self, experts: Any, group: RankGroup, load: ExpertLoad) -> None:
        super().__init__()
        self._group, self._load = group, load
        own = group.layout.experts(experts.num_experts)
        place = torch.full((experts.num_experts,), len(own))  # transformers skips experts beyond the last
        place[own.start : own.stop] = torch.arange(len(own))
        self.place: Tensor
        self.register_buffer("place", place, persistent=False)
        _cut_experts(experts, group)
        self.inner = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._load.count(top_k_index)
        return self._group.all_reduce(self.inner(hidden_states, self.place[top_k_index], top_k_weights))


class ExpertLoad:
    """Tokens that chose each expert, over all layers."""

    def __init__(self, num_experts: int) -> None:
        self.tokens = torch.zeros(num_experts, dtype=torch.int64)
        self._is_real: Tensor | None = None  # [T] the step's tokens that are not padding; None: nothing is counted

    def clear(self) -> None:
        """Count from here on."""
        with torch.inference_mode():  # as the forwards that count, whose graphs hold the tensor
            self.tokens.zero_()

    @contextmanager
    def counting(self, slots: Tensor, num_tokens: int) -> Iterator[None]:
        """A forward of so many tokens; ``slots`` are those of the first, -1 for padding. Nothing waits for the device."""
        if self.tokens.device != slots.device:
            self.tokens = self.tokens.to(slots.device)
        self._is_real = F.pad(slots >= 0, (0, num_tokens - slots.shape[0])).to(torch.int64)
        try:
            yield
        finally:
            self._is_real = None

    def count(self, top_k_index: Tensor) -> None:
        """Note one layer's routing [T, k]."""
        if self._is_real is None:
            return
        self.tokens.scatter_add_(0, top_k_index.reshape(-1), self._is_real.repeat_interleave(top_k_index.shape[1]))


def split_model(model: PreTrainedModel, group: RankGroup) -> ExpertLoad | None:
    """Replace a model's large parts by this rank's share; returns the count of its experts' tokens, if it has experts.

    ConfigError if its heads or experts cannot be split so.
    """
    name, layout = type(model).__name__, group.layout
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    layers = decoder_layers(model)
    experts = [(module, key, child) for module in layers.modules() for key, child in module.named_children() if _is_experts(child)]
    num_experts = int(experts[0][2].num_experts) if experts else 0  # type: ignore[arg-type]  # a module's attribute may be a tensor
    check_experts(name, num_experts, layout.expert)
    load = ExpertLoad(num_experts)
    for module in list(layers.modules()):
        if _is_attention(module):
            _split_attention(module, name, heads, group)
        elif _is_mlp(module):
            _split_mlp(module, group)
    for parent, key, child in experts:
        setattr(parent, key, SplitExperts(child, group, load))
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is nn.Linear:
        model.set_output_embeddings(SplitHead(head, group))  # type: ignore[no-untyped-call]
    return load if experts else None


def _is_linear(module: Any, *names: str) -> bool:
    return all(type(getattr(module, name, None)) is nn.Linear for name in names)


def _is_attention(module: nn.Module) -> bool:
    has_query = _is_linear(module, "q_proj") or _is_linear(module, "q_b_proj")
    has_keys = _is_linear(module, "k_proj") or _is_linear(module, "kv_b_proj") or getattr(module, "is_kv_shared_layer", False)
    return _is_linear(module, "o_proj") and has_query and has_keys


def _is_mlp(module: nn.Module) -> bool:
    return _is_linear(module, "gate_proj", "up_proj", "down_proj")


def _is_experts(module: nn.Module) -> bool:
    weights = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return hasattr(module, "is_transposed") and all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in weights)


def _split_attention(attention: Any, name: str, heads: int, group: RankGroup) -> None:
    layout = group.layout
    kv_heads = attention.k_proj.out_features // attention.head_dim if _is_linear(attention, "k_proj") else heads
    check_heads(name, heads, kv_heads, layout.size)
    own, own_kv = layout.share(heads), layout.kv_share(kv_heads)
    for keys, count, share in ((BY_QUERY_HEAD, heads, own), (BY_KV_HEAD, kv_heads, own_kv)):
        for key in keys:
            if _is_linear(attention, key):
                _cut_outputs(getattr(attention, key), _scaled(share, getattr(attention, key).out_features // count))
    attention.o_proj = RowParallel(attention.o_proj, _scaled(own, attention.o_proj.in_features // heads), group)
    if isinstance(getattr(attention, "sinks", None), nn.Parameter):
        attention.sinks = _cut(attention.sinks, own, dim=0)
    attention.num_key_value_groups = len(own) // len(own_kv)


def _split_mlp(mlp: Any, group: RankGroup) -> None:
    share = group.layout.share(mlp.down_proj.in_features)
    _cut_outputs(mlp.gate_proj, share)
    _cut_outputs(mlp.up_proj, share)
    mlp.down_proj = RowParallel(mlp.down_proj, share, group)


def _cut_experts(experts: Any, group: RankGroup) -> None:
    """Keep the group's experts, and of each of them this rank's part of the inner width."""
    layout = group.layout
    own = layout.experts(experts.num_experts)
    inner, outer = (1, 2) if experts.is_transposed else (2, 1)  # of down_proj: where the inner width lies, and the outputs
    width = experts.down_proj.shape[inner]
    part = layout.expert_width(width)
    if experts.is_concatenated:
        gate_up = torch.cat([torch.arange(part.start, part.stop), torch.arange(width + part.start, width + part.stop)])
    else:
        gate_up = torch.arange(2 * part.start, 2 * part.stop)
    for key, parameter in list(experts.named_parameters(recurse=False)):
        kept = parameter.detach()[own.start : own.stop]
        if key.startswith("gate_up_proj"):
            kept = kept.index_select(outer if kept.dim() == 3 else 1, gate_up)
        elif key == "down_proj":
            kept = kept.narrow(inner, part.start, len(part))
        elif key == "down_proj_bias" and not layout.leads_group:
            kept = torch.zeros_like(kept)  # added once a group
        setattr(experts, key, nn.Parameter(kept.clone().contiguous(), requires_grad=False))
    experts.num_experts = len(own)
    experts._is_expert_parallel = layout.expert > 1


def _cut_outputs(linear: nn.Linear, rows: range) -> None:
    linear.weight = _cut(linear.weight, rows, dim=0)
    if linear.bias is not None:
        linear.bias = _cut(linear.bias, rows, dim=0)
    linear.out_features = len(rows)


def _scaled(share: range, width: int) -> range:
    return range(share.start * width, share.stop * width)


def _cut(weight: Tensor, share: range, dim: int) -> nn.Parameter:
    """A copy of a share, so that the whole can be freed."""
    return nn.Parameter(weight.detach().narrow(dim, share.start, len(share)).clone().contiguous(), requires_grad=False)
