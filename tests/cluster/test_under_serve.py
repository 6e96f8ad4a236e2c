"""Under Ray Serve: nothing cuts a running stream before its limit, and overload is decided by us."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from helpers.scripted import continuation
from helpers.servers import free_port
from helpers.tiny_model import save_tiny_model
from helpers.toy_tokenizers import byte_level
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from dspark.cluster.app import APP_NAME, QUIET
from dspark.cluster.local_ray import RAY_DEFAULTS

PROMPTS = ["a", "b", "c", "d"]
TOKENS = 300


class Cluster:
    """A local Ray with Serve in it; ``deploy`` does what ``serve deploy`` does with a file."""

    def __init__(self, model: Path) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._args = {"engine": {"model": str(model), "max_num_seqs": 8}, "move_kv": False}
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", object_store_memory=2**27)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=QUIET)

    def deploy(self, num_verifiers: int, **args: Any) -> None:
        """Returns when that many verifiers, and no others, serve."""
        application = {
            "name": APP_NAME,
            "route_prefix": "/",
            "import_path": "helpers.scripted_cluster:build",
            "args": self._args | args,
            "deployments": [{"name": "Verifier", "num_replicas": num_verifiers}],
        }
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]), _blocking=True)
        deadline = time.monotonic() + 40
        while self.get("/health") != {"status": "ok", "verifiers": num_verifiers, "healthy": num_verifiers}:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def get(self, path: str) -> Any:
        response = httpx.get(self.url + path)
        return response.json() if "json" in response.headers.get("content-type", "") else response.text

    def counter(self, name: str) -> float:
        lines = self.get("/metrics").splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    for name, value in RAY_DEFAULTS.items():
        patch.setenv(name, value)
    try:
        yield Cluster(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))
    finally:
        serve.shutdown()
        ray.shutdown()
        patch.undo()


class Streams:
    """One long stream a prompt, running while a test does something to the cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.texts: dict[str, str] = {}
        self._url = f"{cluster.url}/v1/completions"
        self._moving = threading.Barrier(len(PROMPTS) + 1)
        self._threads = [threading.Thread(target=self._read, args=(prompt,)) for prompt in PROMPTS]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()
        self._moving.wait(20)

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(60)
        tokenizer = byte_level()
        expected = {prompt: tokenizer.decode(continuation(tokenizer(prompt)["input_ids"], TOKENS)) for prompt in PROMPTS}
        assert self.texts == expected

    def _read(self, prompt: str) -> None:
        text = ""
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        with httpx.stream("POST", self._url, json=body, timeout=60) as response:
            for number, line in enumerate(line for line in response.iter_lines() if line.startswith("data: {")):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if number == 10:
                    self._moving.wait(20)
        self.texts[prompt] = text


def test_scaling_down_lets_streams_finish_where_they_are(cluster: Cluster) -> None:
    cluster.deploy(2, drain_s=30)
    with Streams(cluster):
        cluster.deploy(1, drain_s=30)
    assert cluster.counter("dspark_replays_total") == 0


def test_redeploying_everything_lets_streams_finish(cluster: Cluster) -> None:
    cluster.deploy(1, drain_s=30)
    with Streams(cluster):
        cluster.deploy(1, drain_s=29)


def test_a_drain_ends_at_its_limit_and_streams_go_on_elsewhere(cluster: Cluster) -> None:
    for _ in range(4):  # until one of the streams was on the verifier that goes
        cluster.deploy(2, drain_s=0.5)
        with Streams(cluster):
            cluster.deploy(1, drain_s=0.5)
        if cluster.counter("dspark_replays_total"):
            return
    pytest.fail("no stream was ever on the verifier that went")


def test_metrics_are_the_sum_of_all_routers(cluster: Cluster) -> None:
    cluster.deploy(1, drain_s=1, num_routers=2)
    assert cluster.counter("dspark_prompt_tokens_total") == 0
    for _ in range(12):
        body = {"prompt": "x", "max_tokens": 1}
        httpx.post(f"{cluster.url}/v1/completions", json=body).raise_for_status()
    assert {cluster.counter("dspark_prompt_tokens_total") for _ in range(8)} == {12.0}, "whichever router answers"


def test_overload_is_refused_by_our_admission_exactly(cluster: Cluster) -> None:
    """The scripted verifier runs 8 requests and queues 8; Serve itself must neither drop nor hold any."""
    cluster.deploy(1, drain_s=1, num_routers=2)

    async def one(client: httpx.AsyncClient, index: int) -> httpx.Response:
        return await client.post(f"{cluster.url}/v1/completions", json={"prompt": "x", "max_tokens": 250})

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=100)) as client:
            return await asyncio.gather(*(one(client, i) for i in range(40)))

    responses = asyncio.run(burst())
    assert sorted(response.status_code for response in responses) == [200] * 16 + [503] * 24
    for response in responses:
        if response.status_code == 503:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "overloaded"
