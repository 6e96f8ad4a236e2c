"""Real load on a draft worker without room for it: one becomes two and one again, Serve does it, and no text changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from helpers.servers import Server, served
from helpers.tiny_model import save_tiny_drafter, save_tiny_model

pytestmark = pytest.mark.slow

PROMPTS = [f"prompt {i}" for i in range(8)]
BODY = {"model": "tiny", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
SETTINGS = [
    *("--topology", "disaggregated", "--draft-workers", "1", "--max-draft-workers", "2", "--dtype", "float32", "--no-profile"),
    *("--speculation", "static:4", "--threads", "1", "--kv-tokens", "16384", "--draft-kv-tokens", "1024", "--drain-s", "20"),
    *("--scaling-window-s", "10", "--up-cooldown-s", "3", "--down-cooldown-s", "8"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_drafter(save_tiny_model(folder / "tiny", max_len=1024), folder / "draft")
    with served(folder / "log", str(folder / "tiny"), "--drafter", str(folder / "draft"), *SETTINGS) as running:
        yield running


def complete(server: Server, prompt: str, **more: object) -> str:
    response = server.post("/v1/completions", BODY | {"prompt": prompt} | more)
    return str(response.json()["choices"][0]["text"]) if response.status_code == 200 else response.text


def ready_workers(server: Server) -> int:
    return sum(worker["state"] == "ready" for worker in httpx.get(f"{server.url}/status").json()["draft_workers"])


def wait_for_workers(server: Server, count: int, timeout_s: float) -> float:
    started = time.monotonic()
    while ready_workers(server) != count:
        assert time.monotonic() - started < timeout_s, httpx.get(f"{server.url}/status").text
        time.sleep(0.2)
    return time.monotonic() - started


def test_draft_workers_follow_the_load(server: Server) -> None:
    expected = {prompt: complete(server, prompt, speculation="off") for prompt in PROMPTS}
    assert complete(server, PROMPTS[0]) == expected[PROMPTS[0]]
    time.sleep(6)
    assert ready_workers(server) == 1, "one request needs one draft worker"
    stop, faults, num_answers = threading.Event(), [], 0

    def client(prompt: str) -> None:
        nonlocal num_answers
        while not stop.is_set():
            if (text := complete(server, prompt)) != expected[prompt]:
                faults.append(f"{prompt}: {text[:200]}")
            num_answers += 1

    clients = [threading.Thread(target=client, args=(prompt,)) for prompt in PROMPTS]
    for thread in clients:
        thread.start()
    try:
        up_s = wait_for_workers(server, 2, 90)
        deadline = time.monotonic() + 30
        while (works := server.metrics("dspark_draft_workers_usable")) and max(works.values()) < 2:
            assert time.monotonic() < deadline, "the verifier finds the second worker"
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in clients:
            thread.join(60)
    down_s = wait_for_workers(server, 1, 90)
    print(f"\na second draft worker after {up_s:.0f} s of load, gone {down_s:.0f} s after its end; {num_answers} requests")
    assert not faults
    assert num_answers >= len(PROMPTS)
    assert complete(server, PROMPTS[1]) == expected[PROMPTS[1]]
