"""Training state on disk: what a killed or starved process leaves is the checkpoint before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dspark.errors import ConfigError
from dspark.training import checkpoints, files
from dspark.training.checkpoints import Counters


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return module, optimizer


def same_state(one: tuple[nn.Module, torch.optim.Optimizer], other: tuple[nn.Module, torch.optim.Optimizer]) -> bool:
    pairs = list(zip(one[0].parameters(), other[0].parameters(), strict=True))
    states = [(one[1].state[a], other[1].state[b]) for a, b in pairs]
    return all(torch.equal(a, b) for a, b in pairs) and all(torch.equal(a[key], b[key]) for a, b in states for key in a)


def test_weights_optimizer_and_counters_come_back(tmp_path: Path) -> None:
    saved, other = make(0), make(1)
    counters = Counters(step=7, epoch=1, batch=3, seconds=12.5, tokens=999)
    assert checkpoints.load(tmp_path, *other, "me") is None
    checkpoints.save(tmp_path, *saved, counters, "me")
    assert not same_state(saved, other)
    assert checkpoints.load(tmp_path, *other, "me") == counters
    assert same_state(saved, other)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, *make(0), Counters(), "me")
    with pytest.raises(ConfigError, match="made with other settings or data"):
        checkpoints.load(tmp_path, *make(1), "you")
    with pytest.raises(ConfigError, match="other drafter settings"):
        checkpoints.load_module(tmp_path, nn.Linear(4, 2))
    assert not checkpoints.load_module(tmp_path / "absent", nn.Linear(3, 2))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, other = make(0), make(1)
    checkpoints.save(tmp_path, *saved, Counters(step=1), "me")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        checkpoints.save(tmp_path, *other, Counters(step=2), "me")
    restored = checkpoints.load(tmp_path, *other, "me")
    assert restored is not None
    assert restored.step == 1
    assert same_state(saved, other)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoints.FILE]


DIES_WHILE_SAVING = """
import os, sys, torch
from pathlib import Path
from torch import nn
from dspark.training import checkpoints, files
module = nn.Linear(3, 2)
optimizer = torch.optim.AdamW(module.parameters())
checkpoints.save(Path(sys.argv[1]), module, optimizer, checkpoints.Counters(step=1), "me")
print("ready", flush=True)
files.os.fsync = lambda descriptor: os.kill(os.getpid(), 9)
checkpoints.save(Path(sys.argv[1]), module, optimizer, checkpoints.Counters(step=2), "me")
"""


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIES_WHILE_SAVING, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.returncode) == ("ready\n", -signal.SIGKILL), done.stderr
    assert len(os.listdir(tmp_path)) == 2, "the half-made file is there beside the whole one"
    restored = checkpoints.load(tmp_path, *make(1), "me")
    assert restored is not None
    assert restored.step == 1
    checkpoints.save(tmp_path, *make(1), Counters(step=2), "me")
    assert os.listdir(tmp_path) == [checkpoints.FILE]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / checkpoints.FILE).write_bytes(b"half")
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoints.load(tmp_path, *make(0), "me")
