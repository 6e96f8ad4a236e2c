"""The taking end of pairs: one for each verifier that blocks were taken from lately, opened when first needed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import grpc
import torch

from dspark.errors import DSparkError, ProtocolMismatch, WorkerLost
from dspark.kv_blocks import KVBlocks, KVExchange
from dspark.types import KVSource
from dspark.workers.wire import kv_pb2 as pb
from dspark.workers.wire.client import TOKEN_KEY
from dspark.workers.wire.kv_codec import (
    KV_PROTOCOL,
    MAX_PADDING_BYTES,
    PAIR_CHUNK_BYTES,
    block_bytes,
    expected_parts,
    heads_from_wire,
    joined,
    layout_to_wire,
)
from dspark.workers.wire.kv_giver import TRANSFER_S
from dspark.workers.wire.kv_pb2_grpc import KVBlocksStub
from dspark.workers.wire.pair import MEET_S, PairGroup, backend_for, check_heads, on_thread, open_store, unpack

MAX_PAIRS: Final = 64  # more are closed, the longest unused first
REFUSED_S: Final = 60.0  # before a pair is asked for again where there could be none

_REFUSALS: Final = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT)

T = TypeVar("T")
OpenChannel = Callable[[str], grpc.aio.Channel]
_log = logging.getLogger(__name__)


class NoPair(DSparkError):
    """A pair with a verifier could not be had."""


class Pairs:
    """This process's pairs as taker. ``own_host`` is the address that its sockets bind to."""

    def __init__(self, exchange: KVExchange, own_host: str, channel: OpenChannel) -> None:
        self._exchange = exchange
        self._own_host = own_host
        self._channel = channel
        self._pairs: OrderedDict[str, asyncio.Task[PairTaker]] = OrderedDict()
        self._refused: dict[str, float] = {}  # until when, by address

    async def blocks(self, source: KVSource, hashes: Sequence[bytes], first: int) -> KVBlocks:
        """What ``source`` has of a prefix, from ``first`` on. NoPair if that must go over gRPC; other errors are of the transfer."""
        now = time.monotonic()
        self._refused = {address: until for address, until in self._refused.items() if until > now}
        if source.address in self._refused:
            raise NoPair(f"a pair with {source.replica_id} could not be had lately")
        return await (await self._pair(source)).blocks(hashes, first)

    async def close(self) -> None:
        """Leave all pairs."""
        while self._pairs:
            await _leave(self._pairs.popitem()[1])

    async def _pair(self, source: KVSource) -> PairTaker:
        """The pair with a verifier. Opening it goes on if who waits for it gives up: the next one finds it open."""
        opening = self._pairs.get(source.address)
        if opening is None or _is_over(opening):
            opening = self._pairs[source.address] = asyncio.create_task(self._open(source))
            opening.add_done_callback(_is_over)  # its exception was seen, if nobody waits for it any more
        self._pairs.move_to_end(source.address)
        while len(self._pairs) > MAX_PAIRS:
            await _leave(self._pairs.popitem(last=False)[1])
        return await asyncio.shield(opening)

    async def _open(self, source: KVSource) -> PairTaker:
        pair = PairTaker(self._exchange, self._own_host, self._channel(source.address), source)
        try:
            await pair.open()
        except DSparkError as error:
            await pair.close()
            self._refused[source.address] = time.monotonic() + REFUSED_S
            raise NoPair(str(error)) from error
        except BaseException:
            await pair.close()
            raise
        _log.info("KV of %s comes through a pair over %s", source.replica_id, pair.backend)
        return pair


class PairTaker:
    """One pair. One transfer at a time; whatever goes wrong with it, the pair is of no more use and must be closed."""

    def __init__(self, exchange: KVExchange, own_host: str, channel: grpc.aio.Channel, source: KVSource) -> None:
        self.backend = backend_for(torch.device(exchange.device))
        self._layout = exchange.layout
        self._device = torch.device(exchange.device)
        self._own_host = own_host
        self._channel = channel
        self._source = source
        self._busy = asyncio.Lock()
        self._group: PairGroup | None = None
        self._is_closed = False
        stub = KVBlocksStub(channel)  # type: ignore[no-untyped-call]
        self._call = stub.Pair(metadata=((TOKEN_KEY, source.token),))
        self._max_bytes = max(PAIR_CHUNK_BYTES, block_bytes(self._layout)) + MAX_PADDING_BYTES

    @property
    def is_over(self) -> bool:
        """Whether one of the ends has left."""
        return self._is_closed or self._call.done()

    async def open(self) -> None:
        """Meet the other end; WorkerLost or ProtocolMismatch if it will not."""
        if self.backend is None:
            raise ProtocolMismatch(f"this torch has no backend for tensors on {self._device}")
        store, address = open_store(self._own_host)
        meet = pb.Meet(protocol=KV_PROTOCOL, layout=layout_to_wire(self._layout), backend=self.backend, store=address)
        if (await self._ask(pb.FromTaker(meet=meet))).WhichOneof("kind") != "met":
            raise ProtocolMismatch("the other end did not say that it will meet")
        joining = on_thread(lambda: PairGroup(store, 0, self._own_host, self._device, TRANSFER_S), PairGroup.close)
        self._group = await self._unless_ended(asyncio.ensure_future(joining), 2 * MEET_S)

    async def blocks(self, hashes: Sequence[bytes], first: int) -> KVBlocks:
        """What the other end has of a prefix, from ``first`` on."""
        async with self._busy:
            try:
                return await self._blocks(hashes, first)
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        """Leave; the other end is told by the end of the stream. Closing twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        self._call.cancel()
        group, self._group = self._group, None
        if group is not None:
            group.close()
        await self._channel.close(None)

    async def _blocks(self, hashes: Sequence[bytes], first: int) -> KVBlocks:
        chunks: list[KVBlocks] = []
        answer = await self._ask(pb.FromTaker(prefix=pb.Prefix(hashes=hashes, first=first)))
        while (head := self._head(answer)).count:
            chunks.append(await self._take(head, first + sum(chunk.count for chunk in chunks), len(hashes)))
            answer = await self._read()
        return await on_thread(lambda: self._joined(first, chunks))

    def _joined(self, first: int, chunks: Sequence[KVBlocks]) -> KVBlocks:
        blocks = joined(self._layout, first, chunks)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the engine takes them on another stream
        return blocks

    def _head(self, answer: pb.FromGiver) -> pb.Head:
        if answer.WhichOneof("kind") != "head":
            raise ProtocolMismatch(f"{self._source.replica_id} sent {answer.WhichOneof('kind')!r} where blocks are announced")
        return answer.head

    async def _take(self, message: pb.Head, first: int, limit: int) -> KVBlocks:
        """Check what is announced, let it come, check what came."""
        group, expected = self._group, expected_parts(self._layout, message.count)
        assert group is not None
        heads = heads_from_wire(message, first, limit)
        total = check_heads(heads, expected, self._max_bytes)
        buffer = torch.empty(total, dtype=torch.uint8, device=self._device)
        await self._call.write(pb.FromTaker(go=pb.Go()))

        def receive() -> list[torch.Tensor]:
            group.receive(buffer)
            return unpack(buffer, heads, expected)

        tensors = await self._unless_ended(asyncio.ensure_future(on_thread(receive)), 2 * TRANSFER_S)
        return KVBlocks(first, message.count, {part.name: tensor for part, tensor in zip(self._layout.parts, tensors, strict=True)})

    async def _ask(self, message: pb.FromTaker) -> pb.FromGiver:
        try:
            async with asyncio.timeout(TRANSFER_S):
                await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # why the stream has ended is what reading says
        except TimeoutError:
            raise WorkerLost(f"{self._source.replica_id} does not read") from None
        return await self._read()

    async def _read(self) -> pb.FromGiver:
        try:
            async with asyncio.timeout(TRANSFER_S):
                answer = await self._call.read()
        except TimeoutError:
            raise WorkerLost(f"{self._source.replica_id} said nothing in {TRANSFER_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise self._lost(error.code(), error.details()) from error
        if not isinstance(answer, pb.FromGiver):
            raise self._lost(await self._call.code(), await self._call.details())
        return answer

    async def _unless_ended(self, work: asyncio.Future[T], timeout_s: float) -> T:
        """What ``work`` brings, unless the other end leaves meanwhile or it takes too long."""
        ended = asyncio.ensure_future(self._call.code())
        try:
            await asyncio.wait({work, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if ended.done():
                raise self._lost(ended.result(), await self._call.details())
            raise WorkerLost(f"nothing came of {self._source.replica_id} in {timeout_s:g} s")
        finally:
            work.cancel()
            ended.cancel()

    def _lost(self, code: grpc.StatusCode, details: str | None) -> DSparkError:
        kind = ProtocolMismatch if code in _REFUSALS else WorkerLost
        return kind(f"{self._source.replica_id}: {code.name}: {details}")


def _is_over(opening: asyncio.Task[PairTaker]) -> bool:
    return opening.done() and (opening.cancelled() or opening.exception() is not None or opening.result().is_over)


async def _leave(opening: asyncio.Task[PairTaker]) -> None:
    opening.cancel()
    try:
        pair = await opening
    except (asyncio.CancelledError, NoPair):
        return
    await pair.close()
