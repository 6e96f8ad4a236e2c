"""CUDA graphs: the launches of a function over fixed tensors, replayed without Python.

What the function reads must lie in tensors that never move and whose sizes never change; it may wait for nothing. What it returns are
tensors that every replay writes again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

Output = TypeVar("Output")


class Capture(Protocol):
    """How a function over fixed tensors is made repeatable."""

    def __call__(self, run: Callable[[], Output]) -> Callable[[], Output]:
        """Something that does what ``run`` does, again and again; what it returns holds until the next call of any of them."""


def plain_calls(run: Callable[[], Output]) -> Callable[[], Output]:
    """No graph: every call computes anew. The stand-in on machines without CUDA."""
    return run


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Without garbage collection: a capture must not meet the end of something that belongs to CUDA."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CudaGraphs:
    """Captures with one memory pool for all graphs, which must never run at the same time. Capture the largest first.

    What cannot be captured is called launch by launch, and ``warn`` is told once. Capture inside ``nothing_collected``.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._warn = warn
        self.has_failed = False

    def __call__(self, run: Callable[[], Output]) -> Callable[[], Output]:
        run()  # compiles kernels and lets libraries choose theirs, which a capture may not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads' work is not part of it
                try:
                    output = run()
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self.has_failed:
                self._warn(f"WARNING: steps run without CUDA graphs, which is much slower: {error}")
            self.has_failed = True
            return run

        def replay() -> Output:
            graph.replay()
            return output

        replay.reads = run  # type: ignore[attr-defined]  # the tensors that it closes over: the graph has nothing but their addresses
        return replay
