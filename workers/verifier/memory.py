"""How much KV fits beside the weights, and beside what steps take while they run.

On a GPU that is measured at start: the largest step an engine may run is run once, on made-up tokens and a KV pool of its own, and the
judge with it; graphs keep as much again as their largest step. What is left is KV of the target and of a drafter that keeps its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from dspark.errors import ConfigError
from dspark.kernels.paged_attention import AttentionRow
from dspark.sampling import SamplingParams
from dspark.workers.blocks import BLOCK_SIZE
from dspark.workers.verifier.attention import KVStore, make_step
from dspark.workers.verifier.judge import judge
from dspark.workers.verifier.targets import Target
from dspark.workers.verifier.verdict import JudgeItem

KV_SHARE = {"cpu": 0.15, "cuda": 0.7}  # of the memory that is free after loading the weights, where nothing was measured
MAX_CPU_KV_BYTES = 1 << 30
MAX_KV_TOKENS = 1 << 22  # more would serve nobody, and the host keeps a word for each block
SLACK_BYTES = 512 << 20  # for what libraries take later, and for memory that falls to pieces
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9)  # the law that takes most memory


class MemoryProbe(Protocol):
    """The memory of a device."""

    def free_bytes(self) -> int:
        """What a tensor could get now."""

    def peak_bytes(self, run: Callable[[], None]) -> int:
        """What ``run`` holds at most beyond what is held now."""


class CudaMemory:
    """A GPU's memory, with what torch holds in reserve counted as free."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_bytes(self) -> int:
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + cached

    def peak_bytes(self, run: Callable[[], None]) -> int:
        torch.cuda.synchronize(self._device)
        held = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - held


@dataclass(frozen=True, slots=True)
class Reserve:
    """What must stay free of the target's KV: for steps and graphs, and for each token of KV that a drafter keeps beside it."""

    step_bytes: int
    graph_bytes: int
    bytes_per_token: int = 0

    @property
    def num_bytes(self) -> int:
        return self.step_bytes + self.graph_bytes + SLACK_BYTES


def measure_reserve(
    target: Target, probe: MemoryProbe, max_tokens: int, graph_tokens: int, bytes_per_token: int = 0, judge_bytes: int = 0
) -> Reserve:
    """Run the largest steps: ``max_tokens`` in one, and ``graph_tokens`` in a graph (0: there are none). ConfigError if they do not fit.

    ``judge_bytes``: what judging on the device keeps besides.
    """
    try:
        step_bytes = probe.peak_bytes(lambda: _run_step(target, max_tokens))
        graph_bytes = 0
        if graph_tokens:
            logits = graph_tokens * target.vocab_size * target.dtype.itemsize  # kept for all graphs
            graph_bytes = probe.peak_bytes(lambda: _run_step(target, graph_tokens)) + logits + judge_bytes
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"max_batch_tokens {max_tokens}: a step of so many tokens does not fit beside the weights on {target.device}"
        ) from error
    return Reserve(step_bytes, graph_bytes, bytes_per_token)


def kv_capacity(
    wanted: int | None, target: Target, sharers: int = 1, reserve: Reserve | None = None, probe: MemoryProbe | None = None
) -> int:
    """Size of the KV pool in tokens, a multiple of the block size; ``wanted`` None takes what is left, or a share where that is unknown.

    ``sharers`` engines or ranks take as much from the same memory at the same time. ConfigError if it does not fit.
    """
    free = (free_bytes(target.device) if probe is None else probe.free_bytes()) // sharers
    per_token = target.kv_bytes_per_token
    if reserve is not None:
        per_token += reserve.bytes_per_token
        free -= reserve.num_bytes
    if wanted is None:
        share = free if reserve is not None else KV_SHARE[target.device.type] * free
        room = min(share, MAX_CPU_KV_BYTES) if target.device.type == "cpu" and reserve is None else share
        wanted = min(max(int(room / per_token), 64), MAX_KV_TOKENS)
    if wanted * per_token > free:
        raise ConfigError(_too_much(wanted, per_token, free, target, reserve))
    return max(wanted // BLOCK_SIZE, 2) * BLOCK_SIZE


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, or of this machine."""
    if device.type == "cuda":
        return CudaMemory(device).free_bytes()
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _too_much(wanted: int, per_token: int, free: int, target: Target, reserve: Reserve | None) -> str:
    text = (
        f"kv_tokens {wanted} takes {wanted * per_token / 2**30:.2f} GiB ({per_token} bytes a token),"
        f" but only {max(free, 0) / 2**30:.2f} GiB are free on {target.device}"
    )
    if reserve is None:
        return text
    return (
        f"{text} beside {reserve.num_bytes / 2**30:.2f} GiB for steps and graphs: lower kv_tokens, max_batch_tokens or graph_tokens,"
        " or free memory that others hold"
    )


@torch.inference_mode()
def _run_step(target: Target, num_tokens: int) -> None:
    """Forward and judge of a step in which every token is sampled."""
    device = target.device
    store = KVStore(target.layers, -(-num_tokens // BLOCK_SIZE), BLOCK_SIZE, torch.empty(0, dtype=target.dtype, device=device))
    row = AttentionRow(0, num_tokens, num_tokens, range(-(-num_tokens // BLOCK_SIZE)))
    step = make_step(store, [row], list(range(num_tokens)), padding=0)
    places = torch.arange(num_tokens, device=device)
    positions = places % target.max_position
    ids = torch.zeros_like(places)
    output = target.model(ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, logits_to_keep=places, step=step)
    judge(output.logits[0], [JudgeItem(str(i), SAMPLED, 0, (0,), (), None, i) for i in range(num_tokens)])
