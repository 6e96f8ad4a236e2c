"""The load generator against a scripted server: what it sends, what it counts, what it calls an error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.scripted_streams import Server, chunk, usage

from dspark.bench.http_client import Ask, StreamFailure, read_stream, send
from dspark.bench.load import Load, Measured, connect, run_load
from dspark.bench.metrics import Limits
from dspark.bench.online import OnlinePlan, run_online
from dspark.bench.traffic import Job, ServiceClass
from dspark.errors import ConfigError

ASK = Ask(model="tiny", max_tokens=8)
JOB = Job(ASK, "x")


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
    assert Measured((JOB,), (answer,), 1.0).acceptance is None


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
    assert Measured((JOB,) * 3, tuple(answers), 1.0).acceptance == 2.5


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
            jobs = [Job(ASK, prompt) for prompt in ("x", "busy", "x", "cut", "x", "x", "x")]
            return await run_load(client, jobs, Load(concurrency=3), seed=0)

    measured = with_server(server, use)
    summary, errors = measured.summary(), measured.errors
    assert [answer.error is None for answer in measured.answers] == [True, False, True, False, True, True, True]
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
            return await run_load(client, [JOB] * 30, Load(rate_per_s=1000.0), seed=3)

    assert not with_server(server, use).errors
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


def test_classes_are_sent_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mix of sets; each request carries its class and budget, unless told not to, and is held against them either way."""
    (tmp_path / "mine.jsonl").write_text('{"turns": ["hello"]}\n')
    (tmp_path / "yours.jsonl").write_text('{"turns": ["good bye"]}\n')
    out = tmp_path / "out.jsonl"
    classes = (ServiceClass("fast", Limits(ttft_ms=0.001), 1.0), ServiceClass("slow", Limits(ttft_ms=1e6, tpot_ms=1e6), 3.0))
    server = Server(good)

    async def use(url: str) -> int:
        with out.open("w") as file:
            for tells in (True, False):
                plan = OnlinePlan(
                    url, ASK, None, tmp_path, ("mine", "yours"), (Load(rate_per_s=500.0),), 40, Limits(), 1, 10.0, True, classes, tells
                )
                await run_online(plan, file)
        return 0

    with_server(server, use)
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    told, untold = server.bodies[1:41], server.bodies[42:]
    assert {body["messages"][0]["content"] for body in told} == {"hello", "good bye"}
    expected = {"fast": {"ttft_ms": 0.001}, "slow": {"ttft_ms": 1e6, "tpot_ms": 1e6}}
    assert all(body["latency_budget"] == expected[body["service_class"]] for body in told)
    assert not any("latency_budget" in body or "service_class" in body for body in untold)
    assert (first["prompt_set"], first["tells_budgets"], second["tells_budgets"]) == ("mine+yours", True, False)
    for record in (first, second):
        fast, slow = record["classes"]["fast"], record["classes"]["slow"]
        assert 0 < fast["requests"] < slow["requests"] == 40 - fast["requests"]
        assert (fast["goodput_share"], slow["goodput_share"]) == (0.0, 1.0)
        assert record["goodput_share"] == pytest.approx(slow["requests"] / 40)
        assert slow["limits"] == {"ttft_ms": 1e6, "tpot_ms": 1e6}
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("mine+yours", "  fast", "  slow"))]
    assert [row.split()[0] for row in rows] == ["mine+yours", "fast", "slow"] * 2
