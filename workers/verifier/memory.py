"""How much KV fits beside the weights."""

from __future__ import annotations

import os

import torch

from dspark.errors import ConfigError
from dspark.workers.blocks import BLOCK_SIZE
from dspark.workers.verifier.targets import Target

KV_SHARE = {"cpu": 0.15, "cuda": 0.7}  # of the memory that is free after loading the weights
MAX_CPU_KV_BYTES = 1 << 30


def kv_capacity(wanted: int | None, target: Target, sharers: int = 1) -> int:
    """Size of the KV pool in tokens, a multiple of the block size; ``wanted`` None takes a share of what is free.

    ``sharers`` engines or ranks take as much from the same memory at the same time. ConfigError if it does not fit.
    """
    per_token = target.kv_bytes_per_token
    free = free_bytes(target.device) // sharers
    if wanted is None:
        share = KV_SHARE[target.device.type] * free
        room = min(share, MAX_CPU_KV_BYTES) if target.device.type == "cpu" else share
        wanted = max(int(room / per_token), 64)
    if wanted * per_token > free:
        raise ConfigError(
            f"kv_tokens {wanted} takes {wanted * per_token / 2**30:.2f} GiB ({per_token} bytes a token),"
            f" but only {free / 2**30:.2f} GiB are free on {target.device}"
        )
    return max(wanted // BLOCK_SIZE, 2) * BLOCK_SIZE


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
