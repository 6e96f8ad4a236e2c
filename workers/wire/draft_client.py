"""The verifier's end of a stream to a draft worker, over gRPC.

The engine has no event loop, so this is gRPC's threaded form: one thread of gRPC's encodes and sends, one of ours reads and
decodes. Neither computes on tensors.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

import grpc

from dspark.drafting import DraftLayout, DraftSession, DraftWorkerFacts, OpenSession, SessionListener, TurnBatch
from dspark.errors import ProtocolMismatch, WorkerLost
from dspark.workers.wire import drafting_pb2 as pb
from dspark.workers.wire.client import TOKEN_KEY
from dspark.workers.wire.codec import WireError
from dspark.workers.wire.drafting_codec import DRAFT_PROTOCOL, MAX_MESSAGE_BYTES, drafts_from_wire, layout_to_wire, turns_to_wire
from dspark.workers.wire.drafting_pb2_grpc import DraftWorkerStub
from dspark.workers.wire.tls import TlsFiles

OPEN_TIMEOUT_S: Final = 5.0
SILENCE_S: Final = 10.0  # a worker says something every second

_OPTIONS: Final = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_http_proxy", 0),  # an http_proxy of the environment is for the outside world
    ("grpc.use_local_subchannel_pool", 1),
)

_log = logging.getLogger(__name__)


def grpc_sessions(name: str, tls: TlsFiles | None = None) -> OpenSession:
    """Opens sessions over gRPC; ``name`` says who is calling, ``tls`` secures the streams."""

    def open_session(facts: DraftWorkerFacts, layout: DraftLayout, listener: SessionListener) -> DraftSession:
        return GrpcDraftSession(facts, layout, listener, name, tls)

    return open_session


class GrpcDraftSession:
    """Connects and shakes hands on construction: WorkerLost or ProtocolMismatch, in bounded time, if that fails."""

    def __init__(
        self, facts: DraftWorkerFacts, layout: DraftLayout, listener: SessionListener, name: str, tls: TlsFiles | None = None
    ) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._facts = facts
        self._layout = layout
        self._listener = listener
        self._outbox: queue.SimpleQueue[TurnBatch | pb.Up | None] = queue.SimpleQueue()
        self._greeted = threading.Event()
        self._refusal: Exception | None = None
        self._channel = _channel(facts.address, tls)
        stub = DraftWorkerStub(self._channel)  # type: ignore[no-untyped-call]  # generated without types
        self._outbox.put(pb.Up(hello=pb.Hello(protocol=DRAFT_PROTOCOL, session=name, layout=layout_to_wire(layout))))
        self._heard = threading.Event()
        self._call: Any = stub.Session(self._messages(), metadata=((TOKEN_KEY, facts.token),))
        threading.Thread(target=self._read, name=f"drafts-of-{facts.worker_id}", daemon=True).start()
        if not self._greeted.wait(OPEN_TIMEOUT_S):
            self._refusal = WorkerLost(f"draft worker {facts.worker_id} at {facts.address} did not answer in {OPEN_TIMEOUT_S:g} s")
        if self._refusal is not None:
            self.end()
            raise self._refusal
        threading.Thread(target=self._watch, name=f"watch-{facts.worker_id}", daemon=True).start()

    def send(self, batch: TurnBatch) -> None:
        self._outbox.put(batch)

    def close_requests(self, request_ids: Sequence[str]) -> None:
        self._outbox.put(pb.Up(close=pb.Close(ids=request_ids)))

    def end(self) -> None:
        self._outbox.put(None)
        self._call.cancel()
        self._channel.close()

    def _messages(self) -> Iterator[pb.Up]:
        while (item := self._outbox.get()) is not None:
            message = pb.Up(turns=turns_to_wire(item)) if isinstance(item, TurnBatch) else item
            self.bytes_sent += message.ByteSize()
            yield message

    def _read(self) -> None:
        reason = "the stream ended"
        try:
            self._check_welcome(next(self._call))
            self._greeted.set()
            for message in self._call:
                self._heard.set()
                self.bytes_received += message.ByteSize()
                self._take(message)
        except StopIteration:
            self._refusal = WorkerLost(f"draft worker {self._facts.worker_id} closed the stream during the handshake")
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            self._refusal = _as_error(self._facts.worker_id, error.code(), reason)
        except ProtocolMismatch as error:  # a WireError among them
            reason = str(error)
            self._refusal = error
        was_open = self._greeted.is_set()
        self._greeted.set()
        if was_open:
            self.end()
            self._listener.lost(reason)

    def _check_welcome(self, message: pb.Down) -> None:
        welcome, worker_id = message.welcome, self._facts.worker_id
        if message.WhichOneof("kind") != "welcome" or welcome.protocol != DRAFT_PROTOCOL:
            raise ProtocolMismatch(f"draft worker {worker_id} speaks protocol {welcome.protocol}, this verifier {DRAFT_PROTOCOL}")
        if welcome.worker_id and welcome.worker_id != worker_id:  # one that stands alone goes by its address
            raise ProtocolMismatch(f"{self._facts.address} is draft worker {welcome.worker_id} now, not {worker_id}")

    def _take(self, message: pb.Down) -> None:
        match message.WhichOneof("kind"):
            case "drafts":
                self._listener.arrived(drafts_from_wire(message.drafts, self._layout))
            case "status":
                if message.status.draining:
                    self._listener.drains()
            case kind:
                raise WireError(f"unexpected message {kind!r}")

    def _watch(self) -> None:
        """End the stream when nothing came for too long: a stopped process or a cut network closes no connection."""
        while self._call.is_active():
            self._heard.clear()
            if not self._heard.wait(SILENCE_S) and self._call.is_active():
                _log.warning("draft worker %s was silent for %g s", self._facts.worker_id, SILENCE_S)
                self._call.cancel()


def _channel(address: str, tls: TlsFiles | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address, options=_OPTIONS)
    return grpc.secure_channel(address, tls.channel_credentials(), options=(*_OPTIONS, *tls.channel_options()))


def _as_error(worker_id: str, code: grpc.StatusCode, reason: str) -> WorkerLost | ProtocolMismatch:
    if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED):
        return ProtocolMismatch(f"draft worker {worker_id} refused the stream: {reason}")
    return WorkerLost(f"draft worker {worker_id}: {reason}")
