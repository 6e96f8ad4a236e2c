"""Blocks out of an engine's prefix cache and into it: the target's KV and the drafter's context, which live under the same ids.

What a parallel verifier gives and takes is what one rank would: the other end may have another number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from dspark.kv_blocks import BlockPart, KeepsBlocks, KVBlocks, KVLayout, TransferStats
from dspark.types import Request
from dspark.workers.blocks import BlockPool, extend_hashes
from dspark.workers.verifier.attention import KVStore
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.parallel.leader import Ranks

TAKING: Final = "\0taking"  # the name of the table that holds blocks while they are filled

OnEngine = Callable[[Callable[[], Any]], Future[Any]]  # runs something on the engine's thread, between two steps


@dataclass(slots=True)
class TransferCounters:
    """Totals since start."""

    given_blocks: int = 0
    given_bytes: int = 0
    taken_blocks: int = 0
    fetches: int = 0
    failed_fetches: int = 0
    fallbacks: int = 0
    fetched_bytes: int = 0
    fetch_s: float = 0.0


class BlockPools:
    """Every pool that a block id addresses. Not thread-safe: for the engine's thread."""

    def __init__(self, pool: BlockPool, store: KVStore, drafter: object, ranks: Ranks | None) -> None:
        self._pool = pool
        self._store = store
        self._ranks = ranks
        self._tensors: dict[str, Tensor] = {} if ranks is not None else store.by_block()  # those that are whole here
        if isinstance(drafter, KeepsBlocks):
            self._tensors |= {f"draft {name}": tensor for name, tensor in drafter.block_pools().items()}

    @property
    def parts(self) -> tuple[BlockPart, ...]:
        """What a block consists of, by name."""
        found = [_part(name, tensor, tensor.shape[1:]) for name, tensor in self._tensors.items()]
        if self._ranks is not None:
            found += [_part(name, pool, self._ranks.whole_shape(name, pool.shape[1:])) for name, pool in self._store.by_block().items()]
        return tuple(sorted(found, key=lambda part: part.name))

    @torch.inference_mode()
    def give(self, hashes: Sequence[bytes], first: int, on_device: bool = False) -> KVBlocks:
        """Copies of the cached blocks of a prefix from ``first`` on, on the host or complete on the device."""
        blocks = self._pool.find(hashes)[first:]
        parts = {}
        if blocks:
            index = torch.tensor(blocks, dtype=torch.int64)
            parts = {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self._tensors.items()}
            if self._ranks is not None:
                parts |= self._ranks.collect(self._store, blocks)
            if not on_device:
                parts = {name: part.cpu() for name, part in parts.items()}
            elif (part := next(iter(parts.values()))).is_cuda:
                torch.cuda.current_stream(part.device).synchronize()  # another thread, on another stream, sends them
        return KVBlocks(first, len(blocks), parts)

    @torch.inference_mode()
    def take(self, hashes: Sequence[bytes], blocks: KVBlocks) -> int:
        """Keep those blocks that are not here yet; how many. 0 if what lies before them is gone, or if there is no room for all."""
        pool, end = self._pool, blocks.first + blocks.count
        held = pool.open(TAKING, hashes[:end])
        try:
            if not blocks.first <= held < end or not pool.grow(TAKING, end * pool.block_size):
                return 0
            new = torch.tensor(list(pool.table(TAKING)[held:end]), dtype=torch.int64)
            for name, tensor in self._tensors.items():
                part = blocks.parts[name]
                tensor.index_copy_(0, new.to(tensor.device), part[held - blocks.first :].to(tensor.device))
                if part.is_cuda:
                    part.record_stream(
                        torch.cuda.current_stream(part.device)
                    )  # it was made on another: its memory is in use until this one is done
            if self._ranks is not None:
                whole = {name: blocks.parts[name][held - blocks.first :] for name in self._store.by_block()}
                self._ranks.spread(self._store, new.tolist(), whole)
            for index in range(held, end):
                pool.register(TAKING, index, hashes[index])
            return end - held
        finally:
            pool.release(TAKING)


def _part(name: str, pool: Tensor, shape: Sequence[int]) -> BlockPart:
    return BlockPart(name, str(pool.dtype).removeprefix("torch."), tuple(shape))


class EngineExchange:
    """A ``KVExchange`` around an engine. ``identity`` names the weights of target and drafter. Nothing is held between two calls."""

    def __init__(self, engine: Engine, identity: str, on_engine: OnEngine) -> None:
        self._pools = BlockPools(engine.pool, engine.runner.store, engine.drafter, engine.target.ranks)
        self.layout = KVLayout(identity, engine.pool.block_size, self._pools.parts)
        self.device = str(engine.target.device)
        self.counters = TransferCounters()
        self._engine = engine
        self._pool = engine.pool
        self._on_engine = on_engine
        self._has_cache = engine.options.limits.prefix_cache

    def prefix(self, request: Request) -> Sequence[bytes]:
        if request.sampling.prompt_logprobs is not None or not self._has_cache:
            return []  # its tokens are computed whatever anybody has
        size, tokens = self._pool.block_size, request.prompt_token_ids
        hashes: list[bytes] = []
        extend_hashes(hashes, tokens, (len(tokens) - 1) // size, size, request.cache_salt)  # the last known token is always computed
        return hashes

    def held(self, hashes: Sequence[bytes]) -> Future[int]:
        return self._on_engine(lambda: self._pool.count_hits(hashes))

    def give(self, hashes: Sequence[bytes], first: int, on_device: bool = False) -> Future[KVBlocks]:
        return self._on_engine(lambda: self._give(hashes, first, on_device))

    def take(self, hashes: Sequence[bytes], blocks: KVBlocks) -> Future[int]:
        return self._on_engine(lambda: self._take(hashes, blocks))

    def note(self, stats: TransferStats | None) -> None:
        self.counters.fetches += 1
        if stats is None:
            self.counters.failed_fetches += 1
            return
        self.counters.fetched_bytes += stats.num_bytes
        self.counters.fetch_s += stats.seconds

    def note_fallback(self) -> None:
        self.counters.fallbacks += 1

    def stats(self) -> dict[str, float]:
        """Counters for metrics."""
        counters = self.counters
        return {
            "kv_given_blocks_total": counters.given_blocks,
            "kv_given_bytes_total": counters.given_bytes,
            "kv_taken_blocks_total": counters.taken_blocks,
            "kv_fetches_total": counters.fetches,
            "kv_failed_fetches_total": counters.failed_fetches,
            "kv_fallbacks_total": counters.fallbacks,
            "kv_fetched_bytes_total": counters.fetched_bytes,
            "kv_fetch_seconds_total": counters.fetch_s,
        }

    def _give(self, hashes: Sequence[bytes], first: int, on_device: bool) -> KVBlocks:
        self._engine.catch_up()
        blocks = self._pools.give(hashes, first, on_device)
        self.counters.given_blocks += blocks.count
        self.counters.given_bytes += blocks.num_bytes
        return blocks

    def _take(self, hashes: Sequence[bytes], blocks: KVBlocks) -> int:
        count = self._pools.take(hashes, blocks)
        self.counters.taken_blocks += count
        return count
