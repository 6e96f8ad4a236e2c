"""KV blocks over gRPC between two real engines: what arrives is used, what fails is told, computed again, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
import torch
from helpers.engines import greedy, make_engine, tiny_target
from helpers.proxies import Proxy

from dspark.kv_blocks import BlockPart, KVBlocks, KVLayout
from dspark.types import KVSource, Request
from dspark.workers.verifier.host import EngineHost
from dspark.workers.verifier.kv_exchange import EngineExchange
from dspark.workers.wire import kv_client, kv_server
from dspark.workers.wire import kv_pb2 as pb
from dspark.workers.wire.client import TOKEN_KEY, GrpcLink
from dspark.workers.wire.codec import WireError
from dspark.workers.wire.kv_codec import (
    KV_PROTOCOL,
    chunk_from_wire,
    chunk_to_wire,
    hashes_from_wire,
    layout_from_wire,
    layout_to_wire,
)
from dspark.workers.wire.kv_pb2_grpc import KVBlocksStub
from dspark.workers.wire.server import WireServer

PROMPT = [3 + (7 * j) % 150 for j in range(130)]
REQUEST = greedy("r", PROMPT, 20)
LAYOUT = KVLayout("m", 4, (BlockPart("key 0", "float32", (4, 2)), BlockPart("value 0", "bfloat16", (3,))))


class End:
    """One verifier: an engine on its thread, and its server."""

    def __init__(self, identity: str = "tiny") -> None:
        self.engine = make_engine(tiny_target(), speculation="off", max_batch_tokens=256)
        self.host = EngineHost(self.engine)
        self.exchange = EngineExchange(self.engine, identity, self.host.between_steps)
        self.host.start()

    @asynccontextmanager
    async def link(self) -> AsyncIterator[GrpcLink]:
        self.server = WireServer(self.host, "v", "model", "secret", exchange=self.exchange)
        link = GrpcLink("v", await self.server.start(), "secret", "test", "model")
        await link.open(5)
        try:
            yield link
        finally:
            await link.close()
            await self.server.stop()
            gc.collect()  # gRPC's servers must go while their event loop runs


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    both = End(), End()
    yield both
    for end in both:
        end.host.close()
        end.engine.pool.check()
        assert end.engine.pool.num_free == end.engine.pool.num_blocks, "blocks are held"


async def generate(link: GrpcLink, request: Request) -> list[int]:
    flight = await link.submit(request)
    return [token async for outcome in flight for token in outcome.tokens]


def source(address: str, token: str = "secret") -> KVSource:
    return KVSource("v", address, token)


def fetching(address: str, name: str = "again", token: str = "secret") -> Request:
    return dataclasses.replace(REQUEST, id=name, kv_source=source(address, token))


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_prefix_is_fetched_instead_of_computed(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_server, "CHUNK_BYTES", 1 << 14)  # a few blocks a message
    giver, taker = ends

    async def test() -> None:
        async with giver.link() as one, taker.link() as other:
            expected = await generate(one, REQUEST)
            assert await generate(other, fetching(giver.server.address)) == expected
            stats = taker.exchange.stats()
            assert (stats["kv_taken_blocks_total"], stats["kv_failed_fetches_total"]) == (8, 0)
            assert stats["kv_fetched_bytes_total"] == giver.exchange.stats()["kv_given_bytes_total"] > 8 * 16 * 64
            assert stats["kv_fetch_seconds_total"] > 0
            assert taker.engine.scheduler.counters.prefix_hits == 128
            assert taker.engine.counters.step_tokens < 60, "the prompt was not computed"
            assert await generate(other, fetching(giver.server.address, "third")) == expected
            assert taker.exchange.stats()["kv_taken_blocks_total"] == 8, "it was there already"

    run(test)


FAULTS: dict[str, Callable[[Proxy], None]] = {"cut": Proxy.cut, "hold": Proxy.hold, "spoil": lambda proxy: proxy.spoil(0)}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_broken_network_costs_time_only(ends: tuple[End, End], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_server, "CHUNK_BYTES", 1)
    giver, taker = ends
    taker.host.between_steps(lambda: None).result()

    async def test() -> None:
        async with giver.link() as one, taker.link() as other:
            taker.server._fetcher = kv_client.KVFetcher(taker.exchange, lease_s=1.0)
            expected = await generate(one, REQUEST)
            proxy = Proxy(giver.server.address)
            give, count = giver.exchange.give, 0

            def breaking(hashes: list[bytes], first: int):  # type: ignore[no-untyped-def]
                nonlocal count
                count += 1
                if count == 3:
                    FAULTS[fault](proxy)
                return give(hashes, first)

            giver.exchange.give = breaking  # type: ignore[method-assign]
            assert await generate(other, fetching(proxy.address)) == expected
            assert taker.exchange.stats()["kv_failed_fetches_total"] == 1
            assert taker.exchange.stats()["kv_taken_blocks_total"] == 0
            proxy.close()

    run(test)


@pytest.mark.parametrize("change", ["token", "identity", "nobody", "no service"])
def test_a_refusal_is_said_and_the_prompt_computed(change: str, caplog: pytest.LogCaptureFixture) -> None:
    giver, taker = End("other" if change == "identity" else "tiny"), End()
    if change == "no service":
        giver.exchange = None  # type: ignore[assignment]

    async def test() -> None:
        async with giver.link() as one, taker.link() as other:
            expected = await generate(one, REQUEST)
            address = "127.0.0.1:1" if change == "nobody" else giver.server.address
            assert await generate(other, fetching(address, token="wrong" if change == "token" else "secret")) == expected

    run(test)
    said = {
        "token": "wrong token",
        "identity": "identity is 'other' here and 'tiny' there",
        "nobody": "UNAVAILABLE",
        "no service": "UNIMPLEMENTED",
    }
    assert said[change] in caplog.text
    assert taker.exchange.stats()["kv_failed_fetches_total"] == 1
    for end in (giver, taker):
        end.host.close()


def test_a_request_that_is_cancelled_while_its_kv_comes_is_gone(ends: tuple[End, End]) -> None:
    giver, taker = ends

    async def test() -> None:
        async with giver.link() as one, taker.link() as other:
            await generate(one, REQUEST)
            proxy = Proxy(giver.server.address)
            proxy.hold()
            submitting = asyncio.create_task(other.submit(fetching(proxy.address)))
            while not next(iter(taker.server._sessions))._fetching:
                await asyncio.sleep(0.01)
            submitting.cancel()
            while next(iter(taker.server._sessions))._fetching:
                await asyncio.sleep(0.01)
            assert not taker.engine.has_work
            proxy.close()

    run(test)


def test_what_is_no_prefix_is_refused(ends: tuple[End, End]) -> None:
    giver, _ = ends

    async def test() -> None:
        async with giver.link(), grpc.aio.insecure_channel(giver.server.address) as channel:
            fetch = KVBlocksStub(channel).Fetch  # type: ignore[no-untyped-call]
            layout = layout_to_wire(giver.exchange.layout)
            cases = [
                (pb.Wanted(protocol=KV_PROTOCOL + 1, layout=layout), grpc.StatusCode.FAILED_PRECONDITION),
                (pb.Wanted(protocol=KV_PROTOCOL, layout=layout, hashes=[b"short"]), grpc.StatusCode.INVALID_ARGUMENT),
                (pb.Wanted(protocol=KV_PROTOCOL), grpc.StatusCode.FAILED_PRECONDITION),
            ]
            for wanted, code in cases:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    async for _ in fetch(wanted, metadata=((TOKEN_KEY, "secret"),)):
                        pass
                assert refused.value.code() is code

    run(test)


def blocks(count: int = 3) -> KVBlocks:
    return KVBlocks(2, count, {"key 0": torch.rand(count, 4, 2), "value 0": torch.rand(count, 3).bfloat16()})


def test_codec_keeps_blocks_and_layouts() -> None:
    assert layout_from_wire(layout_to_wire(LAYOUT)) == LAYOUT
    sent = blocks()
    got = chunk_from_wire(chunk_to_wire(sent, LAYOUT, 1, 3), LAYOUT, 3, 5)
    assert (got.first, got.count) == (3, 2)
    assert all(torch.equal(got.parts[name], tensor[1:]) for name, tensor in sent.parts.items())


def test_codec_refuses_what_is_not_whole() -> None:
    def chunk() -> pb.Chunk:
        return chunk_to_wire(blocks(), LAYOUT, 0, 3)

    def refused(message: pb.Chunk, first: int = 2, limit: int = 5) -> str:
        with pytest.raises(WireError) as error:
            chunk_from_wire(message, LAYOUT, first, limit)
        return str(error.value)

    assert "expected some of 3 to 5" in refused(chunk(), first=3)
    assert "expected some of 2 to 4" in refused(chunk(), limit=4)
    spoiled = chunk()
    spoiled.tensors[0].data = bytes(len(spoiled.tensors[0].data))
    assert refused(spoiled) == "key 0 has a wrong checksum"
    less = chunk()
    del less.tensors[1]
    assert "1 tensors came for 2 parts" in refused(less)
    swapped = chunk()
    swapped.tensors[1].CopyFrom(swapped.tensors[0])
    assert "value 0 is 'float32', expected bfloat16" in refused(swapped)
    for hashes in ([b"x"], [b"x" * 32] * 65537):
        with pytest.raises(WireError):
            hashes_from_wire(hashes)
    with pytest.raises(WireError):
        layout_from_wire(pb.Layout(parts=[pb.Part(name="x", dtype="object")]))
