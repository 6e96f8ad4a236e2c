"""KV from what is left beside steps and graphs, with a device whose memory is made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.engines import tiny_target

from dspark.errors import ConfigError
from dspark.workers.blocks import BLOCK_SIZE
from dspark.workers.verifier.memory import MAX_KV_TOKENS, SLACK_BYTES, Reserve, kv_capacity, measure_reserve
from dspark.workers.verifier.targets import Target


class MadeUpMemory:
    """So many bytes are free; each measured run takes the next of ``peaks``."""

    def __init__(self, free: int, *peaks: int) -> None:
        self._free = free
        self._peaks = list(peaks)

    def free_bytes(self) -> int:
        return self._free

    def peak_bytes(self, run: Callable[[], None]) -> int:
        run()
        if not self._peaks:
            raise torch.OutOfMemoryError("made up")
        return self._peaks.pop(0)


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def test_kv_takes_what_steps_and_graphs_leave(target: Target) -> None:
    probe = MadeUpMemory(SLACK_BYTES + 10_000_000, 3_000_000, 1_000_000)
    reserve = measure_reserve(target, probe, 64, 32, bytes_per_token=100)
    logits = 32 * target.vocab_size * 4
    assert reserve == Reserve(3_000_000, 1_000_000 + logits, 100)
    tokens = kv_capacity(None, target, reserve=reserve, probe=probe)
    left = 10_000_000 - 4_000_000 - logits
    assert tokens % BLOCK_SIZE == 0
    assert 0 <= left - tokens * (target.kv_bytes_per_token + 100) < (BLOCK_SIZE + 1) * (target.kv_bytes_per_token + 100)


def test_without_graphs_nothing_is_kept_for_them(target: Target) -> None:
    assert measure_reserve(target, MadeUpMemory(0, 5), 64, 0) == Reserve(5, 0)


def test_too_many_wanted_tokens_name_the_settings(target: Target) -> None:
    reserve = Reserve(1 << 20, 0)
    probe = MadeUpMemory(SLACK_BYTES + (2 << 20))
    fitting = (1 << 20) // target.kv_bytes_per_token
    assert kv_capacity(fitting, target, reserve=reserve, probe=probe) == fitting // BLOCK_SIZE * BLOCK_SIZE
    with pytest.raises(ConfigError, match=r"kv_tokens .*max_batch_tokens or graph_tokens"):
        kv_capacity(2 * fitting, target, reserve=reserve, probe=probe)


def test_a_device_that_is_full_already_says_so(target: Target) -> None:
    with pytest.raises(ConfigError, match=r"only 0\.00 GiB are free"):
        kv_capacity(None, target, reserve=Reserve(1, 1), probe=MadeUpMemory(1000))
    with pytest.raises(ConfigError, match="max_batch_tokens 64"):
        measure_reserve(target, MadeUpMemory(1000), 64, 0)


def test_no_pool_is_larger_than_the_host_can_keep(target: Target) -> None:
    assert kv_capacity(None, target, reserve=Reserve(0, 0), probe=MadeUpMemory(1 << 50)) == MAX_KV_TOKENS
