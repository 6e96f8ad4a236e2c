"""Tensors as raw bytes. What arrives is checked in dtype, shape, length, checksum and finiteness before it becomes a tensor.

Nothing here starts a parallel region: transports run on threads of their own, beside an engine that owns the compute threads.
"""

from __future__ import annotations

import math
import zlib
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dspark.workers.wire import drafting_pb2 as pb
from dspark.workers.wire.codec import WireError

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int32": torch.int32}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_EXPONENTS: Final = {"bfloat16": 0x7F80, "float16": 0x7C00}  # all of them set: infinite or not a number


def tensor_to_wire(tensor: Tensor) -> pb.Tensor:
    """The message of a tensor of one of ``DTYPES``, copied to the host if it is elsewhere."""
    host = tensor.detach().cpu().contiguous()
    data = host.view(torch.uint8).numpy().tobytes() if host.numel() else b""
    return pb.Tensor(dtype=_NAMES[host.dtype], shape=host.shape, data=data, crc32=zlib.crc32(data))


def tensor_from_wire(message: pb.Tensor, name: str, dtype: str, shape: tuple[int | None, ...]) -> Tensor:
    """The tensor, on the host; WireError, naming it, unless it is whole and fits ``dtype`` and ``shape`` (None: any size)."""
    sizes = tuple(message.shape)
    if message.dtype != dtype:
        raise WireError(f"{name} is {message.dtype!r:.20}, expected {dtype}")
    if len(sizes) != len(shape) or any(want not in (None, size) for size, want in zip(sizes, shape, strict=True)):
        raise WireError(f"{name} has shape {list(sizes)[:8]}, expected {['any' if size is None else size for size in shape]}")
    if math.prod(sizes) * DTYPES[dtype].itemsize != len(message.data):
        raise WireError(f"{name} of shape {list(sizes)} has {len(message.data)} bytes")
    if zlib.crc32(message.data) != message.crc32:
        raise WireError(f"{name} has a wrong checksum")
    if not is_finite(message.data, dtype):
        raise WireError(f"{name} holds a value that is not finite")
    if not message.data:
        return torch.empty(sizes, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(message.data), dtype=DTYPES[dtype]).view(sizes)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of one of ``DTYPES``; WireError for another."""
    if dtype not in _NAMES:
        raise WireError(f"tensors of {dtype} are not sent")
    return _NAMES[dtype]


def is_finite(data: bytes | np.ndarray[tuple[int], np.dtype[np.uint8]], dtype: str) -> bool:
    """Whether no value of these bytes is infinite or not a number."""
    if dtype == "float32":
        return bool(np.isfinite(np.frombuffer(data, np.float32)).all())
    exponent = _EXPONENTS.get(dtype)
    return exponent is None or not ((np.frombuffer(data, np.uint16) & exponent) == exponent).any()
