"""Answers by the thousand: one dense batch that starts together, grows together and shrinks as rows end.

The serving engine admits requests one by one, which costs host time for each row and step. Making training data needs none
of that: all rows of a wave are left-padded to one length and decode in lockstep over a dense cache, so the host's work a step
does not depend on the number of rows. Rows that ended leave the cache whenever it has to grow.

::

    keys, values  [R, Hkv, S, D] of each layer that owns KV; column c of row r is position c - starts[r]
    bias          [R, 1, Q, S]   0 where a query may look, -inf elsewhere
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dspark.errors import ConfigError
from dspark.kernels.paged_attention import AttentionShape
from dspark.workers.verifier.attention import QKV, LayerShape
from dspark.workers.verifier.targets import Target

GROWTH = 64  # columns
PREFILL_TOKENS = 32768  # of one forward
CACHE_SHARE = 0.55  # of the free memory, for a wave whose rows all reach half of their longest answer; if none ends before, 0.85


@dataclass(slots=True)
class DenseCache:
    """Keys and values of a wave, and where each row begins."""

    shapes: dict[int, LayerShape]
    starts: Tensor  # [R] int64
    num_columns: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def make(target: Target, starts: Tensor, num_columns: int) -> DenseCache:
        """An empty cache for one row of each start."""
        cache = DenseCache(target.layers, starts, num_columns)
        like = torch.empty(0, dtype=target.dtype, device=target.device)
        for layer, shape in target.layers.items():
            if shape.source == layer:
                cache.keys[layer] = like.new_zeros(len(starts), shape.kv_heads, num_columns, shape.key_dim)
                cache.values[layer] = like.new_zeros(len(starts), shape.kv_heads, num_columns, shape.value_dim)
        return cache

    def keep(self, rows: Tensor, num_columns: int) -> None:
        """Keep only ``rows`` and make room for ``num_columns``; one layer at a time, so that two caches never exist."""
        self.starts = self.starts[rows]
        for pool in (self.keys, self.values):
            for layer, old in list(pool.items()):
                new = old.new_zeros(len(rows), old.shape[1], num_columns, old.shape[3])
                new[:, :, : self.num_columns] = old[rows]
                pool[layer] = new
        self.num_columns = num_columns


@dataclass(slots=True)
class DenseStep:
    """One forward of rows ``first .. first + count`` whose queries sit at columns ``begin .. begin + width``."""

    cache: DenseCache
    first: int
    count: int
    begin: int
    width: int
    biases: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, tensors: QKV, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
        if shape.softcap is not None or sinks is not None:
            raise ConfigError("this model's attention has soft caps or sinks, which the dense generator lacks: set generator: engine")
        source = self.cache.shapes[layer].source
        rows = slice(self.first, self.first + self.count)
        keys, values = self.cache.keys[source][rows], self.cache.values[source][rows]
        end = self.begin + self.width
        if source == layer:
            keys[:, :, self.begin : end] = tensors.key.view(self.count, self.width, *tensors.key.shape[1:]).transpose(1, 2)
            values[:, :, self.begin : end] = tensors.value.view(self.count, self.width, *tensors.value.shape[1:]).transpose(1, 2)
        kv_heads = keys.shape[1]
        fold = tensors.query.shape[1] // kv_heads
        query = tensors.query.view(self.count, self.width, kv_heads, fold, -1).permute(0, 2, 1, 3, 4).flatten(2, 3)
        bias = (
            self._bias(shape.window, query.dtype).repeat_interleave(fold, dim=2)
            if self.width > 1
            else self._bias(shape.window, query.dtype)
        )
        attended = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=bias.expand(-1, kv_heads, self.width * fold, -1), scale=shape.scale
        )
        attended = attended.view(self.count, kv_heads, self.width, fold, -1).permute(0, 2, 1, 3, 4)
        return attended.reshape(self.count * self.width, kv_heads * fold, -1)

    def _bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self.biases:
            starts = self.cache.starts[self.first : self.first + self.count].view(-1, 1, 1, 1)
            device = starts.device
            columns = torch.arange(self.cache.num_columns, device=device)
            queries = torch.arange(self.begin, self.begin + self.width, device=device).view(1, 1, -1, 1)
            visible = (columns >= starts) & (columns <= queries)
            if window is not None:
                visible &= columns > queries - window
            visible |= columns == queries  # padding must see something: no NaN
            self.biases[window] = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
        return self.biases[window]


class DenseGenerator:
    """Answers of one target; every wave of prompts runs to its end before the next begins."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], max_tokens: int, stop_ids: Sequence[int], seed: int
    ) -> list[list[int]]:
        """Answers [n] of at most ``max_tokens`` tokens; one that ended by itself has its stop token last."""
        answers: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        width = self._wave_rows(max(map(len, prompts), default=0) + max_tokens // 2)
        draws = torch.Generator(self.target.device).manual_seed(seed)
        with self._attention():
            for begin in range(0, len(order), width):
                chosen = order[begin : begin + width]
                wave = _Wave(self.target, [prompts[i] for i in chosen], [temperatures[i] for i in chosen], draws)
                for place, answer in zip(chosen, wave.run(max_tokens, stop_ids), strict=True):
                    answers[place] = answer
        return answers

    def _wave_rows(self, columns: int) -> int:
        """Rows whose cache fits when each grows to ``columns``."""
        if self.target.device.type != "cuda":
            return 512
        free = torch.cuda.mem_get_info(self.target.device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return max(1, int(CACHE_SHARE * free / (self.target.kv_bytes_per_token * (columns + GROWTH))))

    def _attention(self) -> AbstractContextManager[None]:
        """On a GPU the kernel that takes any bias; others would be planned anew for every length."""
        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if self.target.device.type == "cuda" else nullcontext()


class _Wave:
    """Rows that decode in lockstep. ``alive`` [R] are the places of the rows still in the cache."""

    def __init__(self, target: Target, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], draws: torch.Generator) -> None:
        self.target = target
        self.prompts = prompts
        self.draws = draws
        self.device = target.device
        self.depth = max(map(len, prompts))
        starts = torch.tensor([self.depth - len(prompt) for prompt in prompts], device=self.device)
        self.cache = DenseCache.make(target, starts, _rounded(self.depth + 1))
        self.temperatures = torch.tensor(temperatures, dtype=torch.float32, device=self.device)
        self.alive = torch.arange(len(prompts), device=self.device)

    def run(self, max_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """Prefill, then decode until every row ended or has ``max_tokens``."""
        stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=self.device)
        output = torch.zeros(len(self.prompts), max_tokens, dtype=torch.int64, device=self.device)
        lengths = torch.full((len(self.prompts),), max_tokens, dtype=torch.int64, device=self.device)
        token = self._draw(self._prefill())
        for step in range(max_tokens):
            output[self.alive, step] = token
            ended = torch.isin(token, stops) & (lengths[self.alive] == max_tokens)
            lengths[self.alive] = torch.where(ended, step + 1, lengths[self.alive])
            if step + 1 == max_tokens:
                break
            column = self.depth + step
            if column >= self.cache.num_columns:
                rows = (lengths[self.alive] == max_tokens).nonzero().squeeze(1)
                if len(rows) == 0:
                    break
                self.cache.keep(rows, _rounded(column + 1))
                self.alive, self.temperatures, token = self.alive[rows], self.temperatures[rows], token[rows]
            token = self._draw(self._decode(token, column))
        counts = lengths.tolist()
        return [row[:count] for row, count in zip(output.tolist(), counts, strict=True)]

    def _prefill(self) -> Tensor:
        """Logits [R, V] behind every prompt, a few rows at a time."""
        padded = torch.tensor([[0] * (self.depth - len(prompt)) + list(prompt) for prompt in self.prompts], device=self.device)
        group = max(1, PREFILL_TOKENS // self.depth)
        parts = []
        for first in range(0, len(self.prompts), group):
            ids = padded[first : first + group]
            starts = self.cache.starts[first : first + group].unsqueeze(1)
            positions = (torch.arange(self.depth, device=self.device) - starts).clamp_min(0)
            last = torch.arange(1, len(ids) + 1, device=self.device) * self.depth - 1
            parts.append(self._forward(ids, positions, DenseStep(self.cache, first, len(ids), 0, self.depth), last))
        return torch.cat(parts)

    def _decode(self, token: Tensor, column: int) -> Tensor:
        """Logits [R, V] behind one more token of every row."""
        step = DenseStep(self.cache, 0, len(token), column, 1)
        return self._forward(token.unsqueeze(1), column - self.cache.starts.unsqueeze(1), step, slice(None))

    def _forward(self, ids: Tensor, positions: Tensor, step: DenseStep, keep: Tensor | slice) -> Tensor:
        flat, places = ids.reshape(1, -1), positions.reshape(1, -1)
        wanted = 0 if isinstance(keep, slice) else keep
        output = self.target.model(flat, position_ids=places, use_cache=False, logits_to_keep=wanted, step=step)
        logits: Tensor = output.logits[0]
        return logits

    def _draw(self, logits: Tensor) -> Tensor:
        """One token a row, by its temperature: a Gumbel race, without noise where the temperature is 0."""
        scores = logits.to(torch.float32)
        hot = (self.temperatures > 0).unsqueeze(1)
        noise = torch.empty_like(scores).exponential_(generator=self.draws).log_()
        scores = torch.where(hot, scores / self.temperatures.clamp_min(1e-6).unsqueeze(1) - noise, scores)
        return scores.argmax(-1)


def _rounded(columns: int) -> int:
    return -(-columns // GROWTH) * GROWTH
