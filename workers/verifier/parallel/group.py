"""The collectives of a parallel verifier, on process groups of our own.

They are built from a store directly and are not torch's default group, so a program that runs a parallel engine may use
``torch.distributed`` for itself, and may run several engines. Steps are announced over gloo also on GPUs, whose tensors go
over NCCL. Results of a sum are the same bits on every rank, so what all ranks compute from them (routing to experts) agrees.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from dspark.errors import WorkerLost
from dspark.workers.verifier.parallel.layout import Layout

FOREVER = timedelta(days=365)  # an idle follower waits for its leader as long as that lives; a loss is told by others (leader.py)
HEAD_WORDS = 4096  # int32 words of the first message of an announcement; what does not fit comes in a second one
VERDICT_S = 2.0  # a failed collective waits this long to be told which rank is gone


class RankGroup:
    """One rank's end of the group. ``own_host`` is the address that this rank's sockets bind to.

    Every collective raises ``WorkerLost`` once a rank is gone.
    """

    def __init__(self, layout: Layout, store: Store, own_host: str, device: torch.device) -> None:
        self.layout = layout
        self.lost: str | None = None
        self._has_verdict = threading.Event()
        self._control = _gloo(PrefixStore("control", store), layout, own_host)
        self._tensors = self._control if device.type == "cpu" else _nccl(PrefixStore("tensors", store), layout)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks, in place."""
        with self._guard():
            _finish(self._tensors.allreduce([x], _inline(dist.AllreduceOptions())))
        return x

    def gather_columns(self, x: Tensor, width: int) -> Tensor:
        """On the leader [..., width]: the columns of all ranks side by side; each brings its share. Elsewhere ``x`` itself."""
        layout = self.layout
        widest = -(-width // layout.size)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[-1])).contiguous()
        parts = self.gather(padded)
        if not parts:
            return x
        shares = [Layout(rank, layout.tensor, layout.expert).share(width) for rank in range(layout.size)]
        return torch.cat([part[..., : len(share)] for part, share in zip(parts, shares, strict=True)], dim=-1)

    def gather(self, x: Tensor) -> list[Tensor]:
        """On the leader the tensors of all ranks, all of one shape, in order; elsewhere nothing."""
        parts = [torch.empty_like(x) for _ in range(self.layout.size)] if self.layout.is_leader else []
        options = _inline(dist.GatherOptions())
        options.rootRank = 0
        with self._guard():
            _finish(self._tensors.gather([parts] if parts else [], [x], options))
        return parts

    def scatter(self, parts: list[Tensor], own: Tensor) -> Tensor:
        """The leader's i-th part on rank i, written into ``own`` of the same shape; elsewhere ``parts`` is empty."""
        options = _inline(dist.ScatterOptions())
        options.rootRank = 0
        with self._guard():
            _finish(self._tensors.scatter([own], [parts] if parts else [], options))
        return own

    def minimum(self, value: int) -> int:
        """The smallest of all ranks' values."""
        least = torch.tensor([value])
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]  # the stub has the enum's own type here
        with self._guard():
            self._control.allreduce([least], options).wait()
        return int(least)

    def send(self, words: Tensor) -> None:
        """Announce int32 words to all followers."""
        head = torch.zeros(HEAD_WORDS, dtype=torch.int32)
        head[0] = len(words)
        first = words[: HEAD_WORDS - 1]
        head[1 : 1 + len(first)] = first
        self._broadcast(head)
        if len(words) > len(first):
            self._broadcast(words[len(first) :].contiguous())

    def receive(self) -> Tensor:
        """The leader's next announcement."""
        head = torch.empty(HEAD_WORDS, dtype=torch.int32)
        self._broadcast(head)
        count = int(head[0])
        first = head[1 : 1 + count]
        if count < HEAD_WORDS:
            return first
        rest = torch.empty(count - len(first), dtype=torch.int32)
        self._broadcast(rest)
        return torch.cat([first, rest])

    def fail(self, reason: str) -> None:
        """A rank is gone: collectives that wait for it end, later ones are refused."""
        self.lost = self.lost or reason
        self._has_verdict.set()
        if self._tensors is not self._control:
            self._tensors.abort()

    def check(self) -> None:
        """WorkerLost if a rank is gone. On a GPU an aborted collective leaves garbage behind, not an exception."""
        if self.lost is not None:
            raise WorkerLost(self.lost)

    def _broadcast(self, words: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        with self._guard():
            self._control.broadcast([words], options).wait()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        self.check()
        try:
            yield
        except RuntimeError as error:
            self._has_verdict.wait(VERDICT_S)
            raise WorkerLost(self.lost or f"a collective of rank {self.layout.rank} failed: {error}") from error


def _gloo(store: Store, layout: Layout, own_host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stub calls it Options
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_host)]
    options._timeout = FOREVER
    return dist.ProcessGroupGloo(store, layout.rank, layout.size, options)


def _inline(options: Any) -> Any:
    """On a GPU: on the stream of the model, without a second one to wait for."""
    options.asyncOp = False
    return options


def _finish(work: Any) -> None:
    """Wait for a collective; on the model's own stream there is nothing to wait for, and no work."""
    if work is not None:
        work.wait()


def _nccl(store: Store, layout: Layout) -> Any:
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # torch's watchdog would end this process when a rank is lost
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = FOREVER
    return dist.ProcessGroupNCCL(store, layout.rank, layout.size, options)
