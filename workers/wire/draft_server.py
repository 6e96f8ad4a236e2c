"""The draft worker's end: a gRPC server that feeds one ``DraftHost`` from any number of verifiers.

Every session sees its own requests only. When a session ends, for whatever reason, its requests are forgotten. Nothing that
arrives here raises into the worker's compute thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from dspark.drafting import DraftBatch, DraftHost
from dspark.errors import DSparkError
from dspark.workers.wire import drafting_pb2 as pb
from dspark.workers.wire.codec import WireError
from dspark.workers.wire.drafting_codec import (
    DRAFT_PROTOCOL,
    MAX_MESSAGE_BYTES,
    drafts_to_wire,
    ids_from_wire,
    layout_from_wire,
    layout_to_wire,
    turns_from_wire,
)
from dspark.workers.wire.drafting_pb2_grpc import DraftWorkerServicer, add_DraftWorkerServicer_to_server
from dspark.workers.wire.ports import add_port, check_token
from dspark.workers.wire.tls import TlsFiles

HELLO_TIMEOUT_S: Final = 10.0
STATUS_PERIOD_S: Final = 1.0
MAX_BACKLOG: Final = 1024  # answers a verifier may leave unread before it is taken for dead

OPTIONS: Final = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # two workers must never share a port
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
)

_log = logging.getLogger(__name__)


class _Session:
    """One verifier's stream: the messages waiting to go down, and how it ended."""

    def __init__(self, host: DraftHost, key: str) -> None:
        self.key = key
        self.outbox: asyncio.Queue[pb.Down | None] = asyncio.Queue()
        self.fault: WireError | None = None
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._stream = asyncio.current_task()
        self._is_open = True

    def put(self, message: pb.Down) -> None:
        if self.outbox.qsize() < MAX_BACKLOG:
            self.outbox.put_nowait(message)
        elif self._stream is not None and not self._stream.cancelling():
            _log.warning("session %s is ended: %d answers wait to be read", self.key, MAX_BACKLOG)
            self._stream.cancel()  # it waits for the other end to read, which nothing else would end

    def end(self, fault: WireError | None = None) -> None:
        """Let the stream end after what is queued, or at once with a fault."""
        self.fault = self.fault or fault
        self.outbox.put_nowait(None)

    def close(self) -> None:
        self._is_open = False
        self._host.end_session(self.key)

    def answer(self, batch: DraftBatch) -> None:
        """Called on the compute thread: encoding and sending happen on the event loop, while the next batch is computed."""
        if not self._is_open:
            return
        try:
            self._loop.call_soon_threadsafe(self._deliver, batch)
        except RuntimeError:  # the loop was closed between the check and the call
            _log.info("an answer for session %s came after its event loop had closed", self.key)

    def take(self, message: pb.Up) -> None:
        match message.WhichOneof("kind"):
            case "turns":
                self._host.submit(self.key, turns_from_wire(message.turns, self._host.layout), self.answer)
            case "close":
                self._host.close_requests(self.key, ids_from_wire(message.close))
            case kind:
                raise WireError(f"unexpected message {kind!r}")

    def _deliver(self, batch: DraftBatch) -> None:
        if self._is_open:
            self.put(pb.Down(drafts=drafts_to_wire(batch)))


class DraftWireServer(DraftWorkerServicer):
    """Serves ``host``; verifiers must send ``token`` and have the host's layout. An empty ``worker_id`` fits every address."""

    def __init__(self, host: DraftHost, worker_id: str, token: str, tls: TlsFiles | None = None) -> None:
        self._host = host
        self._worker_id = worker_id
        self._token = token.encode()
        self._tls = tls
        self._sessions: set[_Session] = set()
        self._numbers = itertools.count()
        self._is_draining = False
        self._server: grpc.aio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def start(self, bind: str = "127.0.0.1", port: int = 0) -> str:
        """Listen on ``port`` of ``bind`` (0: a free one); returns the address."""
        self._server = grpc.aio.server(options=OPTIONS)
        add_DraftWorkerServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]  # generated without types
        host = f"[{bind}]" if ":" in bind else bind
        port = add_port(self._server, f"{host}:{port}", self._tls)
        await self._server.start()
        self._ticker = asyncio.create_task(self._tick())
        return f"{host}:{port}"

    async def stop(self, grace_s: float = 0.0) -> None:
        """End all sessions, waiting up to ``grace_s`` for what is queued to be read."""
        for session in self._sessions:
            session.end()
        if self._ticker is not None:
            self._ticker.cancel()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)

    @property
    def num_sessions(self) -> int:
        """Verifiers that are connected."""
        return len(self._sessions)

    @property
    def is_draining(self) -> bool:
        """Whether verifiers have been told to leave."""
        return self._is_draining

    def begin_drain(self) -> None:
        """Tell every verifier to prefer other workers from now on; batches are still answered."""
        self._is_draining = True
        self._publish()

    async def Session(self, requests: AsyncIterator[pb.Up], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[pb.Down]:
        await check_token(context, self._token)
        name = await self._greet(requests, context)
        session = _Session(self._host, f"{next(self._numbers)}:{name}")
        welcome = pb.Welcome(protocol=DRAFT_PROTOCOL, worker_id=self._worker_id, layout=layout_to_wire(self._host.layout))
        yield pb.Down(welcome=welcome)
        yield pb.Down(status=self._status())
        self._sessions.add(session)
        reader = asyncio.create_task(self._read(session, requests))
        try:
            while session.fault is None and (message := await session.outbox.get()) is not None:
                yield message
        finally:
            self._sessions.discard(session)
            session.close()
            reader.cancel()
        if session.fault is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(session.fault))

    async def _greet(self, requests: AsyncIterator[pb.Up], context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """Check the Hello; returns the session's name."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration, DecodeError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no hello came")
        hello = first.hello
        if first.WhichOneof("kind") != "hello" or hello.protocol != DRAFT_PROTOCOL:
            refusal = f"this draft worker speaks protocol {DRAFT_PROTOCOL}, not {hello.protocol}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        if wrong := self._host.layout.mismatch(layout_from_wire(hello.layout)):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this draft worker does not fit the verifier: {wrong}")
        return hello.session[:128]

    async def _read(self, session: _Session, requests: AsyncIterator[pb.Up]) -> None:
        try:
            async for message in requests:
                session.take(message)
        except WireError as error:
            session.end(error)
        except DecodeError as error:
            session.end(WireError(f"not a message: {error}"))
        except DSparkError as error:
            session.end(WireError(f"the draft worker takes nothing any more: {error}"))
        finally:
            session.end()

    def _status(self) -> pb.Status:
        return pb.Status(draining=self._is_draining)

    async def _tick(self) -> None:
        """Show every verifier that this process is alive."""
        while True:
            await asyncio.sleep(STATUS_PERIOD_S)
            self._publish()

    def _publish(self) -> None:
        for session in self._sessions:
            session.put(pb.Down(status=self._status()))
