"""A ``Link`` over gRPC: one bidirectional stream to one verifier replica."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc

from dspark.errors import DSparkError, ProtocolMismatch, WorkerLost
from dspark.types import Request
from dspark.workers.wire import dspark_pb2 as pb
from dspark.workers.wire.codec import (
    MAX_DOWN_BYTES,
    MAX_UP_BYTES,
    PROTOCOL,
    Tune,
    WireError,
    error_from_wire,
    outcomes_from_wire,
    request_to_wire,
    status_from_wire,
    tune_to_wire,
)
from dspark.workers.wire.dspark_pb2_grpc import VerifierStub
from dspark.workers.wire.link import Link
from dspark.workers.wire.tls import TlsFiles

TOKEN_KEY: Final = "dspark-token"
SILENCE_S: Final = 30.0  # views come four times a second: so long without a word means that the process is stuck or cut off

_OPTIONS: Final = (
    ("grpc.max_send_message_length", MAX_UP_BYTES),
    ("grpc.max_receive_message_length", MAX_DOWN_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),  # an http_proxy of the environment is for the outside world
    ("grpc.use_local_subchannel_pool", 1),
)


class GrpcLink(Link):
    """The stream to the verifier at ``address``; ``token`` is the secret that the verifier gave out through Serve.

    ``fingerprint`` names the model this router expects; a verifier with another one is refused as ``ProtocolMismatch``.
    ``tls`` secures the stream. A verifier that says nothing for ``silence_s`` is lost.
    """

    def __init__(
        self,
        replica_id: str,
        address: str,
        token: str,
        session: str,
        fingerprint: str = "",
        tls: TlsFiles | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__(replica_id, address)
        self._silence_s = silence_s
        self._tls = tls
        self._token = token
        self._hello = pb.Hello(protocol=PROTOCOL, session=session, fingerprint=fingerprint)
        self._outbox: asyncio.Queue[pb.Up] = asyncio.Queue()
        self._channel: grpc.aio.Channel | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, timeout_s: float) -> None:
        if self._tls is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        else:
            options = (*_OPTIONS, *self._tls.channel_options())
            self._channel = grpc.aio.secure_channel(self.address, self._tls.channel_credentials(), options=options)
        try:
            async with asyncio.timeout(timeout_s):
                call = await self._greeted(self._channel)
                self._check_welcome(await call.read())
                self._take_first(await call.read())
        except TimeoutError:
            await self._channel.close(None)
            raise WorkerLost(f"verifier {self.replica_id} at {self.address} did not answer in {timeout_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            await self._channel.close(None)
            raise _as_error(self.replica_id, error) from error
        except DSparkError:
            await self._channel.close(None)
            raise
        self.is_open = True
        self._tasks = [asyncio.create_task(self._write(call)), asyncio.create_task(self._read(call))]

    async def _greeted(self, channel: grpc.aio.Channel) -> Any:
        """A session in which the hello has been said."""
        stub = VerifierStub(channel)  # type: ignore[no-untyped-call]  # generated without types
        hello = pb.Up(hello=self._hello)
        call = stub.Session(metadata=((TOKEN_KEY, self._token),))
        try:
            await call.write(hello)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.INTERNAL:
                raise
            # A stream that is refused while it is written to: the library forgets by what. Asked once more, it mostly tells.
            call = stub.Session(metadata=((TOKEN_KEY, self._token),))
            await call.write(hello)
        return call

    async def close(self) -> None:
        self._fell("the link was closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close(None)

    def _send_submit(self, request: Request) -> None:
        self._outbox.put_nowait(pb.Up(submit=request_to_wire(request)))

    def _send_cancel(self, request_id: str) -> None:
        self._outbox.put_nowait(pb.Up(cancel=pb.Cancel(ids=[request_id])))

    def _send_tune(self, tune: Tune) -> None:
        self._outbox.put_nowait(pb.Up(tune=tune_to_wire(tune)))

    def _check_welcome(self, message: object) -> None:
        if not isinstance(message, pb.Down):
            raise WorkerLost(f"verifier {self.replica_id} closed the stream during the handshake")
        welcome = message.welcome
        if message.WhichOneof("kind") != "welcome" or welcome.protocol != PROTOCOL:
            raise ProtocolMismatch(f"verifier {self.replica_id} speaks protocol {welcome.protocol}, this router {PROTOCOL}")
        if welcome.replica_id != self.replica_id:
            raise WorkerLost(f"{self.address} is verifier {welcome.replica_id} now, not {self.replica_id}")

    def _take_first(self, message: object) -> None:
        """The first view comes with the welcome: an open link is one that can be judged."""
        if not isinstance(message, pb.Down) or message.WhichOneof("kind") != "view":
            raise WorkerLost(f"verifier {self.replica_id} did not say how it is")
        self._take(message)

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.Up, pb.Down]) -> None:
        try:
            while True:
                await call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._fell(f"writing failed: {_reason(error)}")

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.Up, pb.Down]) -> None:
        try:
            while True:
                async with asyncio.timeout(self._silence_s):
                    message = await call.read()
                if not isinstance(message, pb.Down):
                    self._fell("the stream ended")
                    return
                self._take(message)
        except TimeoutError:
            self._fell(f"silent for {self._silence_s:g} s")
        except (grpc.aio.AioRpcError, WireError) as error:
            self._fell(_reason(error))
        finally:
            call.cancel()

    def _take(self, message: pb.Down) -> None:
        match message.WhichOneof("kind"):
            case "outcomes":
                self._arrived(outcomes_from_wire(message.outcomes))
            case "accepted":
                self._accepted(message.accepted.id)
            case "rejected":
                self._rejected(message.rejected.id, error_from_wire(message.rejected))
            case "view":
                self._heard(status_from_wire(message.view, self.replica_id, self.address))
            case kind:
                raise WireError(f"unexpected message {kind!r}")


def _reason(error: Exception) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)


def _as_error(replica_id: str, error: grpc.aio.AioRpcError) -> WorkerLost | ProtocolMismatch:
    if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED):
        return ProtocolMismatch(f"verifier {replica_id} refused the stream: {error.details()}")
    return WorkerLost(f"verifier {replica_id}: {_reason(error)}")
