"""What happens around the tokens: leaving clients, dead verifiers, metrics, headers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable

import grpc
import httpx
import pytest
from helpers.servers import Server

LONG = {"model": "tiny", "max_tokens": 1800, "temperature": 0, "ignore_eos": True}
TOTAL_BLOCKS = 2 * 65536 // 16


def eventually(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds until the condition held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"{what} took over {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - started


def running(server: Server) -> float:
    return sum(server.metrics("dspark_num_requests_running").values()) + sum(server.metrics("dspark_num_requests_waiting").values())


def free_blocks(server: Server) -> float:
    return sum(server.metrics("dspark_num_free_blocks").values())


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("header", [{}, {"x-request-disconnect-disabled": "?1"}], ids=["plain", "header"])
def test_a_client_that_leaves_frees_its_blocks_within_a_second(server: Server, stream: bool, header: dict[str, str]) -> None:
    eventually(lambda: running(server) == 0, 10, "quiet")
    with httpx.Client() as client:
        request = client.build_request(
            "POST", f"{server.url}/v1/completions", json=LONG | {"prompt": "a", "stream": stream}, headers=header
        )
        if stream:
            response = client.send(request, stream=True)
            next(response.iter_lines())
            response.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.send(_with_timeout(request, 0.3))
    eventually(lambda: running(server) == 0 and free_blocks(server) == TOTAL_BLOCKS, 1.5, "freeing blocks")
    assert server.metrics("dspark_in_flight") == {"": 0.0}


def _with_timeout(request: httpx.Request, seconds: float) -> httpx.Request:
    request.extensions["timeout"] = {"connect": 5.0, "read": seconds, "write": 5.0, "pool": 5.0}
    return request


def test_the_timeout_header_cuts_no_stream(server: Server) -> None:
    body = LONG | {"prompt": "b", "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, headers={"x-request-timeout-seconds": "0.2"}, timeout=60
    ) as response:
        assert response.status_code == 200
        started = time.monotonic()
        lines = [line for line in response.iter_lines() if line]
    assert time.monotonic() - started > 0.3, "too fast to tell"
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 1800


def stream_text(server: Server, prompt: str, into: dict[str, str], progress: Callable[[int], None] = lambda _: None) -> None:
    text = ""
    body = LONG | {"prompt": prompt, "stream": True, "speculation": "static:1"}  # many rounds: it must still run when a verifier dies
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        for number, line in enumerate(line for line in response.iter_lines() if line.startswith("data: {")):
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            progress(number)
    into[prompt] = text


def test_a_verifier_that_dies_mid_stream_changes_no_text(server: Server) -> None:
    prompts = ["first", "second", "third", "fourth"]
    expected: dict[str, str] = {}
    for prompt in prompts:
        stream_text(server, prompt, expected)
    before = server.metrics("dspark_replays_total")[""]
    for attempt in range(4):  # a verifier that no stream was on, or that ended too late for all of them, shows nothing
        eventually(lambda: len(server.verifiers()) == 2 and free_blocks(server) == TOTAL_BLOCKS, 60, "two verifiers")
        got: dict[str, str] = {}
        moving = threading.Barrier(len(prompts) + 1)

        def progress(number: int, moving: threading.Barrier = moving) -> None:
            if number == 20:
                moving.wait(30)

        threads = [threading.Thread(target=stream_text, args=(server, prompt, got, progress)) for prompt in prompts]
        for thread in threads:
            thread.start()
        moving.wait(30)  # all streams are on their way
        os.kill(server.verifiers()[attempt % 2], signal.SIGKILL)
        for thread in threads:
            thread.join(120)
        assert got == expected
        if server.metrics("dspark_replays_total")[""] > before:
            break
    assert server.metrics("dspark_replays_total")[""] > before
    eventually(lambda: len(server.verifiers()) == 2 and free_blocks(server) == TOTAL_BLOCKS, 60, "two verifiers")


def test_nothing_leaks_when_many_clients_leave(server: Server) -> None:
    async def one(client: httpx.AsyncClient, index: int) -> None:
        body = LONG | {"prompt": f"client {index}", "stream": index % 3 != 0, "n": 1 + index % 2, "max_tokens": 400}
        patience_s = (0.02, 0.1, 0.3, 30.0)[index % 4]
        try:
            async with asyncio.timeout(patience_s), client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                assert response.status_code == 200
                async for _ in response.aiter_bytes():
                    pass
        except TimeoutError:
            assert patience_s < 1

    async def test() -> None:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=100)) as client:
            await asyncio.gather(*(one(client, i) for i in range(40)))

    asyncio.run(test())
    eventually(lambda: running(server) == 0 and free_blocks(server) == TOTAL_BLOCKS, 3, "freeing everything")
    assert server.metrics("dspark_in_flight") == {"": 0.0}


def test_responses_of_many_megabytes_arrive(server: Server) -> None:
    more = {"n": 8, "max_tokens": 600, "logprobs": True, "top_logprobs": 20, "seed": 1, "temperature": 1.0, "speculation": "off"}
    response = server.post("/v1/chat/completions", LONG | more | {"messages": [{"role": "user", "content": "big"}]})
    assert response.status_code == 200
    assert len(response.content) > 4 * 2**20, "over the limit that Serve has for a message by default"
    assert [len(choice["logprobs"]["content"]) for choice in response.json()["choices"]] == [600] * 8


def test_nothing_is_open_to_the_network(server: Server) -> None:
    """All ports are on the loopback interface, but those that Serve opens for its replicas: they want Ray's token."""
    ports = server.listening()
    assert ("127.0.0.1", server.port) in {(address, port) for address, port, _ in ports}
    outside = [(port, command) for address, port, command in ports if not address.startswith("127.")]
    for port, command in outside:
        assert "ServeReplica" in command
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_metrics_and_docs(server: Server) -> None:
    server.post("/v1/completions", {"model": "tiny", "prompt": "m", "max_tokens": 4}).raise_for_status()
    for name in ("vllm:time_to_first_token_seconds_count", "vllm:e2e_request_latency_seconds_count", "vllm:prompt_tokens_total"):
        assert server.metrics(name)[""] > 0
    assert len(server.metrics("vllm:num_requests_running")) == 2
    assert httpx.get(f"{server.url}/docs").status_code == 200
    assert "/v1/chat/completions" in httpx.get(f"{server.url}/openapi.json").json()["paths"]
