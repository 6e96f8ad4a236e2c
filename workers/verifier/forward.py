"""One forward of the target from plain numbers: what every rank of a parallel verifier runs alike."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.paged_attention import AttentionRow
from dspark.types import FedStep, TokenLogprob
from dspark.workers.verifier.attention import KVStore, PagedStep, RaggedStep, embedding_hook, make_step, tap_hook
from dspark.workers.verifier.targets import Target


class Feed(Protocol):
    """A drafter that takes its context inside the target's forward."""

    def __call__(self, taps: Tensor, ids: Tensor, positions: Tensor, step: FedStep) -> None:
        """Keep the context of a step's tokens: taps [T, m * d], ids and positions [T]. Nothing may wait for the device."""

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the context of slots [n] to other slots, as the target's KV is."""


@dataclass(slots=True)
class StepInput:
    """The flat token axis of one step, on the host.

    ``ids``, ``positions`` and ``slots`` [T] are of the real tokens; ``rows`` say what each of them sees; ``wanted`` [L] are
    flat indices whose logits are asked for. ``padding`` tokens at the tail write nothing and are seen by nobody.
    """

    ids: list[int]
    positions: list[int]
    slots: list[int]
    rows: list[AttentionRow]
    wanted: list[int]
    padding: int


class BestTokens(Protocol):
    """The best token of every wanted row, wherever it is yet."""

    def read(self) -> list[int]:
        """Wait for them."""

    def numbers(self) -> NDArray[np.int64]:
        """``read`` as an array of its own."""

    def score(self, row: int, token: int, top: int) -> TokenLogprob:
        """Log-probability of the token that was taken at a row, with ``top`` alternatives, where the step was judged with scores."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Logits [L, V] of the wanted tokens and taps [T, m * d]; ``best`` where the forward has looked for them."""

    logits: Tensor
    taps: Tensor | None
    best: BestTokens | None = None


class Forward:
    """Owns the KV pools of a target, or of a rank's share of it. ``feed``: the drafter takes its context in the forward itself."""

    def __init__(self, target: Target, num_blocks: int, block_size: int, taps: tuple[int, ...], feed: Feed | None = None) -> None:
        self.target = target
        self.block_size = block_size
        self.taps = taps
        self.feed = feed
        self.store = KVStore(target.layers, num_blocks, block_size, torch.empty(0, dtype=target.dtype, device=target.device))
        layers = target.decoder_layers()
        for tap in taps:
            if tap == -1:
                layers[0].register_forward_pre_hook(embedding_hook, with_kwargs=True)
            else:
                layers[tap].register_forward_hook(tap_hook(tap), with_kwargs=True)

    @torch.inference_mode()
    def run(self, inputs: StepInput) -> StepOutput:
        """Run a step; writes the KV of its tokens."""
        device = self.target.device
        padding = [0] * inputs.padding
        step = make_step(self.store, inputs.rows, inputs.slots, inputs.padding)
        ids = torch.tensor(inputs.ids + padding, device=device)
        positions = torch.tensor(inputs.positions + padding, device=device)
        wanted = torch.tensor(inputs.wanted, dtype=torch.int64, device=device)
        return self.leave(self.forward(ids, positions, wanted, step), ids, wanted)

    def leave(self, output: StepOutput, ids: Tensor, wanted: Tensor) -> StepOutput:
        """What a step of ``run`` leaves behind for the next one: here nothing."""
        return output

    def forward(self, ids: Tensor, positions: Tensor, wanted: Tensor, step: PagedStep | RaggedStep) -> StepOutput:
        """The same from tensors: ids, positions [T], wanted [L]."""
        ranks = self.target.ranks
        with nullcontext() if ranks is None else ranks.counting(step.slots, ids.shape[0]):
            output = self.target.model(
                ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, logits_to_keep=wanted, step=step
            )
        if not self.taps:
            return StepOutput(output.logits[0], None)
        taps = torch.cat([step.taps[tap] for tap in self.taps], dim=-1)
        if self.feed is not None:
            count = step.slots.shape[0]
            self.feed(taps[:count], ids[:count], positions[:count], step)
        return StepOutput(output.logits[0], taps)

    @torch.inference_mode()
    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy the KV of slots to other slots."""
        device = self.target.device
        slots = torch.tensor([sources, targets], device=device)
        self.store.move(slots[0], slots[1])
        if self.feed is not None:
            self.feed.move(slots[0], slots[1])
