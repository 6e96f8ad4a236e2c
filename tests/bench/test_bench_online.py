"""The load generator against a scripted server: what it sends, what it counts, what it calls an error."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from dspark.bench.http_client import Ask, StreamFailure, read_stream, send
from dspark.bench.metrics import Limits
from dspark.bench.online import Load, OnlinePlan, connect, reported_acceptance, run_load, run_online, summarize_answers
from dspark.errors import ConfigError

ASK = Ask(model="tiny", max_tokens=8)


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
        with contextlib.suppress(asyncio.IncompleteReadError):
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


def with_server(server: Server, use: Callable[[str], Coroutine[Any, Any, Any]]) -> Any:
    """Run ``use(url)`` while the server answers."""

    async def main() -> Any:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        async with listener:
            return await use(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")

    return asyncio.run(main())


def good(prompt: str) -> tuple[int, Sequence[str]]:
    return 200, [chunk(), chunk("a"), chunk("b"), chunk("c", "stop"), usage(7), "data: [DONE]"]


async def lines_of(*lines: str) -> AsyncIterator[str]:
    for line in lines:
        yield line


def test_stream_counts_text_chunks_and_usage_tokens() -> None:
    lines = lines_of(": ping", "", chunk(), chunk("a"), chunk("b"), chunk("", "length"), usage(5), "data: [DONE]")
    answer = asyncio.run(read_stream(lines, 0.0))
    assert answer.timeline is not None
    assert (len(answer.timeline.chunk_s), answer.timeline.num_tokens) == (2, 5)
    assert reported_acceptance([answer]) is None


def test_stream_of_completions_and_of_an_empty_answer() -> None:
    text = "data: " + json.dumps({"choices": [{"text": "x", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}})
    whole = asyncio.run(read_stream(lines_of(text, "data: [DONE]"), 0.0)).timeline
    empty = asyncio.run(read_stream(lines_of(chunk("", "stop"), usage(0), "data: [DONE]"), 0.0)).timeline
    assert whole is not None
    assert empty is not None
    assert (len(whole.chunk_s), len(empty.chunk_s), empty.num_tokens) == (1, 1, 1)


def test_acceptance_is_what_the_server_reports() -> None:
    def told(steps: int, accepted: int) -> str:
        block = {"num_spec_steps": steps, "num_accepted_draft_tokens": accepted}
        return "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 3}, "metrics": {"speculative_decoding": block}})

    answers = [asyncio.run(read_stream(lines_of(chunk("a", "stop"), told(*one), "data: [DONE]"), 0.0)) for one in ((2, 5), (0, 0), (2, 1))]
    assert reported_acceptance(answers) == 2.5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([chunk("a", "stop"), usage(1)], "without \\[DONE\\]"),
        ([chunk("a"), usage(1), "data: [DONE]"], "no finish_reason"),
        ([chunk("a", "stop"), "data: [DONE]"], "no usage"),
        (["data: {", "data: [DONE]"], "not JSON"),
        (["data: [1]", "data: [DONE]"], "not a JSON object"),
        ([chunk("a"), 'data: {"error": {"message": "worker lost"}}', "data: [DONE]"], "worker lost"),
    ],
)
def test_broken_streams_are_errors(lines: list[str], message: str) -> None:
    with pytest.raises(StreamFailure, match=message):
        asyncio.run(read_stream(lines_of(*lines), 0.0))


def test_concurrency_is_kept_and_errors_are_counted() -> None:
    def script(prompt: str) -> tuple[int, Sequence[str]]:
        if prompt == "busy":
            return 503, ()
        return (200, [chunk("a")]) if prompt == "cut" else good(prompt)

    server = Server(script)

    async def use(url: str) -> Any:
        async with connect(url, "secret", 10.0) as client:
            return await run_load(client, ASK, ["x", "busy", "x", "cut", "x", "x", "x"], Load(concurrency=3), seed=0)

    answers, seconds = with_server(server, use)
    summary, errors = summarize_answers(answers, seconds, Limits())
    assert (server.most_open, summary.requests, summary.errors, summary.output_tokens) == (3, 7, 2, 35)
    assert errors == {"HTTP 503": 1, "the stream ended without [DONE]": 1}
    assert summary.tokens_per_chunk == 2.333
    assert summary.ttft_ms.p50 is not None
    assert 4 <= summary.ttft_ms.p50 < 2000
    assert "authorization: bearer secret" in server.headers[0].lower()
    assert server.bodies[0] == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 8,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_rate_does_not_wait_for_answers() -> None:
    server = Server(good)

    async def use(url: str) -> Any:
        async with connect(url, None, 10.0) as client:
            return await run_load(client, ASK, ["x"] * 30, Load(rate_per_s=1000.0), seed=3)

    answers, _ = with_server(server, use)
    assert all(answer.error is None for answer in answers)
    assert server.most_open > 5


def test_an_unreachable_server_is_an_error_not_an_exception() -> None:
    async def use() -> Any:
        async with connect("http://127.0.0.1:9", None, 5.0) as client:
            return await send(client, ASK, "x")

    answer = asyncio.run(use())
    assert answer.timeline is None
    assert answer.error


def plan_for(url: str, folder: Path, loads: tuple[Load, ...]) -> OnlinePlan:
    return OnlinePlan(url, Ask("", 8, is_chat=False), None, folder, ("mine",), loads, None, Limits(ttft_ms=1e6), 0, 10.0)


def test_run_online_writes_rows_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.jsonl").write_text('{"turns": ["hello"]}\n')
    out = tmp_path / "out.jsonl"
    server = Server(lambda prompt: (200, [json_text("a"), json_text("b", "stop"), usage(4), "data: [DONE]"]))

    async def use(url: str) -> int:
        with out.open("w") as file:
            return await run_online(plan_for(url, tmp_path, (Load(concurrency=1), Load(concurrency=2))), file)

    assert with_server(server, use) == 0
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert (first["model"], first["prompt_set"], first["concurrency"], first["requests"]) == ("tiny", "mine", 1, 8)
    assert (second["concurrency"], second["requests"], second["output_tokens"], second["tokens_per_chunk"]) == (2, 8, 32, 2.0)
    assert first["goodput_share"] == 1.0
    assert {"ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "itl_p50_ms", "machine", "commit", "errors"} <= set(first)
    assert server.bodies[-1]["prompt"] == "hello"
    assert "c=2" in capsys.readouterr().out


def json_text(text: str, finish: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"text": text, "finish_reason": finish}]})


def test_run_online_refuses_what_is_no_server(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"turns": ["hello"]}\n')
    with pytest.raises(ConfigError, match="is it the right --url"):
        asyncio.run(run_online(plan_for("http://127.0.0.1:9", tmp_path, (Load(concurrency=1),)), None))


def test_default_numbers_of_requests() -> None:
    assert [Load(concurrency=c).default_requests() for c in (1, 2, 16)] == [8, 8, 64]
    assert [Load(rate_per_s=r).default_requests() for r in (0.1, 2.0)] == [8, 60]
