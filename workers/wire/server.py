"""The verifier's end: a gRPC server that feeds one ``Host`` from any number of router sessions.

Every session sees its own requests only: it cannot cancel another's. When a session ends, for whatever reason, its
requests are cancelled. Nothing that arrives here raises into the engine's thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from dspark.errors import BadRequest, DSparkError, Overloaded
from dspark.kv_blocks import KVExchange
from dspark.types import Request, StepOutcome
from dspark.workers.wire import dspark_pb2 as pb
from dspark.workers.wire.codec import (
    MAX_CANCELS,
    MAX_DOWN_BYTES,
    MAX_UP_BYTES,
    PROTOCOL,
    Status,
    Tune,
    WireError,
    check_id,
    error_to_wire,
    outcomes_to_wire,
    request_from_wire,
    status_to_wire,
    tune_from_wire,
)
from dspark.workers.wire.dspark_pb2_grpc import VerifierServicer, add_VerifierServicer_to_server
from dspark.workers.wire.kv_client import KVFetcher
from dspark.workers.wire.kv_pb2_grpc import add_KVBlocksServicer_to_server
from dspark.workers.wire.kv_server import KVServer
from dspark.workers.wire.link import Host
from dspark.workers.wire.ports import add_port, check_token
from dspark.workers.wire.tls import TlsFiles

VIEW_PERIOD_S: Final = 0.25
HELLO_TIMEOUT_S: Final = 10.0
MAX_BACKLOG: Final = 4096  # messages a router may leave unread before it is taken for dead

_OPTIONS: Final = (
    ("grpc.max_send_message_length", MAX_DOWN_BYTES),
    ("grpc.max_receive_message_length", MAX_UP_BYTES),
    ("grpc.so_reuseport", 0),  # two verifiers must never share a port
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)

_log = logging.getLogger(__name__)


class _Session:
    """One router's stream: its requests, and the messages waiting to go down."""

    def __init__(self, host: Host, name: str, fetcher: KVFetcher | None = None) -> None:
        self.name = name
        self.ids: set[str] = set()
        self.outbox: asyncio.Queue[pb.Down | None] = asyncio.Queue()
        self.fault: WireError | None = None
        self.tune = Tune()
        self._host = host
        self._fetcher = fetcher
        self._fetching: dict[str, asyncio.Task[None]] = {}  # requests whose KV is on its way
        self._loop = asyncio.get_running_loop()
        self._is_open = True

    def put(self, message: pb.Down) -> None:
        if self.outbox.qsize() >= MAX_BACKLOG:
            self.end(WireError(f"{MAX_BACKLOG} messages wait to be read"))
        else:
            self.outbox.put_nowait(message)

    def end(self, fault: WireError | None = None) -> None:
        """Let the stream end after what is queued, or at once with a fault."""
        self.fault = self.fault or fault
        self.outbox.put_nowait(None)

    def sink(self, outcomes: Sequence[StepOutcome]) -> None:
        """Called by the engine's thread: encoding and sending happen on the event loop, while the next step runs."""
        if not self._is_open:
            return
        try:
            self._loop.call_soon_threadsafe(self._deliver, outcomes)
        except RuntimeError:  # the loop was closed between the check and the call
            _log.info("outcomes for session %s came after its event loop had closed", self.name)

    def close(self) -> None:
        self._is_open = False
        for task in self._fetching.values():
            task.cancel()
        for request_id in self.ids:
            self._host.cancel(request_id)
        self.ids.clear()

    def cancel(self, ids: Sequence[str]) -> None:
        if len(ids) > MAX_CANCELS:
            raise WireError(f"{len(ids)} ids in one cancel; at most {MAX_CANCELS}")
        for request_id in ids:
            if (task := self._fetching.pop(request_id, None)) is not None:
                task.cancel()
            elif request_id in self.ids:
                self.ids.remove(request_id)
                self._host.cancel(request_id)

    def submit(self, message: pb.Request, is_draining: bool) -> None:
        check_id(message.id)
        if message.id in self.ids or message.id in self._fetching:
            raise WireError(f"request {message.id!r} was sent twice")
        try:
            if is_draining:
                raise Overloaded("this verifier is shutting down")
            request = request_from_wire(message)
        except (BadRequest, Overloaded) as error:
            self.put(pb.Down(rejected=error_to_wire(message.id, error)))
        else:
            if request.kv_source is None or self._fetcher is None:
                self._queue(request)
            else:
                self._fetching[request.id] = asyncio.create_task(self._fetch_first(self._fetcher, request))

    async def _fetch_first(self, fetcher: KVFetcher, request: Request) -> None:
        """Queue a request when its KV has come, or could not be had."""
        try:
            await fetcher.fetch(request)
        except Exception:  # noqa: BLE001 - whatever went wrong, the request can do without
            _log.exception("KV of request %s could not be fetched", request.id)
        self._fetching.pop(request.id, None)
        if self._is_open:
            self._queue(request)

    def _queue(self, request: Request) -> None:
        try:
            self._host.submit(request, self.sink)
        except DSparkError as error:
            self.put(pb.Down(rejected=error_to_wire(request.id, error)))
        except Exception:  # noqa: BLE001 - a bug that one request brings out must not end the others of the session
            _log.exception("request %s could not be queued", request.id)
            self.put(pb.Down(rejected=error_to_wire(request.id, DSparkError("internal error: the request could not be queued"))))
        else:
            self.ids.add(request.id)
            self.put(pb.Down(accepted=pb.Accepted(id=request.id)))

    def _deliver(self, outcomes: Sequence[StepOutcome]) -> None:
        if not self._is_open:
            return
        self.ids.difference_update(outcome.request_id for outcome in outcomes if outcome.finish is not None)
        try:
            self.put(pb.Down(outcomes=outcomes_to_wire(outcomes)))
        except (TypeError, ValueError):  # a value protobuf cannot hold: our bug, but nobody may wait for ever because of it
            _log.exception("outcomes for session %s cannot be sent", self.name)
            self.end(WireError("internal error: outcomes cannot be sent"))


class WireServer(VerifierServicer):
    """Serves ``host`` on ``bind``; routers must send ``token`` and expect ``fingerprint``, or none.

    With ``exchange`` it gives KV blocks to other verifiers, and fetches those that requests name a source of.
    """

    def __init__(
        self, host: Host, replica_id: str, fingerprint: str, token: str, tls: TlsFiles | None = None, exchange: KVExchange | None = None
    ) -> None:
        self._host = host
        self._replica_id = replica_id
        self._fingerprint = fingerprint
        self._token = token.encode()
        self._tls = tls
        self._exchange = exchange
        self._fetcher: KVFetcher | None = None
        self._sessions: set[_Session] = set()
        self._is_draining = False
        self._server: grpc.aio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self, bind: str = "127.0.0.1", with_pairs: bool = False) -> str:
        """Listen on a free port of ``bind``; returns the address. ``with_pairs``: KV goes through pairs where both ends can."""
        self._server = grpc.aio.server(options=_OPTIONS)
        add_VerifierServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]  # generated without types
        if self._exchange is not None:
            pair_host = bind if with_pairs else None
            self._fetcher = KVFetcher(self._exchange, self._tls, pair_host=pair_host)
            add_KVBlocksServicer_to_server(KVServer(self._exchange, self._token, pair_host), self._server)  # type: ignore[no-untyped-call]
        host = f"[{bind}]" if ":" in bind else bind
        self.address = f"{host}:{add_port(self._server, f'{host}:0', self._tls)}"
        await self._server.start()
        self._ticker = asyncio.create_task(self._tick())
        return self.address

    async def stop(self, grace_s: float = 0.0) -> None:
        """End all sessions, waiting up to ``grace_s`` for what is queued to be read."""
        for session in self._sessions:
            session.end()
        if self._ticker is not None:
            self._ticker.cancel()
        if self._fetcher is not None:
            await self._fetcher.close()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)

    def begin_drain(self) -> None:
        """Refuse new requests from now on and tell every router; running requests go on."""
        self._is_draining = True
        self._publish()

    async def Session(self, requests: AsyncIterator[pb.Up], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[pb.Down]:
        await check_token(context, self._token)
        session = _Session(self._host, await self._greet(requests, context), self._fetcher)
        yield pb.Down(welcome=pb.Welcome(protocol=PROTOCOL, replica_id=self._replica_id, fingerprint=self._fingerprint))
        yield pb.Down(view=status_to_wire(self.status()))
        self._sessions.add(session)
        reader = asyncio.create_task(self._read(session, requests))
        try:
            while session.fault is None and (message := await session.outbox.get()) is not None:
                yield message
        finally:
            self._sessions.discard(session)
            session.close()
            self._obey()
            reader.cancel()
        if session.fault is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(session.fault))

    def status(self) -> Status:
        """What routers are told, four times a second."""
        view = self._host.view(self._replica_id, self.address)
        if self._is_draining and not view.draining:
            view = dataclasses.replace(view, draining=True)
        moved = {} if self._exchange is None else self._exchange.stats()
        return Status(view, self._host.is_healthy(), self._host.stats() | moved)

    @property
    def wanted_verifiers(self) -> int:
        """The most verifiers that a router wants; 0 when none has said."""
        return max((session.tune.wanted_verifiers for session in self._sessions), default=0)

    def _obey(self) -> None:
        """Each router sees its own clients only; the one that is most in need of fast steps decides."""
        self._host.tune(min((session.tune.speculation_limit for session in self._sessions), default=1.0))

    async def _greet(self, requests: AsyncIterator[pb.Up], context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """Check the Hello; returns the session's name."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration, DecodeError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no hello came")
        hello = first.hello
        if first.WhichOneof("kind") != "hello" or hello.protocol != PROTOCOL:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this verifier speaks protocol {PROTOCOL}, not {hello.protocol}")
        if hello.fingerprint and hello.fingerprint != self._fingerprint:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"this verifier runs model {self._fingerprint!r}, not {hello.fingerprint!r}"
            )
        return hello.session[:128]

    async def _read(self, session: _Session, requests: AsyncIterator[pb.Up]) -> None:
        try:
            async for message in requests:
                self._take(session, message)
        except WireError as error:
            session.end(error)
        except DecodeError as error:
            session.end(WireError(f"not a message: {error}"))
        finally:
            session.end()

    def _take(self, session: _Session, message: pb.Up) -> None:
        match message.WhichOneof("kind"):
            case "submit":
                session.submit(message.submit, self._is_draining)
            case "cancel":
                session.cancel(message.cancel.ids)
            case "tune":
                session.tune = tune_from_wire(message.tune)
                self._obey()
            case kind:
                raise WireError(f"unexpected message {kind!r}")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(VIEW_PERIOD_S)
            if self._sessions:
                self._publish()

    def _publish(self) -> None:
        message = pb.Down(view=status_to_wire(self.status()))
        for session in self._sessions:
            session.put(message)
