"""Ray Train: two workers train as one process does, and a killed worker costs no more than a checkpoint interval."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.training_runs import make_run, run_config
from safetensors.torch import load_file

from dspark.errors import ConfigError
from dspark.training import on_ray
from dspark.training.config import TrainConfig
from dspark.training.metrics import METRICS
from dspark.training.trainer import train

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
STEPS = 60
SETTINGS = {"max_steps": STEPS, "log_every": 1, "batch_tokens": 256, "anchors": 8, "save_every_s": 0.0}
WORKER = "RayTrainWorker"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("on-ray"))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    pytest.importorskip("ray.train", exc_type=ImportError)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def steps(config: TrainConfig) -> list[int]:
    path = config.out / METRICS
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def own_workers() -> list[int]:
    """Ray Train's worker processes among this process's descendants."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:
                continue

    def is_own(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_own(parents[pid]))

    return sorted(pid for pid, name in names.items() if WORKER in name and is_own(pid))


def test_two_workers_train_as_one_does_and_survive_a_kill(folder: Path) -> None:
    alone = run_config(folder, "alone", **SETTINGS, accumulate=2)
    assert train(alone, lambda _: None)
    together = run_config(folder, "together", **SETTINGS)
    killed_at: list[int] = []

    def kill_one() -> None:
        while not killed_at:
            if len(done := steps(together)) >= 3 and (found := own_workers()):
                os.kill(found[-1], signal.SIGKILL)
                killed_at.append(done[-1])
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    assert on_ray.train_on_ray(together, 2, lambda _: None)
    assert killed_at[0] < STEPS // 2, "killed in the middle: only a restarted group can have come to the end"
    seen = steps(together)
    assert seen[-1] == STEPS
    assert set(seen) == set(range(1, STEPS + 1)), "no step was left out"
    assert len(seen[:-1]) <= STEPS + 1, f"every step leaves a checkpoint, so at most one is done again: {seen}"
    expected, actual = (load_file(run.drafter_folder / "model.safetensors") for run in (alone, together))
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, atol=2e-3), name


def test_stopping_by_time_and_going_on(folder: Path) -> None:
    config = run_config(folder, "stopped", **(SETTINGS | {"max_steps": 2}))
    said: list[str] = []
    assert not on_ray.train_on_ray(config, 2, said.append, max_seconds=0.0)
    assert not config.drafter_folder.exists()
    assert on_ray.train_on_ray(config, 2, said.append)
    assert [step for step in steps(config) if step] == [1, 2, 2]
    assert said == ["training on 2 CPU workers of Ray"] * 2


def test_what_workers_refuse_is_said_as_it_is(folder: Path) -> None:
    config = run_config(folder, "refused", {"taps": [0, 9]}, **SETTINGS)
    with pytest.raises(ConfigError, match=r"drafter\.taps: 9 is no layer of this target"):
        on_ray.train_on_ray(config, 2, lambda _: None)
