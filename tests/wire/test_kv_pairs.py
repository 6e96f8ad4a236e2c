"""KV blocks through pairs over gloo: what arrives is used, what fails is told to both ends, and nothing is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
import torch
from helpers import kv_ends
from helpers.engines import greedy, make_engine, tiny_target
from helpers.kv_ends import HASHES, HOST, LAYOUT, TOKEN, Shelf, fetching, giving, open_threads, some_blocks, taking

from dspark.kv_blocks import KVLayout
from dspark.types import KVSource
from dspark.workers.verifier.host import EngineHost
from dspark.workers.verifier.kv_exchange import EngineExchange
from dspark.workers.wire import kv_giver, kv_taker
from dspark.workers.wire import kv_pb2 as pb
from dspark.workers.wire.client import TOKEN_KEY, GrpcLink
from dspark.workers.wire.kv_codec import KV_PROTOCOL, layout_to_wire
from dspark.workers.wire.kv_giver import PairGiver
from dspark.workers.wire.kv_pb2_grpc import KVBlocksStub
from dspark.workers.wire.pair import PairGroup, open_store
from dspark.workers.wire.server import WireServer


@pytest.fixture(autouse=True)
def left(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PairGiver]]:
    """Nothing is left of pairs at the end of a test; the giving ends that have left so far."""
    gone, groups = list[PairGiver](), list[PairGroup]()
    close, join = PairGiver.close, PairGroup.__init__

    def joining(group: PairGroup, *args: object) -> None:
        join(group, *args)  # type: ignore[arg-type]
        groups.append(group)

    def closing(giver: PairGiver) -> None:
        close(giver)
        gone.append(giver)

    monkeypatch.setattr(PairGiver, "close", closing)
    monkeypatch.setattr(PairGroup, "__init__", joining)
    yield gone
    deadline = time.monotonic() + 10
    while open_threads():
        assert time.monotonic() < deadline, "a thread of a transfer is left"
        time.sleep(0.01)
    assert all(group._is_closed for group in groups), "a pair is left open"


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 40)
        gc.collect()  # gRPC's servers must go while their event loop runs

    asyncio.run(bounded())


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.01)


def test_blocks_come_through_one_pair_for_all_fetches(left: list[PairGiver], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_giver, "PAIR_CHUNK_BYTES", 100)  # two blocks a buffer
    giver = Shelf(6)

    async def test() -> None:
        async with giving(giver) as address, taking(taker := Shelf(1)) as fetcher:
            assert await fetcher.fetch(fetching(address)) == 5
            assert all(torch.equal(part, taker.parts[name]) for name, part in some_blocks(6).items())
            source, pairs = fetching(address).kv_source, fetcher._pairs
            assert source is not None
            assert pairs is not None
            both = await asyncio.gather(pairs.blocks(source, HASHES, 2), pairs.blocks(source, HASHES[:4], 0))
            for blocks, want in zip(both, ((2, 6), (0, 4)), strict=True):
                assert torch.equal(blocks.parts["key 0"], giver.parts["key 0"][slice(*want)])
            assert (taker.fallbacks, taker.notes[0].num_bytes) == (0, 5 * 38)  # type: ignore[union-attr]
            assert len(left) == 0, "the pair is still there"
        await until(lambda: len(left) == 1)

    run(test)


class End:
    """A verifier with a tiny engine."""

    def __init__(self) -> None:
        self.engine = make_engine(tiny_target(), speculation="off", max_batch_tokens=256)
        self.host = EngineHost(self.engine)
        self.exchange = EngineExchange(self.engine, "tiny", self.host.between_steps)
        self.host.start()

    @asynccontextmanager
    async def link(self, with_pairs: bool = True) -> AsyncIterator[GrpcLink]:
        server = WireServer(self.host, "v", "model", "secret", exchange=self.exchange)
        link = GrpcLink("v", await server.start(with_pairs=with_pairs), "secret", "test", "model")
        await link.open(5)
        try:
            yield link
        finally:
            await link.close()
            await server.stop()
            self.host.close()
            self.engine.pool.check()
            assert self.engine.pool.num_free == self.engine.pool.num_blocks, "blocks are held"


@pytest.mark.parametrize("both", [True, False])
def test_engines_go_on_with_what_came(both: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Also where only one end has pairs: then over gRPC, which is said."""
    prompt = [3 + (7 * j) % 150 for j in range(130)]

    async def test() -> None:
        one, other = End(), End()
        async with one.link(with_pairs=both) as giver, other.link() as taker:
            request = greedy("r", prompt, 20)
            expected = [token async for outcome in await giver.submit(request) for token in outcome.tokens]
            again = greedy("again", prompt, 20)
            object.__setattr__(again, "kv_source", KVSource("v", giver.address, "secret"))
            assert [token async for outcome in await taker.submit(again) for token in outcome.tokens] == expected
            stats = other.exchange.stats()
            assert (stats["kv_taken_blocks_total"], stats["kv_failed_fetches_total"]) == (8, 0)
            assert stats["kv_fallbacks_total"] == (0 if both else 1)
            assert other.engine.scheduler.counters.prefix_hits == 128

    with caplog.at_level("WARNING"):
        run(test)
    assert ("kv_transport is collective, but KV of v comes over gRPC" in caplog.text) == (not both)
    assert ("kv_transport is grpc here" in caplog.text) == (not both)


def flip(group: PairGroup, buffer: torch.Tensor) -> None:
    buffer[9] ^= 4
    SEND(group, buffer)


def cut_short(group: PairGroup, buffer: torch.Tensor) -> None:
    SEND(group, buffer[:16].clone())


SEND = PairGroup.send


@pytest.mark.parametrize("send", [flip, cut_short])
def test_spoiled_bytes_are_noticed(send: Callable[..., None], left: list[PairGiver], caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with giving(Shelf(6)) as address, taking(taker := Shelf(0)) as fetcher:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PairGroup, "send", send)
                assert await fetcher.fetch(fetching(address)) == 0
            assert "has a wrong checksum" in caplog.text
            assert taker.notes == [None]
            await until(lambda: left)
            assert await fetcher.fetch(fetching(address)) == 6, "a fresh pair"

    run(test)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda head: setattr(head.tensors[0], "dtype", "int32"), "key 0 is 'int32', expected float32"),
        (lambda head: setattr(head.tensors[0], "dtype", "\x00" * 50), "key 0 is "),
        (lambda head: head.tensors[1].shape.__setitem__(1, 4), "value 0 has shape [6, 4], expected [6, 3]"),
        (lambda head: head.tensors[1].shape.extend([1] * 9), "the head of a tensor is malformed"),
        (lambda head: setattr(head.tensors[0], "length", 2**63), "bytes"),
        (lambda head: setattr(head, "count", 7), "expected some of 0 to 6"),
        (lambda head: setattr(head, "first", 1), "expected some of 0 to 6"),
        (lambda head: head.tensors.pop(), "1 tensors are announced, expected 2"),
    ],
)
def test_a_corrupt_head_is_refused_before_bytes_move(
    change: Callable[[pb.Head], None], reason: str, left: list[PairGiver], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = kv_giver.head_to_wire

    def wrong(*args):  # type: ignore[no-untyped-def]
        head = right(*args)
        change(head)
        return head

    monkeypatch.setattr(kv_giver, "head_to_wire", wrong)

    def never(group: PairGroup, buffer: torch.Tensor) -> None:
        raise AssertionError("bytes were sent")

    monkeypatch.setattr(PairGroup, "send", never)

    async def test() -> None:
        async with giving(Shelf(6)) as address, taking(taker := Shelf(0)) as fetcher:
            assert await fetcher.fetch(fetching(address)) == 0
            assert (taker.notes, taker.fallbacks) == ([None], 0)
            await until(lambda: left)

    run(test)
    assert reason in caplog.text


def child(*words: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen([sys.executable, kv_ends.__file__, *words], stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_giver_that_is_lost_in_the_middle_costs_time_only(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = child("give", fault)
    assert process.stdout is not None
    address = process.stdout.readline().strip()

    async def test() -> None:
        async with taking(taker := Shelf(0)) as fetcher:
            await fetcher._pairs._pair(fetching(address).kv_source)  # type: ignore[union-attr,arg-type]
            monkeypatch.setattr(kv_taker, "TRANSFER_S", 0.5)
            began = time.monotonic()
            assert await fetcher.fetch(fetching(address)) == 0
            assert time.monotonic() - began < 4.0, "it did not wait for the lease"
            assert (taker.notes, taker.fallbacks) == ([None], 0)
            process.kill()

    try:
        run(test)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert "KV of request r is computed again" in caplog.text


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_taker_that_is_lost_in_the_middle_leaves_nothing(fault: str, left: list[PairGiver], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_giver, "TRANSFER_S", 1.0 if fault == "hang" else 30.0)
    giver = Shelf(6)
    giver.parts = {"key 0": torch.rand(6, 1 << 18, 2), "value 0": giver.parts["value 0"]}  # more than sockets hold
    giver.layout = KVLayout("m", 4, (type(LAYOUT.parts[0])("key 0", "float32", (1 << 18, 2)), LAYOUT.parts[1]))
    monkeypatch.setattr(kv_ends, "LAYOUT", giver.layout)

    async def test() -> None:
        async with giving(giver) as address:
            process = child("take", fault, address)
            try:
                async with asyncio.timeout(20):
                    while not left:
                        await asyncio.sleep(0.01)
            finally:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()

    run(test)


def meet(**changes: object) -> pb.FromTaker:
    fields = {"protocol": KV_PROTOCOL, "layout": layout_to_wire(LAYOUT), "backend": "gloo", "store": f"{HOST}:1"}
    return pb.FromTaker(meet=pb.Meet(**(fields | changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (pb.FromTaker(), grpc.StatusCode.INVALID_ARGUMENT, "expected meet, got None"),
        (pb.FromTaker(prefix=pb.Prefix(hashes=HASHES)), grpc.StatusCode.INVALID_ARGUMENT, "expected meet, got prefix"),
        (meet(protocol=99), grpc.StatusCode.FAILED_PRECONDITION, "is spoken here, not 99"),
        (meet(layout=pb.Layout(identity="other")), grpc.StatusCode.FAILED_PRECONDITION, "identity is 'm' here and 'other' there"),
        (meet(layout=pb.Layout(parts=[pb.Part(dtype="object")])), grpc.StatusCode.INVALID_ARGUMENT, "malformed"),
        (meet(backend="nccl"), grpc.StatusCode.FAILED_PRECONDITION, "KV is on cpu here, which gloo would carry, not 'nccl'"),
        (meet(store="nowhere"), grpc.StatusCode.INVALID_ARGUMENT, "'nowhere' is no address of a store"),
        (meet(), grpc.StatusCode.UNAVAILABLE, "cannot be reached"),
    ],
)
def test_who_cannot_meet_is_told_why(message: pb.FromTaker, code: grpc.StatusCode, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark.workers.wire.pair.MEET_S", 1.0)

    async def test() -> None:
        async with giving(Shelf(6)) as address, grpc.aio.insecure_channel(address) as channel:
            call = KVBlocksStub(channel).Pair(metadata=((TOKEN_KEY, TOKEN),))  # type: ignore[no-untyped-call]
            await call.write(message)
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert await call.code() is code
            assert reason in await call.details()

    run(test)


def test_a_prefix_that_is_none_ends_the_pair_and_nothing_else(left: list[PairGiver]) -> None:
    async def test() -> None:
        async with giving(Shelf(6)) as address, taking(Shelf(0)) as fetcher:
            pair = await fetcher._pairs._pair(fetching(address).kv_source)  # type: ignore[union-attr,arg-type]
            with pytest.raises(Exception, match="a prefix has at most"):
                await pair.blocks([b"short"], 0)
            await until(lambda: left)
            assert await fetcher.fetch(fetching(address)) == 6

    run(test)


def test_without_a_token_there_is_no_pair() -> None:
    async def test() -> None:
        async with giving(Shelf(6)) as address, grpc.aio.insecure_channel(address) as channel:
            call = KVBlocksStub(channel).Pair()  # type: ignore[no-untyped-call]
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    run(test)


def test_a_store_listens_where_it_was_told() -> None:
    store, address = open_store("127.0.0.1")
    assert address == f"127.0.0.1:{store.port}"
