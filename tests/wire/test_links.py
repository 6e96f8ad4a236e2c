"""Both transports behave alike; the gRPC one also keeps strangers and broken peers out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from helpers.certificates import make_authority, make_certificate
from helpers.scripted import ScriptedHost, continuation

from dspark.errors import BadRequest, Overloaded, ProtocolMismatch, WorkerLost
from dspark.sampling import SamplingParams
from dspark.types import Finish, Request, StepOutcome
from dspark.workers.wire import dspark_pb2 as pb
from dspark.workers.wire import server as server_module
from dspark.workers.wire.client import TOKEN_KEY, GrpcLink
from dspark.workers.wire.codec import MAX_UP_BYTES, PROTOCOL, Status, Tune, request_to_wire
from dspark.workers.wire.dspark_pb2_grpc import VerifierStub
from dspark.workers.wire.link import Flight, Link
from dspark.workers.wire.local import LocalLink
from dspark.workers.wire.server import WireServer
from dspark.workers.wire.tls import TlsFiles

PROMPT = (1, 2, 3)


def request(name: str, max_tokens: int = 20) -> Request:
    return Request(name, PROMPT, SamplingParams(max_tokens=max_tokens, temperature=0.0))


async def collect(flight: Flight) -> tuple[list[int], StepOutcome]:
    tokens: list[int] = []
    async for outcome in flight:
        tokens.extend(outcome.tokens)
    return tokens, outcome


@asynccontextmanager
async def grpc_link(host: ScriptedHost) -> AsyncIterator[Link]:
    server = WireServer(host, "v0", "model", "secret")
    link = GrpcLink("v0", await server.start(), "secret", "test", "model")
    await link.open(5)
    try:
        yield link
    finally:
        await link.close()
        await server.stop()


@asynccontextmanager
async def local_link(host: ScriptedHost) -> AsyncIterator[Link]:
    link = LocalLink("v0", host)
    await link.open(5)
    try:
        yield link
    finally:
        await link.close()


class HandLink(Link):
    """A link whose other end is the test."""

    async def open(self, timeout_s: float) -> None:
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False

    def _send_submit(self, request: Request) -> None: ...

    def _send_cancel(self, request_id: str) -> None: ...

    def _send_tune(self, tune: Tune) -> None: ...


async def wait_until(condition: Callable[[], bool], timeout_s: float = 3.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


BOTH = pytest.mark.parametrize("connect", [grpc_link, local_link])


@BOTH
def test_requests_are_served_side_by_side(connect) -> None:  # type: ignore[no-untyped-def]
    async def test() -> None:
        host = ScriptedHost()
        async with connect(host) as link:
            flights = [await link.submit(request(f"r{i}", 10 + i)) for i in range(4)]
            for i, (tokens, last) in enumerate(await asyncio.gather(*map(collect, flights))):
                assert tokens == continuation(PROMPT, 10 + i)
                assert last.finish is Finish.LENGTH
            assert link.in_flight == 0
        host.close()

    run(test)


@BOTH
def test_refusals_reach_their_caller_only(connect) -> None:  # type: ignore[no-untyped-def]
    async def test() -> None:
        host = ScriptedHost(max_running=1, max_queued=0)
        host.gate.clear()
        async with connect(host) as link:
            with pytest.raises(BadRequest, match="under 64") as caught:
                await link.submit(Request("bad", (99,)))
            assert caught.value.param == "prompt"
            running = await link.submit(request("a"))
            with pytest.raises(Overloaded) as full:
                await link.submit(request("b"))
            assert full.value.retry_after_s == 2.0
            host.fail_with = None
            host.gate.set()
            assert (await collect(running))[0] == continuation(PROMPT, 20)
        host.close()

    run(test)


@BOTH
def test_closing_a_flight_cancels_at_the_verifier(connect) -> None:  # type: ignore[no-untyped-def]
    async def test() -> None:
        host = ScriptedHost(step_s=0.01)
        async with connect(host) as link:
            flight = await link.submit(request("a", 1000))
            await anext(flight)
            flight.close()
            await wait_until(lambda: host.stats()["running"] == 0)
            assert host.cancelled == ["a"]
            done = await link.submit(request("b", 4))
            await collect(done)
            done.close()
            assert host.cancelled == ["a"], "a request that ended needs no cancel"
        host.close()

    run(test)


@BOTH
def test_views_arrive_and_age(connect) -> None:  # type: ignore[no-untyped-def]
    async def test() -> None:
        host = ScriptedHost(max_running=3)
        async with connect(host) as link:
            await wait_until(lambda: link.status is not None)
            status = link.status
            assert (status.view.id, status.view.max_running, status.healthy) == ("v0", 3, True)
            host.healthy = False
            await wait_until(lambda: not link.status.healthy)
            assert link.status.view.age_s >= 0
        host.close()

    run(test)


@BOTH
def test_decisions_reach_the_verifier(connect) -> None:  # type: ignore[no-untyped-def]
    async def test() -> None:
        host = ScriptedHost()
        async with connect(host) as link:
            link.tune(Tune(0.25, 3))
            await wait_until(lambda: host.speculation_limit == 0.25)
        link.tune(Tune(0.5, 3))  # a closed link drops it
        host.close()

    run(test)


def test_of_many_routers_the_one_in_need_decides() -> None:
    async def test() -> None:
        host = ScriptedHost()
        server = WireServer(host, "v0", "model", "secret")
        address = await server.start()
        links = [GrpcLink("v0", address, "secret", f"router {i}", "model") for i in range(2)]
        for link in links:
            await link.open(5)
        assert server.wanted_verifiers == 0
        links[0].tune(Tune(0.5, 2))
        links[1].tune(Tune(0.75, 4))
        await wait_until(lambda: server.wanted_verifiers == 4 and host.speculation_limit == 0.5)
        await links[0].close()
        await wait_until(lambda: host.speculation_limit == 0.75)
        await links[1].close()
        await wait_until(lambda: (host.speculation_limit, server.wanted_verifiers) == (1.0, 0))
        await server.stop()
        host.close()

    run(test)


@BOTH
def test_a_lost_link_fails_every_flight(connect) -> None:  # type: ignore[no-untyped-def]
    async def test() -> None:
        host = ScriptedHost(step_s=0.01)
        async with connect(host) as link:
            flight = await link.submit(request("a", 1000))
            await anext(flight)
            await link.close()
            with pytest.raises(WorkerLost):
                await collect(flight)
            with pytest.raises(WorkerLost):
                await link.submit(request("b"))
            await wait_until(lambda: host.stats()["running"] == 0)
        host.close()

    run(test)


def test_local_faults_on_demand() -> None:
    async def test() -> None:
        host = ScriptedHost()
        link = LocalLink("v0", host)
        await link.open(1)
        link.delay_s = 0.1
        started = asyncio.get_running_loop().time()
        await collect(await link.submit(request("slow", 2)))
        assert asyncio.get_running_loop().time() - started >= 0.1
        link.delay_s, link.drop = 0.0, True
        silent = await link.submit(request("dropped", 2))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(silent)
        link.kill()
        with pytest.raises(WorkerLost, match="killed"):
            await anext(silent)
        host.close()

    run(test)


def test_a_dead_verifier_process_is_seen_at_once() -> None:
    async def test() -> None:
        host = ScriptedHost(step_s=0.01)
        server = WireServer(host, "v0", "model", "secret")
        link = GrpcLink("v0", await server.start(), "secret", "test")
        await link.open(5)
        flight = await link.submit(request("a", 1000))
        await anext(flight)
        await server.stop(0)
        with pytest.raises(WorkerLost):
            await collect(flight)
        assert not link.is_open
        await wait_until(lambda: host.stats()["running"] == 0)
        await link.close()
        host.close()

    run(test)


def test_draining_refuses_new_requests_and_finishes_old_ones() -> None:
    async def test() -> None:
        host = ScriptedHost(step_s=0.005)
        server = WireServer(host, "v0", "model", "secret")
        link = GrpcLink("v0", await server.start(), "secret", "test")
        await link.open(5)
        flight = await link.submit(request("a", 30))
        server.begin_drain()
        await wait_until(lambda: link.status is not None and link.status.view.draining)
        with pytest.raises(Overloaded, match="shutting down"):
            await link.submit(request("b"))
        assert (await collect(flight))[0] == continuation(PROMPT, 30)
        await link.close()
        await server.stop()
        host.close()

    run(test)


def test_a_hello_that_fails_in_the_library_is_said_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is refused while it is written to ends with an internal error, and the reason is lost."""
    asked = 0

    class Forgetful:
        async def write(self, message: object) -> None:
            raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "Internal error from Core")

    class Stub:
        def __init__(self, channel: grpc.aio.Channel) -> None:
            self._stub = VerifierStub(channel)  # type: ignore[no-untyped-call]

        def Session(self, **options: Any) -> Any:
            nonlocal asked
            asked += 1
            return Forgetful() if asked == 1 else self._stub.Session(**options)

    monkeypatch.setattr("dspark.workers.wire.client.VerifierStub", Stub)

    async def test() -> None:
        host = ScriptedHost()
        server = WireServer(host, "v0", "model", "secret")
        link = GrpcLink("v0", await server.start(), "wrong", "test", "model")
        with pytest.raises(ProtocolMismatch):
            await link.open(5)
        await server.stop()
        host.close()

    run(test)
    assert asked == 2


@pytest.mark.parametrize(
    ("token", "fingerprint", "replica_id", "error"),
    [
        ("wrong", "model", "v0", ProtocolMismatch),
        ("", "model", "v0", ProtocolMismatch),
        ("secret", "another model", "v0", ProtocolMismatch),
        ("secret", "model", "v1", WorkerLost),  # the port now belongs to another replica
    ],
)
def test_the_handshake_refuses(token: str, fingerprint: str, replica_id: str, error: type[Exception]) -> None:
    async def test() -> None:
        host = ScriptedHost()
        server = WireServer(host, "v0", "model", "secret")
        link = GrpcLink(replica_id, await server.start(), token, "test", fingerprint)
        with pytest.raises(error):
            await link.open(5)
        assert not link.is_open
        await server.stop()
        host.close()

    run(test)


def test_nobody_there_is_a_lost_worker() -> None:
    async def test() -> None:
        with pytest.raises(WorkerLost):
            await GrpcLink("v0", "127.0.0.1:1", "secret", "test").open(2)

    run(test)


async def read_all(call: grpc.aio.StreamStreamCall[pb.Up, pb.Down]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


HELLO = pb.Up(hello=pb.Hello(protocol=PROTOCOL, session="raw"))
SUBMIT = pb.Up(submit=request_to_wire(request("a", 1000)))


@pytest.mark.parametrize(
    "messages",
    [
        [SUBMIT],
        [pb.Up(hello=pb.Hello(protocol=PROTOCOL + 1))],
        [HELLO, HELLO],
        [HELLO, pb.Up()],
        [HELLO, SUBMIT, SUBMIT],
        [HELLO, pb.Up(submit=pb.Request(id="x" * 200))],
        [HELLO, pb.Up(cancel=pb.Cancel(ids=["a"] * 5000))],
        [HELLO, pb.Up(tune=pb.Tune(speculation_limit=2.0))],
        [HELLO, pb.Up(submit=pb.Request(id="big", cache_salt="x" * (MAX_UP_BYTES + 1)))],
    ],
    ids=["no hello", "protocol", "two hellos", "empty", "duplicate", "bad id", "many cancels", "wild decision", "too big"],
)
def test_broken_peers_end_their_own_session_only(messages: list[pb.Up]) -> None:
    async def test() -> None:
        host = ScriptedHost(step_s=0.01)
        server = WireServer(host, "v0", "model", "secret")
        address = await server.start()
        good = GrpcLink("v0", address, "secret", "good")
        await good.open(5)
        flight = await good.submit(request("mine", 60))
        options = (("grpc.max_send_message_length", -1),)
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            call = VerifierStub(channel).Session(metadata=((TOKEN_KEY, "secret"),))
            for message in messages:
                await call.write(message)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_all(call)
        assert caught.value.code() in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        )
        assert (await collect(flight))[0] == continuation(PROMPT, 60)
        await wait_until(lambda: host.stats()["running"] == 0)
        await good.close()
        await server.stop()
        host.close()

    run(test)


def test_garbage_on_the_stream_ends_that_stream_only() -> None:
    async def test() -> None:
        host = ScriptedHost(step_s=0.01)
        server = WireServer(host, "v0", "model", "secret")
        address = await server.start()
        good = GrpcLink("v0", address, "secret", "good")
        await good.open(5)
        flight = await good.submit(request("mine", 40))
        async with grpc.aio.insecure_channel(address) as channel:
            for messages in ([b"\xff\xff\xff"], [HELLO.SerializeToString(), b"\x0a\xff\xff\xff\xff garbage"]):
                method = channel.stream_stream("/dspark.wire.v1.Verifier/Session", request_serializer=bytes)
                call = method(metadata=((TOKEN_KEY, "secret"),))
                for message in messages:
                    await call.write(message)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await read_all(call)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await collect(flight))[0] == continuation(PROMPT, 40)
        await good.close()
        await server.stop()
        host.close()

    run(test)


def test_a_session_cannot_cancel_anothers_request() -> None:
    async def test() -> None:
        host = ScriptedHost(step_s=0.01)
        server = WireServer(host, "v0", "model", "secret")
        address = await server.start()
        mine, other = (GrpcLink("v0", address, "secret", name) for name in ("mine", "other"))
        await mine.open(5)
        await other.open(5)
        flight = await mine.submit(request("a", 40))
        other._send_cancel("a")
        assert (await collect(flight))[0] == continuation(PROMPT, 40)
        assert host.cancelled == []
        await mine.close()
        await other.close()
        await server.stop()
        host.close()

    run(test)


def test_a_bug_in_one_request_leaves_the_session_alive() -> None:
    async def test() -> None:
        host = ScriptedHost()
        async with grpc_link(host) as link:
            host.fail_with = ZeroDivisionError("a bug")
            with pytest.raises(Exception, match="internal error"):
                await link.submit(request("a"))
            host.fail_with = None
            assert (await collect(await link.submit(request("b"))))[0] == continuation(PROMPT, 20)
        host.close()

    run(test)


def test_a_router_that_reads_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_BACKLOG", 8)

    async def test() -> None:
        host = ScriptedHost()
        session = server_module._Session(host, "stuck")
        session.submit(request_to_wire(request("a", 1000)), is_draining=False)
        await wait_until(lambda: session.fault is not None)
        session.close()
        assert host.cancelled == ["a"]
        host.close()

    run(test)


def test_one_message_carries_a_whole_round() -> None:
    async def test() -> None:
        host = ScriptedHost()
        host.gate.clear()
        session = server_module._Session(host, "s")
        for i in range(4):
            session.submit(request_to_wire(request(f"r{i}", 2)), is_draining=False)
        host.gate.set()
        for _ in range(4):
            assert (await session.outbox.get()).WhichOneof("kind") == "accepted"
        message = await session.outbox.get()
        assert len(message.outcomes.outcomes) == 4
        host.close()

    run(test)


def test_mutual_tls(tmp_path: Path) -> None:
    authority = make_authority(tmp_path / "authority")
    pair = make_certificate(authority, tmp_path / "process", "dspark")
    files = TlsFiles(authority.certificate, pair.certificate, pair.key, "dspark")

    async def test() -> None:
        host = ScriptedHost()
        server = WireServer(host, "v0", "model", "secret", files)
        address = await server.start()
        link = GrpcLink("v0", address, "secret", "test", "model", files)
        await link.open(5)
        assert (await collect(await link.submit(request("a"))))[0] == continuation(PROMPT, 20)
        await link.close()
        with pytest.raises(WorkerLost):
            await GrpcLink("v0", address, "secret", "test", "model").open(1)
        await server.stop()
        host.close()

    run(test)


def test_requests_count_until_a_view_that_shows_them_and_ended_ones_until_one_that_does_not() -> None:
    """A view that was made before a request was queued, and came after it was sent, says nothing of it."""

    async def test() -> None:
        link, host = HandLink("v0", "here"), ScriptedHost()
        await link.open(1.0)
        view = Status(host.view("v0", "here"), True, {})
        first, second = (asyncio.create_task(link.submit(request(name))) for name in ("first", "second"))
        await asyncio.sleep(0)
        assert link.unseen == (2, 6, 0)
        link._heard(view)
        assert link.unseen == (2, 6, 0), "it crossed them on the way"
        link._accepted("first")
        assert link.unseen == (2, 6, 0)
        link._heard(view)
        assert link.unseen == (1, 3, 0)
        link._accepted("second")
        (await first).close()
        assert link.unseen == (1, 3, 1)
        link._heard(view)
        assert link.unseen == (0, 0, 0)
        link._arrived([StepOutcome("second", 4, (1,), 0, finish=Finish.LENGTH)])
        assert link.unseen == (0, 0, 1)
        link._heard(view)
        assert link.unseen == (0, 0, 0)
        await second
        host.close()

    run(test)


def test_an_open_link_knows_how_its_verifier_is() -> None:
    async def test() -> None:
        host = ScriptedHost(max_running=3)
        async with grpc_link(host) as link:
            assert link.status is not None
            assert link.status.view.max_running == 3
        host.close()

    run(test)
