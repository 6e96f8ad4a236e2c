"""The two ends of a transfer of KV blocks without engines, here or in a process of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager

import grpc
import torch

from dspark.kv_blocks import BlockPart, KVBlocks, KVLayout, TransferStats
from dspark.sampling import SamplingParams
from dspark.types import KVSource, Request
from dspark.workers.wire import kv_giver, kv_taker
from dspark.workers.wire.kv_client import KVFetcher
from dspark.workers.wire.kv_pb2_grpc import add_KVBlocksServicer_to_server
from dspark.workers.wire.kv_server import KVServer
from dspark.workers.wire.pair import PairGroup
from dspark.workers.wire.ports import add_port

LAYOUT = KVLayout("m", 4, (BlockPart("key 0", "float32", (4, 2)), BlockPart("value 0", "bfloat16", (3,))))
HASHES = [bytes([i]) * 32 for i in range(6)]
HOST, TOKEN = "127.0.0.1", "secret"


def some_blocks(count: int) -> dict[str, torch.Tensor]:
    numbers = torch.arange(count * 8, dtype=torch.float32)
    return {"key 0": numbers.view(count, 4, 2), "value 0": numbers[: 3 * count].bfloat16().view(count, 3)}


class Shelf:
    """A ``KVExchange`` that holds the first ``count`` blocks of one prefix."""

    device = "cpu"

    def __init__(self, count: int, layout: KVLayout = LAYOUT) -> None:
        self.layout = layout
        self.parts = some_blocks(count)
        self.count = count
        self.notes: list[TransferStats | None] = []
        self.fallbacks = 0

    def prefix(self, request: Request) -> Sequence[bytes]:
        return HASHES

    def held(self, hashes: Sequence[bytes]) -> Future[int]:
        return _done(self.count)

    def give(self, hashes: Sequence[bytes], first: int, on_device: bool = False) -> Future[KVBlocks]:
        end = min(self.count, len(hashes))
        return _done(KVBlocks(first, max(0, end - first), {name: part[first:end] for name, part in self.parts.items()}))

    def take(self, hashes: Sequence[bytes], blocks: KVBlocks) -> Future[int]:
        assert blocks.first == self.count
        self.parts = {name: torch.cat([part, blocks.parts[name]]) for name, part in self.parts.items()}
        self.count += blocks.count
        return _done(blocks.count)

    def stats(self) -> dict[str, float]:
        return {}

    def note(self, stats: TransferStats | None) -> None:
        self.notes.append(stats)

    def note_fallback(self) -> None:
        self.fallbacks += 1


def _done(value):  # type: ignore[no-untyped-def]
    future: Future = Future()  # type: ignore[type-arg]
    future.set_result(value)
    return future


@asynccontextmanager
async def giving(shelf: Shelf, with_pairs: bool = True) -> AsyncIterator[str]:
    """The address of a server of its blocks."""
    server = grpc.aio.server()
    add_KVBlocksServicer_to_server(KVServer(shelf, TOKEN.encode(), HOST if with_pairs else None), server)  # type: ignore[no-untyped-call]
    port = add_port(server, f"{HOST}:0", None)
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def taking(shelf: Shelf) -> AsyncIterator[KVFetcher]:
    fetcher = KVFetcher(shelf, pair_host=HOST)
    try:
        yield fetcher
    finally:
        await fetcher.close()


def fetching(address: str, name: str = "r") -> Request:
    return Request(name, (1, 2, 3), SamplingParams(), kv_source=KVSource("giver", address, TOKEN))


def open_threads() -> list[threading.Thread]:
    """Threads of transfers that have not ended."""
    return [thread for thread in threading.enumerate() if thread.name == "pair"]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(*_: object) -> None:
    time.sleep(3600)


FAULTS = {"die": die, "hang": hang}


async def _give(fault: str) -> None:
    PairGroup.send = FAULTS[fault]  # type: ignore[method-assign]
    async with giving(Shelf(6)) as address:
        print(address, flush=True)
        await asyncio.Event().wait()


async def _take(fault: str, address: str) -> None:
    PairGroup.receive = FAULTS[fault]  # type: ignore[method-assign]
    async with taking(Shelf(0)) as fetcher:
        await fetcher.fetch(fetching(address))


if __name__ == "__main__":  # give|take FAULT [ADDRESS]: that end, with a fault once bytes move
    kv_giver.TRANSFER_S = kv_taker.TRANSFER_S = 60.0  # type: ignore[misc]
    asyncio.run(_give(sys.argv[2]) if sys.argv[1] == "give" else _take(sys.argv[2], sys.argv[3]))
