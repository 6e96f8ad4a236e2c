"""Which sequences make which batch: a pure function of (data, settings, seed, step), so that a resumed run sees the same ones.

::

    tokens       [B, L] int64   right-padded with 0; L is a multiple of 64
    lengths      [B]    int64   real tokens
    prompt_lens  [B]    int64   tokens before the answer
    anchors      [B, A] int64   positions of block anchors inside the answer
    is_real      [B, A] bool    False where a sequence has fewer anchors than A
    samples      [B]    int64   which samples of the corpus they are
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.errors import ConfigError
from dspark.training.config import TrainerConfig
from dspark.training.shards import Corpus

PAD_TO = 64
POOL_BATCHES = 32  # sequences are sorted by length inside pools of about this many batches


@dataclass(slots=True)
class Batch:
    """One forward of the target."""

    tokens: Tensor
    lengths: Tensor
    prompt_lens: Tensor
    anchors: Tensor
    is_real: Tensor
    temperatures: Tensor
    samples: Tensor

    def to(self, device: torch.device) -> Batch:
        """Everything on the device, but ``samples``: they name places in the memory of this process."""
        names = ("tokens", "lengths", "prompt_lens", "anchors", "is_real", "temperatures")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True, slots=True)
class Split:
    """Sample indices trained on, and held out."""

    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split_corpus(corpus: Corpus, settings: TrainerConfig) -> Split:
    """Hold out some sequences; only answers with at least two tokens within ``max_len`` count. ConfigError if none are left."""
    lengths = np.minimum(np.diff(corpus.starts), settings.max_len)
    usable = np.nonzero(lengths - corpus.prompt_lens >= 2)[0]
    order = np.random.default_rng(settings.seed).permutation(usable)
    held_out = min(settings.held_out, len(order) // 2)
    if held_out == 0:
        raise ConfigError(f"{len(usable)} usable samples are too few to train on and hold some out")
    return Split(np.sort(order[held_out:]), np.sort(order[:held_out]))


def plan_epoch(corpus: Corpus, indices: NDArray[np.int64], settings: TrainerConfig, block_size: int, epoch: int) -> list[NDArray[np.int64]]:
    """The batches of one epoch in order: sequences of like length together, batches shuffled."""
    draws = np.random.default_rng([settings.seed, epoch, 1])
    order = draws.permutation(indices)
    lengths = np.minimum(np.diff(corpus.starts), settings.max_len)
    costs = _padded(lengths) + settings.anchors * block_size
    mean = float(costs[indices].mean())
    pool = max(1, int(POOL_BATCHES * settings.batch_tokens / mean))
    batches: list[NDArray[np.int64]] = []
    for begin in range(0, len(order), pool):
        part = order[begin : begin + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches.extend(_cut(part, costs[part], settings.batch_tokens))
    return [batches[i] for i in draws.permutation(len(batches))]


def _cut(indices: NDArray[np.int64], costs: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """Runs of rising length whose padded size, blocks included, stays within ``budget`` tokens (one sequence at least)."""
    first = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or costs[i] * (i + 1 - first) > budget:
            yield indices[first:i]
            first = i


def _padded(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return -(-lengths // PAD_TO) * PAD_TO


def make_batch(corpus: Corpus, indices: Sequence[int] | NDArray[np.int64], settings: TrainerConfig, draws: torch.Generator) -> Batch:
    """Pad the sequences and draw their anchors; tensors on the CPU."""
    texts = [corpus.sample(int(i))[: settings.max_len].astype(np.int64) for i in indices]
    lengths = torch.tensor([len(text) for text in texts])
    width = -(-int(lengths.max()) // PAD_TO) * PAD_TO
    tokens = np.zeros((len(texts), width), np.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    prompt_lens = torch.from_numpy(corpus.prompt_lens[indices].astype(np.int64))
    anchors, is_real = draw_anchors(lengths, prompt_lens, width, settings.anchors, draws)
    temperatures = torch.from_numpy(corpus.temperatures[indices].astype(np.float32))
    samples = torch.tensor([int(i) for i in indices], dtype=torch.int64)
    return Batch(torch.from_numpy(tokens), lengths, prompt_lens, anchors, is_real, temperatures, samples)


def draw_anchors(lengths: Tensor, prompt_lens: Tensor, width: int, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` different anchors a sequence, uniformly: answer tokens that have at least one token after them."""
    places = torch.arange(width)
    eligible = (places >= prompt_lens.unsqueeze(1)) & (places <= lengths.unsqueeze(1) - 2)
    scores = torch.rand(len(lengths), width, generator=draws).masked_fill_(~eligible, -1.0)
    most = int(eligible.sum(1).max())  # short answers have fewer; a multiple of 8 keeps attention on its fast path
    count = min(count, -(-most // 8) * 8, width)
    best = scores.topk(count, dim=1)
    is_real = best.values >= 0
    return torch.where(is_real, best.indices, prompt_lens.unsqueeze(1)), is_real
