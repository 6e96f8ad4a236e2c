"""Ranks as threads of one process: the same groups over loopback, without the seconds that a process takes to start."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from dspark.workers.verifier.parallel.follower import follow
from dspark.workers.verifier.parallel.group import RankGroup
from dspark.workers.verifier.parallel.layout import Layout
from dspark.workers.verifier.parallel.leader import Loss
from dspark.workers.verifier.parallel.spec import RankSpec

T = TypeVar("T")
HOST = "127.0.0.1"


class Task(threading.Thread, Generic[T]):
    """A function on a thread of its own; a rank that hangs must not keep the tests from ending."""

    def __init__(self, work: Callable[..., T], *args: Any) -> None:
        super().__init__(daemon=True)
        self._work, self._args = work, args
        self._result: list[T] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result.append(self._work(*self._args))
        except Exception as error:  # noqa: BLE001 - raised by whoever asks for the result
            self.error = error

    def result(self, timeout_s: float = 60.0) -> T:
        self.join(timeout_s)
        if self.error is not None:
            raise self.error
        assert not self.is_alive(), "it hangs"
        return self._result[0]


def on_ranks(tensor: int, expert: int, work: Callable[[RankGroup], T]) -> list[T]:
    """What ``work`` returns on each of ``tensor * expert`` ranks."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        return work(RankGroup(Layout(rank, tensor, expert), store, HOST, torch.device("cpu")))

    return [task.result() for task in [Task(run, rank) for rank in range(tensor * expert)]]


class ThreadLauncher:
    """Followers on threads. transformers loads on one thread at a time."""

    host = HOST

    def device(self, kind: str, layout: Layout) -> str:
        return kind

    def start(self, specs: Sequence[RankSpec]) -> ThreadRanks:
        return ThreadRanks([Task(follow, dataclasses.replace(spec, loads_at_once=1), HOST) for spec in specs])


class ThreadRanks:
    """They cannot be killed: ``end`` expects that they were told to."""

    def __init__(self, tasks: Sequence[Task[None]]) -> None:
        self.tasks = tasks

    def loss(self) -> Loss | None:
        return next((Loss(f"rank {i}: {task.error}") for i, task in enumerate(self.tasks, 1) if task.error is not None), None)

    def end(self, grace_s: float) -> None:
        for task in self.tasks:
            task.result(grace_s)
