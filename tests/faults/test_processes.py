"""Processes of a whole cluster that are killed, stopped, slowed down, cut off or told noise while 16 requests stream.

Two verifiers, two draft workers and a router under Serve, and for faults of ranks two verifiers of two ranks each. Nothing may
be lost, doubled or changed. A router takes its clients' connections with it, so a client whose stream breaks asks again, as
clients do; every other fault must be invisible to clients.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from helpers import sockets
from helpers.repeats import FAULT_REPEATS, counted
from helpers.servers import Server, served
from helpers.tiny_model import save_tiny_drafter, save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_STREAMS, LENGTH = 16, 120
SILENCE_S = 7.5  # after which a process or a rank is given up
SLOW_S = 3.0  # of stopping and going on
BACK_S = 200.0  # for Serve to find a stopped process, to kill it, and to start another one
SETTINGS = [
    *("--verifiers", "2", "--dtype", "float32", "--kv-tokens", "16384", "--no-profile", "--speculation", "static:2", "--threads", "1"),
    *("--drain-s", "30", "--silence-s", f"{SILENCE_S:g}", "--stall-s", f"{SILENCE_S:g}"),
]
DISAGGREGATED = ["--topology", "disaggregated", "--draft-workers", "2", "--draft-kv-tokens", "8192"]
MARKS = {
    "verifier": "ServeReplica:dspark:Verifier",
    "draft worker": "ServeReplica:dspark:DraftWorker",
    "router": "ServeReplica:dspark:Router",
    "rank": "ray::Rank",
    "proxy": "ray::ProxyActor",
}
# From whom a cut network separates a process. A rank speaks to nobody but its verifier.
OTHERS = {
    "verifier": ("router", "draft worker", "verifier"),
    "draft worker": ("verifier", "router"),
    "router": ("proxy", "verifier", "draft worker"),
    "rank": ("verifier",),
}


@dataclass(frozen=True)
class Cluster:
    """A running server, how many processes of each kind it has when it is whole, and what its streams yield undisturbed."""

    server: Server
    whole: dict[str, int]
    expected: dict[int, str]


@contextlib.contextmanager
def cluster(folder: Path, settings: Sequence[str], whole: dict[str, int]) -> Iterator[Cluster]:
    with served(folder / "log", str(folder / "tiny"), *SETTINGS, *settings) as running:
        undisturbed = Streams(running, {"speculation": "off"})
        undisturbed.run()
        assert len(undisturbed.texts) == NUM_STREAMS
        yield Cluster(running, whole, undisturbed.texts)


@pytest.fixture(scope="module")
def disaggregated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_drafter(save_tiny_model(folder / "tiny", max_len=1024), folder / "draft")
    whole = {"verifier": 2, "draft worker": 2, "router": 1, "rank": 0}
    with cluster(folder, [*DISAGGREGATED, "--drafter", str(folder / "draft")], whole) as running:
        yield running


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "tiny", max_len=1024)
    whole = {"verifier": 2, "draft worker": 0, "router": 1, "rank": 2}
    with cluster(folder, ["-tp", "2", "--drafter", "ngram"], whole) as running:
        yield running


def processes(server: Server, kind: str) -> list[int]:
    return [pid for pid, command in server.processes().items() if MARKS[kind] in command]


@dataclass
class Streams:
    """16 clients, half of them greedy, half with a seed; ``texts`` holds what each got in the end."""

    server: Server
    more: dict[str, object] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    again: Counter[int] = field(default_factory=Counter)  # client -> how often it had to ask again
    num_events: int = 0
    longest_pause_s: float = 0.0  # of any client between two events, asking again included
    _last_s: dict[int, float] = field(default_factory=dict)

    def run(self, when: int = 0, what: Callable[[], None] | None = None) -> None:
        """Run all streams to their ends; do ``what`` in another thread after ``when`` events."""
        threads = [threading.Thread(target=self._client, args=(i,)) for i in range(NUM_STREAMS)]
        for thread in threads:
            thread.start()
        if what is not None:
            while self.num_events < when and any(thread.is_alive() for thread in threads):
                time.sleep(0.005)
            what()
        for thread in threads:
            thread.join(2 * BACK_S)
        assert not self.errors, self.errors

    def _client(self, number: int) -> None:
        self._last_s[number] = time.monotonic()
        deadline = self._last_s[number] + BACK_S
        while time.monotonic() < deadline:
            text = self._ask(number)
            if text is not None:
                self.texts[number] = text
                return
            self.again[number] += 1
            time.sleep(0.2)
        self.errors.append(f"stream {number} never came to its end")

    def _ask(self, number: int) -> str | None:
        """The text, or None if the connection broke."""
        sampling = {"temperature": 0.0} if number % 2 else {"temperature": 0.9, "seed": number}
        body = {"model": "tiny", "prompt": f"stream {number}", "max_tokens": LENGTH, "ignore_eos": True, "stream": True}
        parts: list[str] = []
        try:
            with httpx.stream("POST", f"{self.server.url}/v1/completions", json=body | sampling | self.more, timeout=BACK_S) as response:
                if response.status_code >= 500:
                    return None
                assert response.status_code == 200, response.read()
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        return "".join(parts)
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            self.errors.append(f"stream {number}: {event}")
                            return ""
                        parts.append(event["choices"][0]["text"])
                        self.num_events += 1
                        now_s = time.monotonic()
                        self.longest_pause_s = max(self.longest_pause_s, now_s - self._last_s[number])
                        self._last_s[number] = now_s
        except httpx.HTTPError:
            return None
        return None  # it ended before its end


Fault = Callable[[Server, str, int, random.Random], None]


def kill(server: Server, kind: str, pid: int, chance: random.Random) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(server: Server, kind: str, pid: int, chance: random.Random) -> None:
    """For good: somebody else has to find it and to replace it."""
    os.kill(pid, signal.SIGSTOP)


def slow(server: Server, kind: str, pid: int, chance: random.Random) -> None:
    """It runs a third of the time."""
    deadline = time.monotonic() + SLOW_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)


def partition(server: Server, kind: str, pid: int, chance: random.Random) -> None:
    """It is cut off from those it works with, for a moment or for longer than anybody waits."""
    assert sockets.partition(pid, others(server, kind, pid), chance.uniform(0.2, 1.5) * SILENCE_S)


def corrupt(server: Server, kind: str, pid: int, chance: random.Random) -> None:
    """Noise comes through all of its connections to those it works with."""
    assert sockets.corrupt(pid, others(server, kind, pid), chance)


def others(server: Server, kind: str, pid: int) -> list[int]:
    return [other for name in OTHERS[kind] for other in processes(server, name) if other != pid]


FAULTS: dict[str, Fault] = {"kill": kill, "stop": stop, "slow": slow, "partition": partition, "corrupt": corrupt}


def is_whole(cluster: Cluster) -> bool:
    """Whether every process is there, connected, and idle, and nothing is held anywhere."""
    server, whole = cluster.server, cluster.whole
    if {kind: len(processes(server, kind)) for kind in whole} != whole:
        return False
    try:
        answer = httpx.get(f"{server.url}/status", timeout=5.0).json()
    except (httpx.HTTPError, ValueError):
        return False
    verifiers, workers = answer["verifiers"], answer["draft_workers"]
    return (
        answer["status"] == "ok"
        and answer["routers"]["in_flight"] == 0
        and [v["state"] for v in verifiers] == ["ok"] * whole["verifier"]
        and all(v["requests"]["running"] == v["requests"]["waiting"] == 0 for v in verifiers)
        and all(v["kv"]["free_blocks"] == v["kv"]["blocks"] for v in verifiers)
        and [w["state"] for w in workers] == ["ready"] * whole["draft worker"]
        and all(w["verifiers"] == 2 and w["requests"] == 0 and w["free_blocks"] == w["blocks"] for w in workers)
    )


def eventually_whole(cluster: Cluster, what: str) -> None:
    deadline = time.monotonic() + BACK_S
    while not is_whole(cluster):
        assert time.monotonic() < deadline, f"{what}: {httpx.get(f'{cluster.server.url}/status', timeout=5.0).text}"
        time.sleep(0.1)


def eventually_gone(cluster: Cluster, kind: str, pid: int) -> None:
    """Somebody has found a process that will never go on: until then it is counted, with what it last said of itself."""
    deadline = time.monotonic() + BACK_S
    while pid in processes(cluster.server, kind):
        assert time.monotonic() < deadline, f"{kind} {pid} stands still and was not replaced"
        time.sleep(0.1)


def suffer(cluster: Cluster, victim: str, fault: str) -> None:
    """The fault again and again, each time in the middle of 16 streams."""
    if fault in ("partition", "corrupt") and not sockets.can_borrow():
        pytest.skip("this system does not let a process borrow sockets of others")
    for repeat in range(FAULT_REPEATS):
        eventually_whole(cluster, "before the fault")
        with counted(victim, fault) as recovery:
            chance = random.Random(f"{victim} {fault} {repeat}")
            streams = Streams(cluster.server)
            hit_s, pid = 0.0, 0

            def hit(chance: random.Random = chance) -> None:
                nonlocal hit_s, pid
                hit_s, pid = time.monotonic(), chance.choice(processes(cluster.server, victim))
                FAULTS[fault](cluster.server, victim, pid, chance)

            streams.run(chance.randrange(100, 800), hit)
            assert streams.texts == cluster.expected
            if victim != "router":
                assert not streams.again, f"clients noticed: {streams.again}"
            if fault in ("kill", "stop"):
                eventually_gone(cluster, victim, pid)
            eventually_whole(cluster, "after the fault")
            recovery.pause_s, recovery.whole_s = streams.longest_pause_s, time.monotonic() - hit_s
        told = f"{victim} {fault} {repeat}: longest pause {recovery.pause_s:.1f} s, whole and empty again after {recovery.whole_s:.1f} s"
        print(f"{told}, {streams.again.total()} requests asked again")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("victim", ["verifier", "draft worker", "router"])
def test_streams_survive(disaggregated: Cluster, victim: str, fault: str) -> None:
    suffer(disaggregated, victim, fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_streams_survive_ranks(parallel: Cluster, fault: str) -> None:
    suffer(parallel, "rank", fault)
