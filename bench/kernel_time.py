"""Time of every kernel against what the device can do, against its reference and against torch's own.

The ceilings are measured in the same run: bytes a second of a copy (read and written) and the rate of a large matrix product. A
kernel's ``share`` is the time that the ceilings allow for what it must move and compute, over the time that it takes.

On CUDA calls are timed inside a graph, as serving runs them, over inputs that take turns so that no cache holds them all; a reference
that reads results back is called one by one. On a CPU there are no kernels of ours: references alone run, at small shapes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from dspark.bench.kernel_cases import SMALL, Call, Case, Maker, Sizes, all_cases
from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.metrics import median
from dspark.bench.tables import Column, Table
from dspark.errors import ConfigError

if TYPE_CHECKING:
    import torch

CACHE_BYTES = 100 * 2**20  # inputs that take turns hold at least this much together: twice the L2 cache of an H100
MAX_INPUTS = 16
CALLS_A_GRAPH = 32
GRAPH_S = 0.01  # of slower calls a graph holds fewer
COLUMNS = [
    Column("kernel", 20, is_text=True),
    Column("shape", 32, is_text=True),
    Column("us", 9),
    Column("GB/s", 7),
    Column("TFLOP/s", 7),
    Column("share %", 7),
    Column("x reference", 11),
    Column("x torch", 7),
]


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """Medians in microseconds; ``ours_us`` None on a CPU, ``torch_us`` None where torch has no equivalent."""

    kernel: str
    shape: str
    ours_us: float | None
    reference_us: float
    torch_us: float | None
    num_bytes: int
    num_flops: int
    copy_bytes_s: float
    product_flops_s: float
    machine: str
    commit: str
    kind: str = "kernel"


def run_kernels(kernels: Sequence[str], repeats: int, out: TextIO | None) -> bool:
    """Measure the cases whose name begins with one of ``kernels`` (empty: all), print a table, append JSON lines to ``out``.

    A case that fails is named and does not stop the others; whether all ran.
    """
    import torch

    is_cuda = torch.cuda.is_available()
    sizes = Sizes() if is_cuda else SMALL
    device, dtype = torch.device("cuda" if is_cuda else "cpu"), torch.bfloat16 if is_cuda else torch.float32
    timer = GraphTimer(repeats) if is_cuda else PlainTimer(repeats)
    maker = Maker(device, dtype)
    cases = [case for case in all_cases(maker, sizes) if not kernels or case.kernel.startswith(tuple(kernels))]
    if not cases:
        names = ", ".join(sorted({case.kernel for case in all_cases(maker, sizes)}))
        raise ConfigError(f"--kernels {','.join(kernels)}: there are {names}")
    copy_bytes_s, product_flops_s = ceilings(maker, timer, is_cuda)
    machine, commit = describe_machine(str(dtype).removeprefix("torch.")), source_commit()
    print(f"{machine}; {commit}; medians of {repeats}")
    print(f"ceilings: copy {copy_bytes_s / 1e9:,.0f} GB/s, matrix product {product_flops_s / 1e12:.2f} TFLOP/s")
    if not is_cuda:
        print("no GPU: references only, at small shapes; us and what follows are theirs")
    table, all_ran = Table(COLUMNS), True
    with torch.inference_mode():
        for case in cases:
            try:
                times = measure(case, timer, has_kernels=is_cuda)
            except _failures() as error:
                print(f"{case.kernel}, {case.shape}: {type(error).__name__}: {error}")
                all_ran = False
                continue
            record = KernelRecord(
                case.kernel, case.shape, *times, case.num_bytes, case.num_flops, copy_bytes_s, product_flops_s, machine, commit
            )
            show(table, record)
            if out is not None:
                print(json.dumps(dataclasses.asdict(record)), file=out, flush=True)
    return all_ran


def _failures() -> tuple[type[Exception], ...]:
    """What a kernel or torch raises where a device cannot run it."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return (RuntimeError, TritonError)


def show(table: Table, record: KernelRecord) -> None:
    """One line of the table."""
    us = record.reference_us if record.ours_us is None else record.ours_us
    allowed_us = 1e6 * max(record.num_bytes / record.copy_bytes_s, record.num_flops / record.product_flops_s)
    table.row(
        record.kernel,
        record.shape,
        us,
        record.num_bytes / us / 1e3,
        record.num_flops / us / 1e6 if record.num_flops else None,
        100 * allowed_us / us,
        None if record.ours_us is None else record.reference_us / us,
        None if record.torch_us is None else record.torch_us / us,
    )


class PlainTimer:
    """Calls one by one, on the host's clock; on CUDA each is waited for."""

    def __init__(self, repeats: int, wait: Callable[[], None] = lambda: None) -> None:
        self._repeats, self._wait = repeats, wait

    def seconds(self, calls: Sequence[Call]) -> float:
        """Median seconds of a call; the calls take turns."""
        found = []
        for turn in range(len(calls) + self._repeats):
            call = calls[turn % len(calls)]
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            if turn >= len(calls):
                found.append(time.perf_counter() - start)
        return median(found)


class GraphTimer(PlainTimer):
    """Calls inside a CUDA graph, on the device's clock."""

    def __init__(self, repeats: int) -> None:
        import torch

        super().__init__(repeats, torch.cuda.synchronize)

    def seconds(self, calls: Sequence[Call]) -> float:
        import torch

        for call in calls:
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        turns = max(1, min(CALLS_A_GRAPH // len(calls), int(GRAPH_S / (time.perf_counter() - start))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(turns):
                for call in calls:
                    call()
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        found = []
        for _ in range(self._repeats):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(1e-3 * begin.elapsed_time(end) / (turns * len(calls)))
        return median(found)

    def waiting_seconds(self, calls: Sequence[Call]) -> float:
        """As ``PlainTimer``: of calls that no graph can hold."""
        return super().seconds(calls)


def measure(case: Case, timer: PlainTimer, has_kernels: bool) -> tuple[float | None, float, float | None]:
    """Microseconds of (our kernel, reference, torch's own)."""
    count = min(MAX_INPUTS, max(1, -(-CACHE_BYTES // max(case.num_bytes, 1)))) if has_kernels else 2
    inputs = [case.make(seed) for seed in range(count)]
    ours = 1e6 * timer.seconds([calls.ours for calls in inputs]) if has_kernels else None
    slow = timer.waiting_seconds if case.waits and isinstance(timer, GraphTimer) else timer.seconds
    reference = 1e6 * slow([calls.reference for calls in inputs])
    own = [calls.own for calls in inputs if calls.own is not None]
    return ours, reference, 1e6 * timer.seconds(own) if own else None


def ceilings(maker: Maker, timer: PlainTimer, is_cuda: bool) -> tuple[float, float]:
    """(bytes a second of a copy, FLOP a second of a square product) on the device."""
    import torch

    length, side = (2**29, 8192) if is_cuda else (2**22, 256)
    source: torch.Tensor = torch.zeros(length, dtype=maker.dtype, device=maker.device)
    target = torch.empty_like(source)
    copy_s = timer.seconds([lambda: target.copy_(source)])
    left, right = maker.normal(0, side, side), maker.normal(1, side, side)
    product_s = timer.seconds([lambda: left @ right])
    return 2 * length * maker.dtype.itemsize / copy_s, 2 * side**3 / product_s
