"""The giving end of a pair: announces blocks over gRPC and sends their bytes through torch.distributed, for one taker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import torch
from google.protobuf.message import DecodeError

from dspark.errors import ProtocolMismatch
from dspark.kv_blocks import KVExchange
from dspark.workers.wire import kv_pb2 as pb
from dspark.workers.wire.codec import WireError
from dspark.workers.wire.kv_codec import KV_PROTOCOL, PAIR_CHUNK_BYTES, block_bytes, hashes_from_wire, head_to_wire, layout_from_wire
from dspark.workers.wire.pair import PairGroup, backend_for, on_thread, pack, reach_store

IDLE_S: Final = 600.0  # a pair that nobody has asked anything of for this long ends; the taker opens another
TRANSFER_S: Final = 5.0  # for the next word, or the next buffer, of a transfer that has begun


class PairGiver:
    """Serves one stream of ``Pair``. WireError, ProtocolMismatch or WorkerLost end it; ``close`` must follow."""

    def __init__(self, exchange: KVExchange, own_host: str, messages: AsyncIterator[pb.FromTaker]) -> None:
        self._exchange = exchange
        self._own_host = own_host
        self._messages = messages
        self._group: PairGroup | None = None
        self._step = max(1, PAIR_CHUNK_BYTES // max(1, block_bytes(exchange.layout)))

    async def serve(self) -> AsyncIterator[pb.FromGiver]:
        """What to answer, until the taker goes."""
        first = await self._next(TRANSFER_S, "meet")
        if first is None:
            return
        self._check(first.meet)
        yield pb.FromGiver(met=pb.Met())
        self._group = await on_thread(lambda: self._join(first.meet.store), PairGroup.close)
        while (asked := await self._next(IDLE_S, "prefix")) is not None:
            async for head in self._give(hashes_from_wire(asked.prefix.hashes), asked.prefix.first):
                yield pb.FromGiver(head=head)

    def close(self) -> None:
        """Leave the pair; the other end notices."""
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _check(self, meet: pb.Meet) -> None:
        if meet.protocol != KV_PROTOCOL:
            raise ProtocolMismatch(f"protocol {KV_PROTOCOL} is spoken here, not {meet.protocol}")
        if (reason := self._exchange.layout.mismatch(layout_from_wire(meet.layout))) is not None:
            raise ProtocolMismatch(f"KV blocks do not fit: {reason}")
        here = backend_for(torch.device(self._exchange.device))
        if here != meet.backend:
            raise ProtocolMismatch(f"KV is on {self._exchange.device} here, which {here} would carry, not {meet.backend!r:.20}")

    def _join(self, store: str) -> PairGroup:
        return PairGroup(reach_store(store), 1, self._own_host, torch.device(self._exchange.device), TRANSFER_S)

    async def _give(self, hashes: list[bytes], first: int) -> AsyncIterator[pb.Head]:
        """Announce and send what is here of a prefix, in buffers of some blocks: decoding goes on in between."""
        group, layout = self._group, self._exchange.layout
        assert group is not None
        while first < len(hashes):
            blocks = await asyncio.wrap_future(self._exchange.give(hashes[: first + self._step], first, on_device=True))
            if not blocks.count:
                break
            buffer, heads = await on_thread(lambda blocks=blocks: pack([blocks.parts[part.name] for part in layout.parts]))  # type: ignore[misc]
            yield head_to_wire(first, blocks.count, heads)
            if await self._next(TRANSFER_S, "go") is None:
                return
            await on_thread(lambda buffer=buffer: group.send(buffer))  # type: ignore[misc]
            first += blocks.count
        yield head_to_wire(first, 0, [])

    async def _next(self, timeout_s: float, kind: str) -> pb.FromTaker | None:
        """The taker's next message, which must be of one kind; None when it has gone."""
        try:
            async with asyncio.timeout(timeout_s):
                message = await anext(self._messages, None)
        except TimeoutError:
            raise WireError(f"no {kind} came in {timeout_s:g} s") from None
        except DecodeError as error:
            raise WireError(f"not a message: {error}") from error
        if message is not None and message.WhichOneof("kind") != kind:
            raise WireError(f"expected {kind}, got {message.WhichOneof('kind')}")
        return message
