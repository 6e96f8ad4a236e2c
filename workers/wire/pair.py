"""Tensors between two processes through torch.distributed: NCCL between GPUs, gloo between CPUs.

A pair is a group of two ranks of its own, made from a store, never torch's default group: a process may belong to many, and
the death of one end takes no other pair with it. What is sent was announced elsewhere (over gRPC): several tensors go as one
buffer of bytes, and the receiver checks each of them against its head before it becomes a tensor.

Everything here blocks: it is for threads that may wait. Nothing starts a parallel region on a CPU (see ``tensors.py``).
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, Final, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # not in its __all__

from dspark.errors import WorkerLost
from dspark.workers.wire.codec import WireError
from dspark.workers.wire.tensors import DTYPES, dtype_name, is_finite

ALIGNMENT: Final = 16  # bytes; every tensor of a buffer begins at a multiple
MEET_S: Final = 20.0  # for both ends to join; a first NCCL communicator takes seconds
POLL_S: Final = 2e-4
SPIN_S: Final = 1e-3  # small transfers are over before a sleep would be
_ROW: Final = 1024  # words that are summed at once for a checksum

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorHead:
    """What the receiver must know of a tensor: ``length`` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    length: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Expected:
    """What the receiver takes a tensor to be."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def backend_for(device: torch.device) -> str | None:
    """The backend that carries tensors of a device; None if this torch has none."""
    if device.type == "cpu":
        return "gloo" if dist.is_gloo_available() else None
    return "nccl" if device.type == "cuda" and dist.is_nccl_available() else None


class PairGroup:
    """One end of a pair: rank 0 has opened the store, rank 1 has reached it.

    All methods raise WorkerLost once the other end is gone, or takes longer than ``timeout_s``; after that only ``close`` is
    of use. One thread at a time, but ``close``.
    """

    def __init__(self, store: Store, rank: int, own_host: str, device: torch.device, timeout_s: float) -> None:
        self._peer = 1 - rank
        self._device = device
        self._timeout_s = timeout_s
        self._is_closed = False
        self._store = store  # NCCL asks it again when it makes its communicator
        self._choose_device()
        try:
            self._group = _gloo(store, rank, own_host) if device.type == "cpu" else _nccl(store, rank)
        except RuntimeError as error:
            raise WorkerLost(f"the other end did not join: {_first_line(error)}") from error
        self._greet(rank)

    def send(self, buffer: Tensor) -> None:
        """Send bytes [n]; returns when they have left."""
        self._run(lambda: self._group.send([buffer], self._peer, 0), self._timeout_s)

    def receive(self, buffer: Tensor) -> None:
        """Fill ``buffer`` with the next bytes that come; they may be fewer, which their checksum tells."""
        self._run(lambda: self._group.recv([buffer], self._peer, 0), self._timeout_s)

    def close(self) -> None:
        """Leave. Whatever waits ends, at both ends; closing twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._device.type != "cpu":
            self._group.abort()
        self._group = None

    def _greet(self, rank: int) -> None:
        """A few bytes each way: NCCL makes its communicator with the first."""
        word = torch.zeros(ALIGNMENT, dtype=torch.uint8, device=self._device)
        for sender in (0, 1):
            verb = self._group.send if sender == rank else self._group.recv
            self._run(lambda verb=verb: verb([word], self._peer, 0), MEET_S)  # type: ignore[misc]

    def _choose_device(self) -> None:
        """For this thread: without it, each would also open the first GPU."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _run(self, begin: Callable[[], Any], timeout_s: float) -> None:
        if self._is_closed:
            raise WorkerLost("the pair was closed")
        self._choose_device()
        try:
            work = begin()
            if self._device.type == "cpu":
                work.wait(timedelta(seconds=timeout_s))
            else:
                self._poll(work, timeout_s)
        except RuntimeError as error:
            raise WorkerLost(f"the other end is gone or stuck: {_first_line(error)}") from error

    def _poll(self, work: Any, timeout_s: float) -> None:
        """NCCL has no wait that ends by itself: waiting for its stream would hang with a lost peer."""
        began = time.monotonic()
        while not work.is_completed():
            waited_s = time.monotonic() - began
            if waited_s > timeout_s:
                self.close()
                raise WorkerLost("the other end is gone or stuck: nothing moved in time")
            time.sleep(0.0 if waited_s < SPIN_S else POLL_S)
        if self._is_closed:  # an aborted operation looks like a completed one
            raise WorkerLost("the pair was closed")
        work.wait()


def open_store(host: str) -> tuple[TCPStore, str]:
    """A store on a free port of ``host`` and of no other address, and its address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    timeout = timedelta(seconds=MEET_S)
    store = TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reach_store(address: str) -> TCPStore:
    """The store at an address; WireError if that is none, WorkerLost if nobody answers."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise WireError(f"{address!r:.80} is no address of a store")
    try:
        return TCPStore(host.strip("[]"), int(port), is_master=False, timeout=timedelta(seconds=MEET_S), wait_for_workers=False)
    except RuntimeError as error:
        raise WorkerLost(f"the store at {address} cannot be reached: {_first_line(error)}") from error


def pack(tensors: Sequence[Tensor]) -> tuple[Tensor, list[TensorHead]]:
    """Some tensors of one device as one buffer of bytes there, and their heads."""
    sizes = [_padded(tensor.nbytes) for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
    slices = _slices(buffer, sizes)
    for tensor, piece in zip(tensors, slices, strict=True):
        _fill(piece, tensor)
    sums = checksums(slices)
    return buffer, [
        TensorHead(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.nbytes, checksum)
        for tensor, checksum in zip(tensors, sums, strict=True)
    ]


def check_heads(heads: Sequence[TensorHead], expected: Sequence[Expected], max_bytes: int) -> int:
    """Bytes of the buffer that these heads announce; WireError, naming the tensor, unless they are what is expected."""
    if len(heads) != len(expected):
        raise WireError(f"{len(heads)} tensors are announced, expected {len(expected)}")
    total = 0
    for head, want in zip(heads, expected, strict=True):
        if head.dtype != want.dtype:
            raise WireError(f"{want.name} is {head.dtype!r:.20}, expected {want.dtype}")
        if head.shape != want.shape:
            raise WireError(f"{want.name} has shape {list(head.shape)[:8]}, expected {list(want.shape)}")
        if head.length != math.prod(want.shape) * DTYPES[want.dtype].itemsize:
            raise WireError(f"{want.name} of shape {list(want.shape)} has {head.length} bytes")
        total += _padded(head.length)
    if total > max_bytes:
        raise WireError(f"{total} bytes are announced at once, more than {max_bytes}")
    return total


def unpack(buffer: Tensor, heads: Sequence[TensorHead], expected: Sequence[Expected]) -> list[Tensor]:
    """The tensors of a buffer, as views of it; WireError, naming the tensor, unless each is whole and finite. Heads are checked already."""
    slices = _slices(buffer, [_padded(head.length) for head in heads])
    for head, want, checksum in zip(heads, expected, checksums(slices), strict=True):
        if checksum != head.checksum:
            raise WireError(f"{want.name} has a wrong checksum")
    tensors = [
        piece[: head.length].view(DTYPES[head.dtype]).view(head.shape) if head.length else _empty(head, buffer.device)
        for piece, head in zip(slices, heads, strict=True)
    ]
    for want, is_whole in zip(expected, _finite(tensors), strict=True):
        if not is_whole:
            raise WireError(f"{want.name} holds a value that is not finite")
    return tensors


def checksums(slices: Sequence[Tensor]) -> list[int]:
    """Of bytes whose number is a multiple of ``ALIGNMENT``: CRC-32 on a CPU, on a GPU ``fold``, all with one wait for it."""
    if not slices or slices[0].device.type == "cpu":
        return [zlib.crc32(piece.numpy().data) for piece in slices]
    found: list[int] = torch.stack([fold(piece) for piece in slices]).tolist()
    return [value % 2**64 for value in found]


def fold(data: Tensor) -> Tensor:
    """An int64 of bytes: the sum of their int32 words, each times a weight of its place, modulo 2^64.

    No change of one word leaves it as it was, and neighbours do not make up for each other.
    """
    words = torch.nn.functional.pad(data, (0, -len(data) % (4 * _ROW))).view(torch.int32).view(-1, _ROW)
    columns, rows = words.sum(0, dtype=torch.int64), words.sum(1, dtype=torch.int64)
    weight = torch.arange(1, max(words.shape) + 1, device=data.device)
    return (columns * weight[:_ROW]).sum() + _ROW * (rows * weight[: len(rows)]).sum()


async def on_thread(work: Callable[[], T], discard: Callable[[T], object] = lambda _: None) -> T:
    """What ``work`` returns, from a thread of its own. One that hangs keeps nobody, not even the interpreter.

    ``discard`` gets a result that nobody waits for any more.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def deliver(result: T) -> None:
        if done.done():
            discard(result)
        else:
            done.set_result(result)

    def fail(error: Exception) -> None:
        if not done.done():
            done.set_exception(error)

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised by whoever waits
            _tell(loop, fail, error)
        else:
            if not _tell(loop, deliver, result):
                discard(result)

    threading.Thread(target=run, name="pair", daemon=True).start()
    return await done


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[[Any], None], value: object) -> bool:
    """False if the loop was closed meanwhile."""
    try:
        loop.call_soon_threadsafe(what, value)
    except RuntimeError:
        return False
    return True


def _slices(buffer: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    ends = list(accumulate(sizes))
    return [buffer[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _fill(piece: Tensor, tensor: Tensor) -> None:
    """Copy a tensor's bytes to the front of a piece; what lies behind them becomes zero."""
    piece[tensor.nbytes :].zero_()
    if not tensor.nbytes:
        return
    data = tensor.contiguous().view(-1).view(torch.uint8)
    if piece.device.type == "cpu":
        np.copyto(piece[: len(data)].numpy(), data.numpy())
    else:
        piece[: len(data)].copy_(data)


def _finite(tensors: Sequence[Tensor]) -> list[bool]:
    if not tensors or tensors[0].device.type == "cpu":
        return [is_finite(tensor.contiguous().view(-1).view(torch.uint8).numpy(), dtype_name(tensor.dtype)) for tensor in tensors]
    found: list[bool] = torch.stack([tensor.isfinite().all() for tensor in tensors]).tolist()
    return found


def _empty(head: TensorHead, device: torch.device) -> Tensor:
    return torch.empty(head.shape, dtype=DTYPES[head.dtype], device=device)


def _padded(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _gloo(store: Store, rank: int, own_host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stub calls it Options
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_host)]
    options._timeout = timedelta(seconds=MEET_S)
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Store, rank: int) -> Any:
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # torch's watchdog would end this process when a peer is lost
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=MEET_S)
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
