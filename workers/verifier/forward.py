"""One forward of the target from plain numbers: what every rank of a parallel verifier runs alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.kernels.paged_attention import AttentionRow, PagedBatch
from dspark.workers.verifier.attention import KVStore, PagedStep, embedding_hook, tap_hook
from dspark.workers.verifier.targets import Target


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


class Forward:
    """Owns the KV pools of a target, or of a rank's share of it."""

    def __init__(self, target: Target, num_blocks: int, block_size: int, taps: tuple[int, ...]) -> None:
        self.target = target
        self.block_size = block_size
        self.taps = taps
        self.store = KVStore(target.layers, num_blocks, block_size, torch.empty(0, dtype=target.dtype, device=target.device))
        layers = target.decoder_layers()
        for tap in taps:
            if tap == -1:
                layers[0].register_forward_pre_hook(embedding_hook, with_kwargs=True)
            else:
                layers[tap].register_forward_hook(tap_hook(tap), with_kwargs=True)

    @torch.inference_mode()
    def run(self, inputs: StepInput) -> tuple[Tensor, Tensor | None]:
        """Logits [L, V] of the wanted tokens and taps [T, m * d] of the real ones; writes their KV."""
        device = self.target.device
        padding = [0] * inputs.padding
        batch = PagedBatch.plan(inputs.rows, self.block_size, device)
        step = PagedStep(self.store, batch, torch.tensor(inputs.slots, device=device))
        output = self.target.model(
            torch.tensor([inputs.ids + padding], device=device),
            position_ids=torch.tensor([inputs.positions + padding], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(inputs.wanted, dtype=torch.int64, device=device),
            step=step,
        )
        taps = torch.cat([step.taps[tap][: len(inputs.ids)] for tap in self.taps], dim=-1) if self.taps else None
        return output.logits[0], taps

    @torch.inference_mode()
    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy the KV of slots to other slots."""
        device = self.target.device
        self.store.move(torch.tensor(sources, device=device), torch.tensor(targets, device=device))
