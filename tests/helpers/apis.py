"""The HTTP API around scripted verifiers, without Ray, without a model and without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from helpers.fleets import Hosts, serving
from helpers.scripted import ScriptedHost
from helpers.tiny_model import TEMPLATE
from helpers.toy_tokenizers import byte_level

from dspark.cluster.dispatch import Dispatcher
from dspark.cluster.http.app import HttpOptions, make_app
from dspark.cluster.http.service import Service
from dspark.router.classes import Classes

NO_CLASSES = Classes({})
TOKENIZER = byte_level()
TOKENIZER.chat_template = TEMPLATE
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7, "temperature": 0}


class Setup:
    """An application, a client for it, and the verifiers behind it."""

    def __init__(self, hosts: Hosts, dispatcher: Dispatcher, options: HttpOptions, classes: Classes) -> None:
        self.hosts = hosts
        self.dispatcher = dispatcher
        self.service = Service(dispatcher, TOKENIZER, "tiny", "dspark-x", 512, classes)
        self.app = make_app(self.service, options)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url="http://test")

    async def post(self, path: str, body: dict[str, Any], **more: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **more)

    async def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream; the last must be [DONE]."""
        response = await self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@asynccontextmanager
async def api(*hosts: ScriptedHost, classes: Classes = NO_CLASSES, **options: Any) -> AsyncIterator[Setup]:
    hosting = Hosts()
    for index, host in enumerate(hosts or (ScriptedHost(vocab=1000),)):
        hosting.add(f"v{index}", host)
    async with serving(hosting, replay_wait_s=0.3) as dispatcher:
        setup = Setup(hosting, dispatcher, HttpOptions(**({"max_body_bytes": 10_000} | options)), classes)
        async with setup.client:
            yield setup


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())
