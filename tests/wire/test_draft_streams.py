"""Streams between verifiers and draft workers over gRPC: drafts arrive, strangers and broken peers do not get in."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
import torch
from helpers.certificates import make_authority, make_certificate
from helpers.draft_workers import ServedWorker, eventually

from dspark.drafting import DraftBatch, DraftLayout, DraftSession, Held, TurnBatch
from dspark.errors import ConfigError, ProtocolMismatch, WorkerLost
from dspark.sampling import SamplingParams
from dspark.types import DraftLaw, DraftTree, DraftTurn
from dspark.workers.wire import draft_client, draft_server
from dspark.workers.wire import drafting_pb2 as pb
from dspark.workers.wire.client import TOKEN_KEY
from dspark.workers.wire.draft_client import GrpcDraftSession, grpc_sessions
from dspark.workers.wire.drafting_codec import DRAFT_PROTOCOL, layout_to_wire, turns_to_wire
from dspark.workers.wire.drafting_pb2_grpc import DraftWorkerStub
from dspark.workers.wire.tls import TlsFiles

LAYOUT = DraftLayout("t", "d", "float32", 4, 3, 32)


class Host:
    """Answers every batch with a tree a turn, in the thread that asks, and notes what it was told."""

    def __init__(self) -> None:
        self.layout = LAYOUT
        self.seen: list[TurnBatch] = []
        self.closed: list[tuple[str, tuple[str, ...]]] = []
        self.ended: list[str] = []
        self.is_lost = False

    def submit(self, session: str, batch: TurnBatch, answer: Callable[[DraftBatch], None]) -> None:
        if self.is_lost:
            raise WorkerLost("no memory")
        self.seen.append(batch)
        trees = tuple(DraftTree.chain(turn.request_id, turn.base_len, (1, 2), (0.5, 0.5)) for turn in batch.turns)
        answer(DraftBatch(batch.seq, trees, (Held(session[:8], 2, 1),), 0.5))

    def close_requests(self, session: str, request_ids: Sequence[str]) -> None:
        self.closed.append((session, tuple(request_ids)))

    def end_session(self, session: str) -> None:
        self.ended.append(session)

    def is_healthy(self) -> bool:
        return True

    def stats(self) -> dict[str, float]:
        return {}


class Listener:
    def __init__(self) -> None:
        self.batches: queue.Queue[DraftBatch] = queue.Queue()
        self.reasons: list[str] = []
        self.is_draining = threading.Event()

    def arrived(self, batch: DraftBatch) -> None:
        self.batches.put(batch)

    def drains(self) -> None:
        self.is_draining.set()

    def lost(self, reason: str) -> None:
        self.reasons.append(reason)


def turn(name: str = "r") -> DraftTurn:
    return DraftTurn(name, 4, (1, 2, 3, 4), 0, torch.ones(3, 4), 3, SamplingParams(temperature=0.0), 5)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def served(host: Host) -> Iterator[ServedWorker]:
    worker = ServedWorker(host)
    yield worker
    worker.stop()


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def session(served: ServedWorker, listener: Listener) -> Iterator[DraftSession]:
    opened = grpc_sessions("v0")(served.facts, LAYOUT, listener)
    yield opened
    opened.end()


def test_batches_are_answered(host: Host, session: DraftSession, listener: Listener) -> None:
    for seq in range(3):
        session.send(TurnBatch(seq, (turn("a"), turn("b"))))
    answers = [listener.batches.get(timeout=5) for _ in range(3)]
    assert [answer.seq for answer in answers] == [0, 1, 2]
    assert [tree.request_id for tree in answers[0].trees] == ["a", "b"]
    assert (answers[0].held, answers[0].seconds) == ((Held("0:v0", 2, 1),), 0.5)
    assert torch.equal(host.seen[2].turns[1].features, torch.ones(3, 4))
    session.close_requests(["a"])
    eventually(lambda: host.closed == [("0:v0", ("a",))], "closing")
    assert 3 * 2 * 48 < session.bytes_sent < 2000
    assert 0 < session.bytes_received < 1000


def test_the_end_of_a_session_reaches_both_sides(host: Host, served: ServedWorker, session: DraftSession, listener: Listener) -> None:
    session.end()
    eventually(lambda: host.ended == ["0:v0"], "the worker's forgetting")
    eventually(lambda: len(listener.reasons) == 1, "the verifier's being told")
    session.send(TurnBatch(1, (turn(),)))
    assert served.server.num_sessions == 0


def test_a_stopped_server_ends_its_sessions(served: ServedWorker, session: DraftSession, listener: Listener) -> None:
    served.call(served.server.stop())
    eventually(lambda: len(listener.reasons) == 1, "the verifier's being told")


def test_a_drain_is_told(served: ServedWorker, session: DraftSession, listener: Listener) -> None:
    async def drain() -> None:
        served.server.begin_drain()

    assert not listener.is_draining.is_set()
    served.call(drain())
    assert listener.is_draining.wait(5)
    session.send(TurnBatch(7, (turn(),)))
    assert listener.batches.get(timeout=5).seq == 7, "it still answers"


def test_silence_ends_a_stream(monkeypatch: pytest.MonkeyPatch, host: Host, listener: Listener) -> None:
    monkeypatch.setattr(draft_client, "SILENCE_S", 0.3)
    monkeypatch.setattr(draft_server, "STATUS_PERIOD_S", 0.05)
    served = ServedWorker(host)
    session = GrpcDraftSession(served.facts, LAYOUT, listener, "v0")
    time.sleep(0.7)
    assert not listener.reasons, "statuses come more often than that"
    served.loop.call_soon_threadsafe(time.sleep, 1.0)
    eventually(lambda: len(listener.reasons) == 1, "noticing the silence")
    session.end()
    served.stop()


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"target": "x"}, "target is 't' here and 'x' there"),
        ({"drafter": "x"}, "drafter is"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' here and 'bfloat16' there"),
        ({"feature_width": 8}, "feature_width is 4 here and 8 there"),
        ({"block_size": 7}, "block_size is"),
        ({"vocab_size": 33}, "vocab_size is"),
    ],
)
def test_handshakes_name_what_does_not_fit(served: ServedWorker, listener: Listener, change: dict[str, object], refusal: str) -> None:
    with pytest.raises(ProtocolMismatch, match=refusal):
        GrpcDraftSession(served.facts, dataclasses.replace(LAYOUT, **change), listener, "v0")  # type: ignore[arg-type]
    assert listener.reasons == []


def test_wrong_tokens_ids_and_addresses_are_refused(served: ServedWorker, listener: Listener) -> None:
    with pytest.raises(ProtocolMismatch, match="wrong token"):
        GrpcDraftSession(dataclasses.replace(served.facts, token="guess"), LAYOUT, listener, "v0")
    with pytest.raises(ProtocolMismatch, match="is draft worker w0 now, not w1"):
        GrpcDraftSession(dataclasses.replace(served.facts, worker_id="w1"), LAYOUT, listener, "v0")
    with pytest.raises(WorkerLost, match="w0"):
        GrpcDraftSession(dataclasses.replace(served.facts, address="127.0.0.1:1"), LAYOUT, listener, "v0")
    assert "secret" not in repr(served.facts)


def raw(served: ServedWorker, *messages: pb.Up | bytes) -> tuple[list[pb.Down], grpc.RpcError | None]:
    """Send messages past the client, as another program would."""
    with grpc.insecure_channel(served.facts.address) as channel:
        serialize = lambda message: message if isinstance(message, bytes) else message.SerializeToString()  # noqa: E731
        call = channel.stream_stream("/dspark.drafting.v1.DraftWorker/Session", serialize, pb.Down.FromString)
        got: list[pb.Down] = []
        try:
            got.extend(call(iter(messages), metadata=((TOKEN_KEY, "secret"),), timeout=5))
        except grpc.RpcError as error:
            return got, error
        return got, None


HELLO = pb.Up(hello=pb.Hello(protocol=DRAFT_PROTOCOL, session="x", layout=layout_to_wire(LAYOUT)))


def test_broken_peers_lose_their_session_only(host: Host, served: ServedWorker, session: DraftSession, listener: Listener) -> None:
    tampered = turns_to_wire(TurnBatch(1, (turn(),)))
    tampered.turns[0].features.crc32 ^= 1
    wrong_vocabulary = turns_to_wire(TurnBatch(1, (dataclasses.replace(turn(), tokens=(1, 2, 3, 32)),)))
    cases: list[tuple[tuple[pb.Up | bytes, ...], grpc.StatusCode, str]] = [
        ((pb.Up(close=pb.Close()),), grpc.StatusCode.FAILED_PRECONDITION, "speaks protocol"),
        ((pb.Up(hello=pb.Hello(protocol=99)),), grpc.StatusCode.FAILED_PRECONDITION, "protocol 1, not 99"),
        ((HELLO, HELLO), grpc.StatusCode.INVALID_ARGUMENT, "unexpected message 'hello'"),
        ((HELLO, pb.Up()), grpc.StatusCode.INVALID_ARGUMENT, "unexpected message None"),
        ((HELLO, pb.Up(turns=tampered)), grpc.StatusCode.INVALID_ARGUMENT, "wrong checksum"),
        ((HELLO, pb.Up(turns=wrong_vocabulary)), grpc.StatusCode.INVALID_ARGUMENT, "outside 0 to 31"),
        ((HELLO, pb.Up(close=pb.Close(ids=[""]))), grpc.StatusCode.INVALID_ARGUMENT, "request id"),
    ]
    for messages, code, text in cases:
        _, error = raw(served, *messages)
        assert error is not None
        assert error.code() is code
        assert text in (error.details() or "")
    assert raw(served, HELLO, b"\xff\xff")[1] is not None
    assert host.seen == []
    session.send(TurnBatch(1, (turn(),)))
    assert listener.batches.get(timeout=5).seq == 1, "the others go on"


def test_a_worker_that_lies_is_left(served: ServedWorker, listener: Listener, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(session: str, batch: TurnBatch, answer: Callable[[DraftBatch], None]) -> None:
        answer(DraftBatch(batch.seq, (DraftTree.chain("r", 4, (40,), (0.5,)),)))

    monkeypatch.setattr(host, "submit", submit)
    session = GrpcDraftSession(served.facts, LAYOUT, listener, "v0")
    session.send(TurnBatch(1, (turn(),)))
    eventually(lambda: len(listener.reasons) == 1, "leaving it")
    assert "outside 0 to 31" in listener.reasons[0]
    assert listener.batches.empty()


def test_a_failed_worker_ends_its_sessions(host: Host, session: DraftSession, listener: Listener) -> None:
    host.is_lost = True
    session.send(TurnBatch(1, (turn(),)))
    eventually(lambda: len(listener.reasons) == 1, "the verifier's being told")
    assert "no memory" in listener.reasons[0]


def test_verifiers_that_do_not_read_are_taken_for_dead(monkeypatch: pytest.MonkeyPatch, host: Host, served: ServedWorker) -> None:
    monkeypatch.setattr(draft_server, "MAX_BACKLOG", 10)
    law = DraftLaw(torch.zeros(64, 8192, dtype=torch.int64), torch.zeros(64, 8192))
    huge = DraftTree.chain("r", 4, [1] * 64, [0.5] * 64, law)  # 4 MiB: no buffer on the way holds many

    def submit(session: str, batch: TurnBatch, answer: Callable[[DraftBatch], None]) -> None:
        for _ in range(30):
            answer(DraftBatch(batch.seq, (huge,)))

    monkeypatch.setattr(host, "submit", submit)
    with grpc.insecure_channel(served.facts.address) as channel:
        messages = iter([HELLO, pb.Up(turns=turns_to_wire(TurnBatch(1, (turn(),))))])
        call = DraftWorkerStub(channel).Session(messages, metadata=((TOKEN_KEY, "secret"),))  # type: ignore[no-untyped-call]
        eventually(lambda: len(host.ended) == 1, "ending the session", 20)
        call.cancel()


def test_mutual_tls(host: Host, listener: Listener, tmp_path: Path) -> None:
    """Only holders of a certificate of the authority, for the right name, get through, on either end."""
    ours, theirs = make_authority(tmp_path / "ours"), make_authority(tmp_path / "theirs")
    good = make_certificate(ours, tmp_path / "good", "dspark")
    files = TlsFiles(ours.certificate, good.certificate, good.key, "dspark")
    worker = ServedWorker(host, tls=files)
    session = GrpcDraftSession(worker.facts, LAYOUT, listener, "v0", files)
    session.send(TurnBatch(1, (turn(),)))
    assert listener.batches.get(timeout=5).seq == 1
    session.end()
    foreign = make_certificate(theirs, tmp_path / "foreign", "dspark")
    refused = [
        None,
        TlsFiles(ours.certificate, foreign.certificate, foreign.key, "dspark"),
        TlsFiles(theirs.certificate, good.certificate, good.key, "dspark"),
        TlsFiles(ours.certificate, good.certificate, good.key, "another"),
    ]
    for wrong in refused:
        with pytest.raises(WorkerLost):
            GrpcDraftSession(worker.facts, LAYOUT, listener, "v0", wrong)
    worker.stop()
    with pytest.raises(ConfigError, match="nowhere"):
        TlsFiles(tmp_path / "nowhere", good.certificate, good.key).channel_credentials()
