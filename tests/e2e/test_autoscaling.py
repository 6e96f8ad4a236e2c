"""A real load step on real verifiers: one becomes two and one again, Serve does it, and no request notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from helpers.servers import ROOT, Server, served
from helpers.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

BODY = {"model": "tiny", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
PROMPTS = [f"prompt {i}" for i in range(12)]
SCALING = [
    *("--max-verifiers", "2", "--num-verifiers", "1", "--default-ttft-ms", "150", "--default-tpot-ms", "1000"),
    *("--scaling-window-s", "10", "--scaling-min-samples", "5", "--up-cooldown-s", "3", "--down-cooldown-s", "8", "--cold-start-s", "2"),
]


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_len=2048)
    settings = ["--dtype", "float32", "--drafter", "ngram", "--kv-tokens", "32768", "--max-num-seqs", "2", "--drain-s", "60"]
    with served(tmp_path_factory.mktemp("server") / "log", str(folder), *settings, *SCALING) as running:
        yield running


class Load:
    """Clients that send one request after the other; what comes back must be what an idle server said."""

    def __init__(self, server: Server, expected: dict[str, str], clients: int, pause_s: float = 0.0) -> None:
        self.server, self.expected = server, expected
        self.num_answers = 0
        self.faults: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i, pause_s)) for i in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, number: int, pause_s: float) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.wait(pause_s):
                prompt = PROMPTS[number % len(PROMPTS)]
                try:
                    response = client.post(f"{self.server.url}/v1/completions", json=BODY | {"prompt": prompt})
                    text = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
                except httpx.HTTPError as error:
                    text = repr(error)
                if text != self.expected[prompt]:
                    self.faults.append(f"{prompt}: {text[:200]}")
                self.num_answers += 1


def healthy(server: Server) -> int:
    return int(httpx.get(f"{server.url}/health").json()["healthy"])


def eventually(condition: Callable[[], bool], timeout_s: float, server: Server, what: str) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"{what}: {json.dumps(httpx.get(f'{server.url}/status').json(), indent=1)}"
        time.sleep(0.1)
    return time.monotonic() - started


def dspark_status(server: Server, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dspark", "status", "--port", str(server.port), *flags],
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def works_everywhere(server: Server) -> bool:
    rounds = server.metrics("dspark_rounds_total").values()
    return len(rounds) == 2 and min(rounds) > 0


def test_a_load_step_scales_up_and_down_and_loses_nothing(scaled: Server) -> None:
    expected = {p: scaled.post("/v1/completions", BODY | {"prompt": p}).json()["choices"][0]["text"] for p in PROMPTS}
    with Load(scaled, expected, clients=1, pause_s=0.5) as quiet:
        time.sleep(8)
        assert healthy(scaled) == 1, "one client needs one verifier"
        with Load(scaled, expected, clients=8) as burst:
            up_s = eventually(lambda: healthy(scaled) == 2, 90, scaled, "a second verifier")
            eventually(lambda: works_everywhere(scaled), 30, scaled, "its work")
            assert "2 verifiers wanted" in dspark_status(scaled)
            assert len(json.loads(dspark_status(scaled, "--json"))["verifiers"]) == 2
            eventually(lambda: any(x.endswith(" 2.0") for x in scaled.ray_metrics("ray_dspark_verifiers{")), 40, scaled, "Ray's metrics")
        down_s = eventually(lambda: len(httpx.get(f"{scaled.url}/status").json()["verifiers"]) == 1, 120, scaled, "one verifier again")
        time.sleep(5)
        assert healthy(scaled) == 1
    print(f"\nup after {up_s:.0f} s of load, down after {down_s:.0f} s without; {burst.num_answers + quiet.num_answers} requests")
    assert burst.faults + quiet.faults == []
    assert burst.num_answers > 20
    assert quiet.num_answers > 20
