"""An OpenAI-compatible server that streams what a script says."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any


def chunk(text: str = "", finish: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


def usage(tokens: int) -> str:
    return "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})


class Server:
    """A server of one answer per prompt: ``script(prompt)`` gives the status and the lines; counts what is open."""

    def __init__(self, script: Callable[[str], tuple[int, Sequence[str]]]) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.open = 0
        self.most_open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection until the client closes it."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                self.headers.append(head)
                length = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")), 0)
                body = await reader.readexactly(length)
                if head.startswith("GET"):
                    self._plain(writer, json.dumps({"data": [{"id": "tiny"}]}))
                    continue
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                await self._stream(writer, json.loads(body))
                self.open -= 1
        writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.bodies.append(body)
        status, lines = self.script(body["messages"][0]["content"] if "messages" in body else body["prompt"])
        if status != 200:
            self._plain(writer, "{}", status)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for line in lines:
            await asyncio.sleep(0.004)
            data = f"{line}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        writer.write(b"0\r\n\r\n")

    @staticmethod
    def _plain(writer: asyncio.StreamWriter, text: str, status: int = 200) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
