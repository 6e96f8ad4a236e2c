"""Parallel verifiers under Ray Serve: their text, the end of a rank under running streams, and what is left afterwards."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from helpers.servers import Server, served
from helpers.tiny_model import save_tiny_model

from dspark import LLM, SamplingParams

pytestmark = pytest.mark.slow

PROMPTS = ["first", "second", "third", "fourth"]
TOKENS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_len=1024)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    settings = ["--dtype", "float32", "--drafter", "ngram", "--kv-tokens", "16384", "--no-profile", "--num-verifiers", "2", "-tp", "2"]
    with served(folder.parent / "log", str(folder), *settings, "--drain-s", "30") as running:
        yield running


def ranks(server: Server) -> list[int]:
    """Process ids of the ranks that are no replicas."""
    return [pid for pid, command in server.processes().items() if command.startswith("ray::Rank")]


def stream(server: Server, prompt: str, into: dict[str, str], moving: threading.Barrier) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    text = ""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        for number, line in enumerate(line for line in response.iter_lines() if line.startswith("data: {")):
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            if number == 10:
                moving.wait(60)
    into[prompt] = text


def test_a_rank_that_dies_mid_stream_changes_no_text(server: Server, folder: Path) -> None:
    with LLM(str(folder), dtype="float32", speculation="off") as llm:
        outs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True))
    expected = {prompt: out.text for prompt, out in zip(PROMPTS, outs, strict=True)}
    assert len(server.verifiers()) == len(ranks(server)) == 2
    got: dict[str, str] = {}
    moving = threading.Barrier(len(PROMPTS) + 1)
    threads = [threading.Thread(target=stream, args=(server, prompt, got, moving)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    moving.wait(60)
    os.kill(ranks(server)[0], signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    assert got == expected
    assert server.metrics("dspark_replays_total")[""] > 0
    deadline = time.monotonic() + 90
    while httpx.get(f"{server.url}/health").json()["healthy"] < 2:
        assert time.monotonic() < deadline, "the replica was not replaced"
        time.sleep(0.1)
    assert len(ranks(server)) == 2


def test_ranks_open_no_port_to_the_network(server: Server) -> None:
    ports = server.listening()
    assert any("ray::Rank" in command for _, _, command in ports)
    assert not [(port, command) for address, port, command in ports if not address.startswith("127.") and "ServeReplica" not in command]
