"""The proxy's guard: what passes, what does not."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from dspark.cluster import edge
from dspark.cluster.edge import BODY_KEY, DISCARD_FACTOR, SCOPE_BODY_BYTES, BodyFromScope, ProxyGuard, proxy_middlewares


async def mirror(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the headers and the size of the body that reached it."""
    request = Request(scope, receive)
    body = await request.body()
    await JSONResponse({"size": len(body), "headers": dict(request.headers)})(scope, receive, send)


def post(limit: int = 1000, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(ProxyGuard(BodyFromScope(mirror), limit))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/", **request)

    return asyncio.run(send())


def test_limits_of_the_server_cannot_be_overridden() -> None:
    sent = {
        "X-Request-Timeout-Seconds": "1",
        "x-request-disconnect-disabled": "?1",
        "serve_multiplexed_model_id": "m",
        "Serve-Multiplexed-Model-Id": "m",
        "X-Kept": "yes",
        "authorization": "Bearer x",
    }
    got = post(headers=sent).json()["headers"]
    assert got["x-kept"] == "yes"
    assert got["authorization"] == "Bearer x"
    assert not any("request" in name or "serve" in name for name in got)


@pytest.mark.parametrize(("value", "passes"), [("abc-1.2:3", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("<a>", False)])
def test_request_ids_are_checked(value: str, passes: bool) -> None:
    assert ("x-request-id" in post(headers={"X-Request-Id": value}).json()["headers"]) is passes


def test_bodies_pass_whole_up_to_the_limit() -> None:
    async def chunks() -> Any:
        for _ in range(10):
            yield b"x" * 100

    assert post(content=b"x" * 1000).json()["size"] == 1000
    assert post(content=chunks()).json()["size"] == 1000
    assert post().json()["size"] == 0


@pytest.mark.parametrize("size", [1001, 10_000, 1000 * DISCARD_FACTOR * 3])
def test_larger_bodies_get_413(size: int) -> None:
    async def chunks() -> Any:
        for _ in range(-(-size // 500)):
            yield b"x" * 500

    for content in (b"x" * size, chunks()):
        response = post(content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert len(response.headers["x-request-id"]) == 32
    assert post(content=b"x" * 1001, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_a_client_that_leaves_while_sending_reaches_the_application_as_that() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    async def test() -> None:
        messages = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            raise AssertionError("nothing to send")

        scope = {"type": "http", "headers": [(b"content-length", b"5")]}
        await ProxyGuard(BodyFromScope(app), 100)(scope, receive, send)

    asyncio.run(test())
    assert seen == ["http.request", "http.disconnect"]


def test_the_body_travels_in_the_scope_and_the_disconnect_after_it() -> None:
    seen: list[Any] = []

    async def serve_between(scope: Scope, receive: Receive, send: Send) -> None:
        """As Serve: the scope is copied, every message is handed on."""
        seen.append(scope[BODY_KEY])
        await BodyFromScope(app)(dict(scope), receive, send)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([await receive(), await receive()])

    async def test() -> None:
        messages = [
            {"type": "http.request", "body": b"ab", "more_body": True},
            {"type": "http.request", "body": b"c", "more_body": False},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            raise AssertionError("nothing to send")

        await ProxyGuard(serve_between, 100)({"type": "http", "headers": [(b"content-length", b"3")]}, receive, send)

    asyncio.run(test())
    assert seen == [b"abc", {"type": "http.request", "body": b"abc", "more_body": False}, {"type": "http.disconnect"}]


@pytest.mark.parametrize("size", [10, SCOPE_BODY_BYTES, SCOPE_BODY_BYTES + 1])
def test_other_applications_get_their_bodies_too(size: int) -> None:
    seen: list[bool] = []

    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(BODY_KEY in scope)
        await mirror(scope, receive, send)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(ProxyGuard(other, 10**6))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/", content=b"x" * size)

    assert asyncio.run(send()).json()["size"] == size
    assert seen == [size <= SCOPE_BODY_BYTES]


def test_the_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(edge.MAX_BODY_ENV, "4321")
    (middleware,) = proxy_middlewares()
    assert middleware.kwargs == {"max_body_bytes": 4321}
