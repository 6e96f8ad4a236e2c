"""The taking end of a transfer of KV blocks. A fetch that fails costs its time; the request computes what did not come."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

import grpc

from dspark.errors import DSparkError, ProtocolMismatch, WorkerLost
from dspark.kv_blocks import KVBlocks, KVExchange, TransferStats
from dspark.types import KVSource, Request
from dspark.workers.wire import kv_pb2 as pb
from dspark.workers.wire.client import TOKEN_KEY
from dspark.workers.wire.kv_codec import KV_PROTOCOL, MAX_CHUNK_BYTES, chunk_from_wire, joined, layout_to_wire
from dspark.workers.wire.kv_pb2_grpc import KVBlocksStub
from dspark.workers.wire.kv_taker import NoPair, Pairs
from dspark.workers.wire.tls import TlsFiles

LEASE_S: Final = 5.0  # for a whole fetch; a router waits longer than that for a request to be accepted

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_CHUNK_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
_log = logging.getLogger(__name__)


class KVFetcher:
    """Brings a request's KV into an engine's prefix cache before the request comes.

    With ``pair_host``, the address that this process's sockets bind to, blocks come through pairs where both ends can.
    """

    def __init__(self, exchange: KVExchange, tls: TlsFiles | None = None, lease_s: float = LEASE_S, pair_host: str | None = None) -> None:
        self._exchange = exchange
        self._tls = tls
        self._lease_s = lease_s
        self._pairs = None if pair_host is None else Pairs(exchange, pair_host, self._channel)

    async def close(self) -> None:
        """Leave all pairs."""
        if self._pairs is not None:
            await self._pairs.close()

    async def fetch(self, request: Request) -> int:
        """Fetch what the request's source has and this engine lacks; how many blocks came. Failures are logged and counted, not raised."""
        source = request.kv_source
        assert source is not None
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._lease_s):
                hashes = self._exchange.prefix(request)
                first = await asyncio.wrap_future(self._exchange.held(hashes))
                if first >= len(hashes):
                    return 0
                blocks = await self._blocks(source, list(hashes), first)
                taken = await asyncio.wrap_future(self._exchange.take(hashes, blocks)) if blocks.count else 0
        except TimeoutError:
            return self._failed(request, f"not done within {self._lease_s:g} s")
        except DSparkError as error:
            return self._failed(request, str(error))
        seconds = time.monotonic() - started
        self._exchange.note(TransferStats(taken, blocks.num_bytes, seconds))
        _log.info("request %s: %d blocks (%d bytes) of %s in %.3f s", request.id, taken, blocks.num_bytes, source.replica_id, seconds)
        return taken

    def _failed(self, request: Request, reason: str) -> int:
        self._exchange.note(None)
        _log.warning("KV of request %s is computed again: %s", request.id, reason)
        return 0

    async def _blocks(self, source: KVSource, hashes: list[bytes], first: int) -> KVBlocks:
        if self._pairs is not None:
            try:
                return await self._pairs.blocks(source, hashes, first)
            except NoPair as error:
                self._exchange.note_fallback()
                _log.warning("kv_transport is collective, but KV of %s comes over gRPC: %s", source.replica_id, error)
        return await self._streamed(source, hashes, first)

    async def _streamed(self, source: KVSource, hashes: list[bytes], first: int) -> KVBlocks:
        layout, chunks = self._exchange.layout, list[KVBlocks]()
        wanted = pb.Wanted(protocol=KV_PROTOCOL, layout=layout_to_wire(layout), hashes=hashes, first=first)
        async with self._channel(source.address) as channel:
            call = KVBlocksStub(channel).Fetch(wanted, metadata=((TOKEN_KEY, source.token),))  # type: ignore[no-untyped-call]
            try:
                async for message in call:
                    begin = first + sum(chunk.count for chunk in chunks)
                    chunks.append(await asyncio.to_thread(chunk_from_wire, message, layout, begin, len(hashes)))
            except grpc.aio.AioRpcError as error:
                kind = ProtocolMismatch if error.code() is grpc.StatusCode.FAILED_PRECONDITION else WorkerLost
                raise kind(f"{source.replica_id}: {error.code().name}: {error.details()}") from error
        return joined(layout, first, chunks)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=_OPTIONS)
        return grpc.aio.secure_channel(address, self._tls.channel_credentials(), options=(*_OPTIONS, *self._tls.channel_options()))
