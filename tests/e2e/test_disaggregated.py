"""``dspark serve --topology disaggregated``: OpenAI's client gets its text, whatever becomes of the draft workers."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from helpers.draft_workers import eventually
from helpers.servers import ROOT, Server, served
from helpers.tiny_model import save_tiny_drafter, save_tiny_model

from dspark.status import CLEAR, INACTIVE, PLAIN, RED

pytestmark = pytest.mark.slow

SETTINGS = ["--dtype", "float32", "--kv-tokens", "8192", "--no-profile", "--speculation", "static:4", "--threads", "1"]


@pytest.fixture(scope="module")
def disaggregated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_drafter(save_tiny_model(folder / "tiny", max_len=2048), folder / "draft")
    topology = ["--topology", "disaggregated", "--verifiers", "2", "--draft-workers", "1", "--draft-kv-tokens", "8192"]
    settings = [*topology, *SETTINGS, "--drain-s", "20", "--dashboard"]
    with served(folder / "log", str(folder / "tiny"), "--drafter", str(folder / "draft"), *settings) as running:
        yield running


def complete(server: Server, prompt: str, **more: object) -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 300, "temperature": 0.0, "extra_body": {"ignore_eos": True}} | more
    return "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **body))  # type: ignore[call-overload]


def plain(server: Server, prompt: str) -> str:
    return complete(server, prompt, extra_body={"ignore_eos": True, "speculation": "off"})


def draft_workers(server: Server) -> list[int]:
    return [pid for pid, command in server.processes().items() if "ServeReplica:dspark:DraftWorker" in command]


def total(server: Server, name: str) -> float:
    return sum(server.metrics(name).values())


def test_drafts_come_from_the_draft_worker(disaggregated: Server) -> None:
    prompts = [f"request {i}" for i in range(6)]
    assert [complete(disaggregated, prompt) for prompt in prompts] == [plain(disaggregated, prompt) for prompt in prompts]
    assert disaggregated.metrics("dspark_draft_workers") == dict.fromkeys(disaggregated.metrics("dspark_draft_workers"), 1.0)
    eventually(lambda: total(disaggregated, "dspark_draft_trees_total") > 6 * 200, "telling of drafts", 5)
    assert total(disaggregated, "dspark_draft_bytes_sent_total") > 0
    (worker,) = httpx.get(f"{disaggregated.url}/status").json()["draft_workers"]
    assert (worker["state"], worker["verifiers"], worker["blocks"]) == ("ready", 2, 512)
    assert "draft workers: context of 8192 tokens, float32 on cpu (1 x this)" in disaggregated.log.read_text()


def test_text_goes_on_when_the_draft_worker_is_killed(disaggregated: Server) -> None:
    expected = plain(disaggregated, "killed")
    (worker,) = draft_workers(disaggregated)
    text, client = "", openai.OpenAI(base_url=f"{disaggregated.url}/v1", api_key="none")
    stream = client.completions.create(
        model="tiny", prompt="killed", max_tokens=300, temperature=0.0, extra_body={"ignore_eos": True}, stream=True
    )
    for number, chunk in enumerate(stream):
        text += chunk.choices[0].text
        if number == 20:
            os.kill(worker, signal.SIGKILL)
    assert text == expected
    assert httpx.get(f"{disaggregated.url}/health").status_code == 200
    eventually(lambda: draft_workers(disaggregated) not in ([], [worker]), "Serve's replacing the draft worker", 60)
    eventually(lambda: set(disaggregated.metrics("dspark_draft_workers").values()) == {1.0}, "finding it", 60)
    before, expected = total(disaggregated, "dspark_draft_trees_total"), plain(disaggregated, "after")

    def drafts_again() -> bool:
        assert complete(disaggregated, "after") == expected
        return total(disaggregated, "dspark_draft_trees_total") > before + 200

    eventually(drafts_again, "drafting again", 60)
    assert total(disaggregated, "dspark_replays_total") == 0


class Terminal:
    """``dspark status`` as it looks on a terminal."""

    def __init__(self, server: Server, *flags: str) -> None:
        self._end, other = pty.openpty()
        command = [sys.executable, "-m", "dspark", "status", "--port", str(server.port), *flags]
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=other, stderr=subprocess.STDOUT)
        os.close(other)
        self.text = ""

    def read_until(self, condition: Callable[[str], bool], timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(self.text):
            assert time.monotonic() < deadline, self.text
            if select.select([self._end], [], [], 0.1)[0]:
                self.text += os.read(self._end, 65536).decode()

    def close(self, number: int = 0) -> int:
        """Wait for its end, after a signal if one is given; the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(20)
        os.close(self._end)
        return status


def test_the_status_is_red_while_drafts_are_wanted_and_none_come(disaggregated: Server) -> None:
    expected = plain(disaggregated, "red")
    (worker,) = draft_workers(disaggregated)
    os.kill(worker, signal.SIGSTOP)  # Serve will replace it, in half a minute
    try:
        assert complete(disaggregated, "red") == expected
        once = Terminal(disaggregated)
        once.read_until(lambda text: "busy" in text)
        assert f"{RED}{INACTIVE}{PLAIN}" in once.text
        assert once.close() == 0
        watching = Terminal(disaggregated, "--watch", "--interval", "0.5")
        watching.read_until(lambda text: text.count(f"{RED}{INACTIVE}{PLAIN}") > 1 and text.count(CLEAR) > 1)
    finally:
        os.kill(worker, signal.SIGCONT)
    # whichever verifier a request goes to: the one that missed its drafts has to get one to be active again
    eventually(lambda: complete(disaggregated, "red") == expected and are_active(disaggregated), "drafting again", 90)
    screens = watching.text.count(CLEAR)
    watching.read_until(lambda text: text.count(CLEAR) > screens + 1 and INACTIVE not in text.split(CLEAR)[-2])
    assert watching.close(signal.SIGINT) == 130


def are_active(server: Server) -> bool:
    states = [verifier["speculation"]["state"] for verifier in httpx.get(f"{server.url}/status").json()["verifiers"]]
    return "active" in states and "inactive" not in states and len(states) == 2


def test_the_ray_dashboard_shows_deployments_replicas_and_our_metrics(disaggregated: Server) -> None:
    deployments = disaggregated.dashboard("/api/serve/applications/")["applications"]["dspark"]["deployments"]
    counts = {name: [replica["state"] for replica in found["replicas"]] for name, found in deployments.items()}
    assert counts == {"Router": ["RUNNING"], "Verifier": ["RUNNING"] * 2, "DraftWorker": ["RUNNING"]}
    for name in ("ray_dspark_verifiers{", "ray_dspark_requests_running{", "ray_dspark_speculation_inactive{"):
        eventually(lambda name=name: bool(disaggregated.ray_metrics(name)), name, 40)  # type: ignore[misc]
    assert any(line.endswith(" 2.0") for line in disaggregated.ray_metrics("ray_dspark_verifiers{"))


def test_nothing_is_left_at_the_workers(disaggregated: Server) -> None:
    eventually(lambda: total(disaggregated, "dspark_num_free_blocks") == total(disaggregated, "dspark_num_blocks"), "freeing blocks", 10)
