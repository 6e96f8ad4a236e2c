"""What belongs to one HTTP connection: reading a bounded body, noticing that the client left, sending an event stream.

The client's leaving is read from ASGI's ``receive`` here, so it counts whatever the proxy in front was told.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark.errors import TooLarge

HEAD_AFTER_S = 0.5
Result = TypeVar("Result")
_SEPARATORS = {ord(separator): f"\\u{ord(separator):04x}" for separator in "\x85\u2028\u2029"}  # JSON escapes all others itself


class ClientLeftError(Exception):
    """The client closed the connection; there is nobody to answer."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The request body; ``TooLarge`` as soon as it is known to exceed ``max_bytes``."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def too_large(max_bytes: int) -> TooLarge:
    """The refusal of a body over the limit."""
    return TooLarge(f"the request body is over the limit of {max_bytes} bytes", None, "body_too_large")


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, Result], discard: Callable[[Result], None] = lambda _: None
) -> Result:
    """Run ``work`` unless the client leaves first: then it is cancelled and ``ClientLeftError`` raised.

    A result that came too late for anyone to take it goes to ``discard``.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        has_left = not task.done()
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
        if has_left:
            raise ClientLeftError
        return task.result()
    except BaseException:
        # This may be cancelled at either await, also when the work is done: its result is then nobody's.
        watcher.cancel()
        task.cancel()
        task.add_done_callback(lambda done: None if done.cancelled() or done.exception() else discard(done.result()))
        raise


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from ``events``; ``close`` runs in the end, even if the first event was never asked for."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except ClientLeftError:
            return
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        """The head goes out together with the first event, one message less on its way, unless that takes long."""
        first = asyncio.ensure_future(anext(self._events))
        try:
            await asyncio.wait((first,), timeout=HEAD_AFTER_S)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": await first, "more_body": True})
        finally:
            first.cancel()
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(body: dict[str, Any]) -> bytes:
    """One ``data:`` event, safe for clients that take every Unicode line separator for the end of a line."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        text = text.translate(_SEPARATORS)
    return b"data: " + text.encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
