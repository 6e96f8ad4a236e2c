"""Middleware of Serve's HTTP proxy, and its counterpart in the router: headers, bodies, request ids.

Ray Serve's proxy obeys ``x-request-timeout-seconds`` (in place of the server's own time limit) and
``x-request-disconnect-disabled`` (a request that nobody waits for runs on), whoever sends them; it reads a body
without limit; and the router's replica has to call back for that body. ``ProxyGuard`` takes those headers out, bounds
the body, and sends a small one along inside the ASGI scope. The proxy runs it, for every application behind it, if it is
started with

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=dspark.cluster.edge.proxy_middlewares

in its environment (``dspark serve`` does that; elsewhere it belongs in the environment of every node). Without it the
router works all the same, and refuses requests with these headers (``cluster/http/app.py``).
"""

from __future__ import annotations

import os
import re
import uuid
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.cluster.http.connection import too_large
from dspark.cluster.http.errors import response_of

FORBIDDEN: Final = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve-multiplexed-model-id",
    "serve_multiplexed_model_id",
)
REQUEST_ID: Final = "x-request-id"
IMPORT_PATH: Final = "dspark.cluster.edge.proxy_middlewares"
IMPORT_PATH_ENV: Final = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
MAX_BODY_ENV: Final = "DSPARK_MAX_BODY_BYTES"
DEFAULT_MAX_BODY: Final = 2 * 2**20
BODY_KEY: Final = "dspark.body"  # of the ASGI scope, which Serve carries from proxy to replica as it is
SCOPE_BODY_BYTES: Final = 64 * 1024  # larger bodies go the ordinary way only: everything in the scope is sent twice
DISCARD_FACTOR: Final = 16  # read and dropped of a body that is too large: a client that still writes would not see the answer

_GOOD_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")


def proxy_middlewares() -> list[Middleware]:
    """What Serve's proxy wraps itself in; called once in the proxy's process."""
    return [Middleware(ProxyGuard, max_body_bytes=int(os.environ.get(MAX_BODY_ENV, DEFAULT_MAX_BODY)))]


class ProxyGuard:
    """Strips forbidden headers and malformed request ids; hands a body on when it is complete, or answers 413."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if _may_pass(name, value)]}
        headers = Headers(scope=scope)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if scope["type"] == "websocket" or not has_body:
            await self._app(scope, receive, send)
            return
        body = await self._read(headers, receive)
        if body is None:
            refusal = response_of(too_large(self._max_body_bytes))
            refusal.headers[REQUEST_ID] = headers.get(REQUEST_ID) or uuid.uuid4().hex
            await refusal(scope, receive, send)
            return
        if body and body[-1]["type"] == "http.request":
            whole = b"".join(message.get("body", b"") for message in body)
            if len(whole) <= SCOPE_BODY_BYTES:
                scope[BODY_KEY] = whole
        await self._app(scope, _After(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> list[Message] | None:
        """The messages of the whole body, or up to the client's leaving; None if it is too large."""
        limit = self._max_body_bytes
        messages: list[Message] = []
        size = 0
        declared = headers.get("content-length", "")
        is_large = declared.isdigit() and int(declared) > limit
        while size <= limit * DISCARD_FACTOR:
            message = await receive()
            size += len(message.get("body", b""))
            is_large = is_large or size > limit
            messages = [] if is_large else [*messages, message]
            if message["type"] != "http.request":
                return messages
            if not message.get("more_body", False):
                break
        return None if is_large else messages


class BodyFromScope:
    """The router's side: gives the application the body that came inside the scope, without asking the proxy for it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = scope.get(BODY_KEY)
        if body is None:
            await self._app(scope, receive, send)
            return

        async def only_disconnect() -> Message:
            while (message := await receive())["type"] == "http.request":
                pass  # the same body on the ordinary way
            return message

        await self._app(scope, _After([{"type": "http.request", "body": body, "more_body": False}], only_disconnect), send)


class _After:
    """``receive`` that gives some messages first."""

    def __init__(self, messages: list[Message], receive: Receive) -> None:
        self._messages = list(messages)
        self._receive = receive

    async def __call__(self) -> Message:
        return self._messages.pop(0) if self._messages else await self._receive()


def is_forbidden(name: str) -> bool:
    """Whether Serve would obey this header; it reads underscores as hyphens."""
    return name.lower().replace("_", "-") in FORBIDDEN


def _may_pass(name: bytes, value: bytes) -> bool:
    text = name.decode("latin-1")
    if text.lower() == REQUEST_ID:
        return _GOOD_ID.fullmatch(value.decode("latin-1")) is not None
    return not is_forbidden(text)
