"""Draft workers as real processes under an engine in this one: killed, stopped and started again, no text changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.draft_workers import eventually
from helpers.servers import ROOT, free_port
from helpers.tiny_model import save_tiny_drafter, save_tiny_model

from dspark import LLM, SamplingParams
from dspark.errors import ConfigError

TOKEN = "secret"
PROMPTS = ["first", "second", "a third one", "the last"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=5, max_tokens=200, ignore_eos=True)
START_S = 60.0


class Process:
    """A ``dspark draft-worker`` on a port that stays its own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._folder = folder
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "dspark", "draft-worker", str(self._folder / "tiny"), "--drafter", str(self._folder / "draft")]
        settings = ["--listen", self.address, "--dtype", "float32", "--threads", "1", "--draft-kv-tokens", "4096"]
        self.log = (self._folder / f"{self.port}.log").open("w+")
        environment = os.environ | {"DSPARK_DRAFT_TOKEN": TOKEN}
        self.process = subprocess.Popen([*command, *settings], cwd=ROOT, env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        eventually(lambda: f"draft worker ready in {self._seconds()} s: {self.address}" in self.text, self.text, START_S)

    def _seconds(self) -> str:
        return self.text.partition("ready in ")[2].partition(" s:")[0]

    @property
    def text(self) -> str:
        return Path(self.log.name).read_text()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_drafter(save_tiny_model(folder / "tiny"), folder / "draft")
    return folder


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[list[Process]]:
    started = [Process(folder) for _ in range(2)]
    for worker in started:
        worker.wait()
    yield started
    assert [worker.end() for worker in started] == [0, 0], "a signal ends a worker in order"


@pytest.fixture(scope="module")
def llm(folder: Path, workers: list[Process]) -> Iterator[LLM]:
    settings = {"model": str(folder / "tiny"), "drafter": str(folder / "draft"), "speculation": "static:4", "dtype": "float32"}
    with LLM.with_draft_workers([w.address for w in workers], TOKEN, **settings, threads=1, kv_tokens=4096, profile=False) as opened:
        yield opened
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("draft-worker-")], "the streams' end", 10)


def texts(llm: LLM, params: SamplingParams, speculation: str | None = None) -> list[tuple[int, ...]]:
    return [output.token_ids for output in llm.generate(PROMPTS, params, speculation=speculation)]


@pytest.mark.slow
def test_drafts_come_from_the_workers(llm: LLM) -> None:
    before = llm.stats()
    for params in (GREEDY, SEEDED):
        assert texts(llm, params) == texts(llm, params, "off")
    grown = {name: value - before.get(name, 0.0) for name, value in llm.stats().items()}
    assert llm.stats()["draft_workers"] == 2
    assert grown["drafted_rounds_total"] > 0.9 * (2 * len(PROMPTS) * 195)
    assert grown["draft_bytes_sent_total"] > grown["draft_positions_sent_total"] * 64 * 4, "features in fp32"
    assert grown["draft_misses_total"] < 10


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SEEDED])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_are_killed_and_stopped_mid_stream(
    llm: LLM, workers: list[Process], params: SamplingParams, number: signal.Signals
) -> None:
    """Both go, one after the other; the text does not change, and drafting goes on when they are back."""
    expected = texts(llm, params, "off")
    steps = llm.stats()["steps_total"]
    got: list[list[tuple[int, ...]]] = []
    thread = threading.Thread(target=lambda: got.append(texts(llm, params)))
    thread.start()
    eventually(lambda: llm.stats()["steps_total"] > steps + 10, "decoding", 20)
    for worker in workers:
        worker.send(number)
        time.sleep(0.2)
    thread.join(60)
    assert got == [expected]
    for worker in workers:
        if number == signal.SIGKILL:
            worker.process.wait(10)
            worker.start()
        else:
            worker.send(signal.SIGCONT)
    eventually(lambda: llm.stats()["draft_workers_usable"] == 2, "the workers' return", START_S)
    before = llm.stats()["drafted_rounds_total"]
    assert texts(llm, params) == expected
    assert llm.stats()["drafted_rounds_total"] > before


@pytest.mark.slow
def test_a_worker_for_another_drafter_is_refused(folder: Path, workers: list[Process], caplog: pytest.LogCaptureFixture) -> None:
    other = save_tiny_drafter(folder / "tiny", folder / "other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"block_size": 4', '"block_size": 3'))
    settings = {"model": str(folder / "tiny"), "drafter": str(other), "dtype": "float32", "kv_tokens": 4096, "profile": False}
    with LLM.with_draft_workers([workers[0].address], TOKEN, **settings) as llm:
        assert "block_size is 4 here and 3 there" in caplog.text
        assert llm.generate("x", SamplingParams(max_tokens=3))[0].token_ids
    with pytest.raises(ConfigError, match="cannot draft on draft workers"):
        LLM.with_draft_workers([workers[0].address], TOKEN, **(settings | {"drafter": "ngram"}))
