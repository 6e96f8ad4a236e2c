"""Ranks as processes: what one rank would say, and no process left behind however they or their leader end."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import families
from helpers.engines import greedy, make_engine, run, tiny_target
from helpers.receivers import Receiver

from dspark import LLM, SamplingParams
from dspark.config import EngineConfig
from dspark.errors import ConfigError, WorkerLost
from dspark.types import Finish
from dspark.workers.build import Loaded, load_engine
from dspark.workers.verifier.host import EngineHost
from dspark.workers.verifier.parallel.processes import ProcessLauncher, RankProcesses
from dspark.workers.verifier.parallel.spec import RankSpec

PROMPT = [3 + 7 * j % 150 for j in range(30)]
BOUND_S = 5.0


class Launcher(ProcessLauncher):
    """Remembers what it started; ``change`` spoils the specs of the followers."""

    def __init__(self, change: Callable[[RankSpec], RankSpec] = lambda spec: spec) -> None:
        self._change = change
        self.pids: dict[int, int] = {}

    def start(self, specs: Sequence[RankSpec]) -> RankProcesses:
        started = RankProcesses([self._change(spec) for spec in specs])
        self.pids = started.pids
        return started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    families.make("qwen3_moe").save_pretrained(folder)
    return folder


def config(folder: Path, tensor: int, expert: int, **settings: Any) -> EngineConfig:
    values = {"dtype": "float32", "kv_tokens": 2048, "profile": False, "tensor_parallel": tensor, "expert_parallel": expert}
    return EngineConfig(model=str(folder), **(values | settings))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pids: Sequence[int], timeout_s: float = BOUND_S) -> None:
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"processes {left} are left"
        time.sleep(0.05)


def start_generating(loaded: Loaded) -> tuple[EngineHost, Receiver]:
    host, receiver = EngineHost(loaded.engine), Receiver()
    host.start()
    host.submit(greedy("long", PROMPT, 200), receiver)
    while not receiver.calls:
        time.sleep(0.01)
    return host, receiver


def assert_lost(host: EngineHost, receiver: Receiver, reason: str, bound_s: float = BOUND_S) -> None:
    begin = time.monotonic()
    receiver.wait_for(1, bound_s)
    assert receiver.ended["long"].finish is Finish.ERROR
    assert reason in str(receiver.ended["long"].error)
    assert not host.is_healthy()
    with pytest.raises(WorkerLost, match=reason):
        host.submit(greedy("next", PROMPT), receiver)
    host.close()
    assert time.monotonic() - begin < bound_s


def test_the_text_of_one_rank_until_a_rank_is_killed(folder: Path) -> None:
    launcher = Launcher()
    loaded = load_engine(config(folder, 1, 2, drafter="ngram", speculation="static:3"), launcher=launcher)
    requests = [greedy("a", PROMPT), greedy("b", PROMPT[:7])]
    expected = run(make_engine(tiny_target("qwen3_moe"), speculation="off"), requests)
    out = run(loaded.engine, requests)
    assert {name: result.tokens for name, result in out.items()} == {name: result.tokens for name, result in expected.items()}
    assert loaded.engine.counters.accepted > 0
    host, receiver = start_generating(loaded)
    stats = host.stats()
    assert sum(value for key, value in stats.items() if key.startswith("expert_tokens_total")) > 0
    os.kill(launcher.pids[1], signal.SIGKILL)
    assert_lost(host, receiver, "rank 1 was killed by signal 9")
    wait_for_end(list(launcher.pids.values()))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tensor", "expert"), [("qwen3", 2, 1), ("qwen3", 4, 1), ("qwen3_moe", 2, 2), ("qwen3_moe", 1, 4)])
def test_an_llm_over_ranks_says_what_one_says(tmp_path: Path, family: str, tensor: int, expert: int) -> None:
    families.make(family).save_pretrained(tmp_path)
    params = [SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True), SamplingParams(seed=3, max_tokens=24, ignore_eos=True)]
    texts = []
    for shape in ((1, 1), (tensor, expert)):
        settings = config(tmp_path, *shape, drafter="ngram").model_dump(exclude_unset=True)
        with LLM(**settings) as llm:
            texts.append([out.token_ids for out in llm.generate([PROMPT, PROMPT[:9]], params)])
            ranks = llm._loaded.engine.target.ranks
            pids = [] if ranks is None else list(ranks._started.pids.values())  # type: ignore[attr-defined]
            assert len(pids) == shape[0] * shape[1] - 1
            llm.rest()
            assert all(map(is_alive, pids)), "a rest ends threads, not ranks"
            assert llm.generate(PROMPT, params[0])[0].token_ids == texts[-1][0]
        wait_for_end(pids, 0.1)
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_stopped_rank_is_noticed_after_the_stall_limit(folder: Path) -> None:
    launcher = Launcher()
    host, receiver = start_generating(load_engine(config(folder, 2, 1, stall_s=2.0), launcher=launcher))
    os.kill(launcher.pids[1], signal.SIGSTOP)
    assert_lost(host, receiver, "has not ended in 2 s", 2.0 + BOUND_S)
    wait_for_end(list(launcher.pids.values()))


@pytest.mark.slow
def test_an_idle_engine_notices_a_lost_rank(folder: Path) -> None:
    launcher = Launcher()
    host = EngineHost(load_engine(config(folder, 2, 2), launcher=launcher).engine)
    host.start()
    assert host.is_healthy()
    os.kill(launcher.pids[3], signal.SIGKILL)
    wait_for_end(list(launcher.pids.values()))
    assert not host.is_healthy()
    with pytest.raises(WorkerLost, match="rank 3 was killed"):
        host.submit(greedy("a", PROMPT), Receiver())
    host.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_end_with_their_leader(folder: Path, number: signal.Signals) -> None:
    code = f"""
import time
from dspark.config import EngineConfig
from dspark.workers.build import load_engine
loaded = load_engine(EngineConfig.model_validate_json({config(folder, 2, 2).model_dump_json()!r}))
print(*loaded.engine.target.ranks._started.pids.values(), flush=True)
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as leader:
        assert leader.stdout is not None
        pids = [int(word) for word in leader.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_alive, pids))
        leader.send_signal(number)
    wait_for_end(pids)


@pytest.mark.slow
def test_what_a_rank_refuses_is_said_by_the_leader(folder: Path) -> None:
    launcher = Launcher(lambda spec: dataclasses.replace(spec, model="/nowhere"))
    with pytest.raises(ConfigError, match="rank 1: model '/nowhere': no such folder"):
        load_engine(config(folder, 2, 1), launcher=launcher)
    wait_for_end(list(launcher.pids.values()), 0.1)
    launcher = Launcher(lambda spec: dataclasses.replace(spec, dtype="nothing"))
    with pytest.raises(WorkerLost, match=r"rank 1: .*nothing"):
        load_engine(config(folder, 2, 1), launcher=launcher)
    wait_for_end(list(launcher.pids.values()), 0.1)
