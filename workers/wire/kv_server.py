"""The giving end of a transfer of KV blocks: beside the ``Verifier`` service, on the same port, opened by the same token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from dspark.errors import ProtocolMismatch, WorkerLost
from dspark.kv_blocks import KVExchange
from dspark.workers.wire import kv_pb2 as pb
from dspark.workers.wire.codec import WireError
from dspark.workers.wire.kv_codec import KV_PROTOCOL, block_bytes, chunk_to_wire, hashes_from_wire, layout_from_wire
from dspark.workers.wire.kv_giver import PairGiver
from dspark.workers.wire.kv_pb2_grpc import KVBlocksServicer
from dspark.workers.wire.ports import check_token

CHUNK_BYTES: Final = 4 * 2**20  # of a message, or one block

_log = logging.getLogger(__name__)


class KVServer(KVBlocksServicer):
    """Gives copies of what ``exchange`` holds; with ``pair_host``, the address that its sockets bind to, also through pairs."""

    def __init__(self, exchange: KVExchange, token: bytes, pair_host: str | None = None) -> None:
        self._exchange = exchange
        self._token = token
        self._pair_host = pair_host

    async def Fetch(self, request: pb.Wanted, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[pb.Chunk]:
        await check_token(context, self._token)
        layout = self._exchange.layout
        if request.protocol != KV_PROTOCOL:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"protocol {KV_PROTOCOL} is spoken here, not {request.protocol}")
        try:
            theirs, hashes = layout_from_wire(request.layout), hashes_from_wire(request.hashes)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if (reason := layout.mismatch(theirs)) is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"KV blocks do not fit: {reason}")
        step = max(1, CHUNK_BYTES // max(1, block_bytes(layout)))
        first = request.first
        while first < len(hashes):  # a few at a time: decoding goes on in between, and a taker that goes away ends it
            try:
                blocks = await asyncio.wrap_future(self._exchange.give(hashes[: first + step], first))
            except ProtocolMismatch as error:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            except WorkerLost as error:
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            if not blocks.count:
                return
            yield await asyncio.to_thread(chunk_to_wire, blocks, layout, 0, blocks.count)
            first += blocks.count

    async def Pair(self, requests: AsyncIterator[pb.FromTaker], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[pb.FromGiver]:
        await check_token(context, self._token)
        if self._pair_host is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "kv_transport is grpc here")
        giver = PairGiver(self._exchange, self._pair_host, requests)
        try:
            async for message in giver.serve():
                yield message
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ProtocolMismatch as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except WorkerLost as error:
            _log.warning("a transfer of KV has failed: %s", error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        finally:
            giver.close()
