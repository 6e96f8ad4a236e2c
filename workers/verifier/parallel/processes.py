"""Ranks as processes of this machine, which end with the process that started them, whatever ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from dspark.errors import ConfigError
from dspark.workers.verifier.parallel.layout import Layout
from dspark.workers.verifier.parallel.leader import Loss
from dspark.workers.verifier.parallel.spec import RankSpec

MODULE = "dspark.workers.verifier.parallel.rank_process"


class ProcessLauncher:
    """Starts ranks beside the leader; rank r takes the r-th GPU that is visible."""

    host = "127.0.0.1"

    def device(self, kind: str, layout: Layout) -> str:
        if kind != "cuda":
            return kind
        if (visible := torch.cuda.device_count()) < layout.size:
            raise ConfigError(f"tensor_parallel x expert_parallel = {layout.size} ranks need as many GPUs, and {visible} are visible")
        return f"cuda:{layout.rank}"

    def start(self, specs: Sequence[RankSpec]) -> RankProcesses:
        return RankProcesses(specs)


class RankProcesses:
    """One process for each of ``specs``. Their standard input is their lifeline: it ends when this process does."""

    def __init__(self, specs: Sequence[RankSpec]) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for spec in specs:
                self._processes[spec.rank] = _start(spec)
        except BaseException:
            self.end(0.0)
            raise

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def loss(self) -> Loss | None:
        """Why one of them has ended; None while all run."""
        for rank, process in self._processes.items():
            if process.poll() is not None:
                return _loss(rank, process)
        return None

    def end(self, grace_s: float) -> None:
        """Let go of all of them, and kill those that are left after ``grace_s``."""
        deadline = time.monotonic() + grace_s
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(spec: RankSpec) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(spec.threads)},
        start_new_session=True,  # Ctrl-C is the leader's to handle: it may let running requests finish
    )
    assert process.stdin is not None
    process.stdin.write(spec.to_json().encode() + b"\n")
    process.stdin.flush()
    return process


def _loss(rank: int, process: subprocess.Popen[bytes]) -> Loss:
    """What an ended rank said last, or how it ended."""
    assert process.stdout is not None
    words = process.stdout.read() if not process.stdout.closed else b""
    process.stdout.close()
    if words:
        report = json.loads(words)
        return Loss(f"rank {rank}: {report['error']}", report["is_refusal"])
    code = process.returncode
    return Loss(f"rank {rank} was killed by signal {-code}" if code < 0 else f"rank {rank} ended with exit code {code}")
