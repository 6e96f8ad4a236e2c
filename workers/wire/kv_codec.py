"""Layouts and blocks of ``dspark.kv_blocks`` to and from protobuf messages; whatever comes is checked before it becomes a noun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from dspark.kv_blocks import BlockPart, KVBlocks, KVLayout
from dspark.workers.wire import kv_pb2 as pb
from dspark.workers.wire.codec import WireError
from dspark.workers.wire.pair import Expected, TensorHead
from dspark.workers.wire.tensors import DTYPES, tensor_from_wire, tensor_to_wire

KV_PROTOCOL: Final = 1
HASH_BYTES: Final = 32
MAX_HASHES: Final = 65536  # a million tokens in blocks of 16
MAX_PARTS: Final = 4096
MAX_NAME_CHARS: Final = 256
MAX_DIMENSIONS: Final = 6
MAX_BLOCK_BYTES: Final = 64 * 2**20
MAX_CHUNK_BYTES: Final = MAX_BLOCK_BYTES + 2**20  # of one message: at least a block
PAIR_CHUNK_BYTES: Final = 64 * 2**20  # of what goes through a pair at once, or one block
MAX_PADDING_BYTES: Final = 16 * MAX_PARTS


def layout_to_wire(layout: KVLayout) -> pb.Layout:
    """The message of a layout."""
    parts = [pb.Part(name=part.name, dtype=part.dtype, shape=part.shape) for part in layout.parts]
    return pb.Layout(identity=layout.identity, block_size=layout.block_size, parts=parts)


def layout_from_wire(message: pb.Layout) -> KVLayout:
    """A checked layout."""
    if len(message.parts) > MAX_PARTS or len(message.identity) > MAX_NAME_CHARS:
        raise WireError("a layout is too large")
    for part in message.parts:
        if len(part.name) > MAX_NAME_CHARS or part.dtype not in DTYPES or len(part.shape) > MAX_DIMENSIONS:
            raise WireError("a part of a layout is malformed")
    parts = tuple(BlockPart(part.name, part.dtype, tuple(part.shape)) for part in message.parts)
    return KVLayout(message.identity, message.block_size, parts)


def hashes_from_wire(hashes: Sequence[bytes]) -> list[bytes]:
    """Checked hashes of a prefix."""
    if len(hashes) > MAX_HASHES or any(len(digest) != HASH_BYTES for digest in hashes):
        raise WireError(f"a prefix has at most {MAX_HASHES} hashes of {HASH_BYTES} bytes")
    return list(hashes)


def block_bytes(layout: KVLayout) -> int:
    """Bytes of one block over all parts."""
    return sum(torch.Size(part.shape).numel() * DTYPES[part.dtype].itemsize for part in layout.parts)


def chunk_to_wire(blocks: KVBlocks, layout: KVLayout, begin: int, end: int) -> pb.Chunk:
    """The message of the blocks ``begin`` .. ``end`` of some blocks."""
    tensors = [tensor_to_wire(blocks.parts[part.name][begin:end]) for part in layout.parts]
    return pb.Chunk(first=blocks.first + begin, count=end - begin, tensors=tensors)


def chunk_from_wire(message: pb.Chunk, layout: KVLayout, first: int, limit: int) -> KVBlocks:
    """Checked blocks that begin at ``first`` and do not go beyond ``limit``."""
    if message.first != first or not 0 < message.count <= limit - first:
        raise WireError(f"blocks {message.first} to {message.first + message.count} came, expected some of {first} to {limit}")
    if len(message.tensors) != len(layout.parts):
        raise WireError(f"{len(message.tensors)} tensors came for {len(layout.parts)} parts")
    parts = {
        part.name: tensor_from_wire(tensor, part.name, part.dtype, (message.count, *part.shape))
        for part, tensor in zip(layout.parts, message.tensors, strict=True)
    }
    return KVBlocks(first, message.count, parts)


def head_to_wire(first: int, count: int, heads: Sequence[TensorHead]) -> pb.Head:
    """The message that announces blocks through a pair."""
    tensors = [pb.TensorHead(dtype=head.dtype, shape=head.shape, length=head.length, checksum=head.checksum) for head in heads]
    return pb.Head(first=first, count=count, tensors=tensors)


def heads_from_wire(message: pb.Head, first: int, limit: int) -> list[TensorHead]:
    """What is announced of blocks that begin at ``first`` and do not go beyond ``limit``; each head is still to be checked."""
    if message.first != first or not 0 < message.count <= limit - first:
        raise WireError(f"blocks {message.first} to {message.first + message.count} are announced, expected some of {first} to {limit}")
    if len(message.tensors) > MAX_PARTS or any(len(head.shape) > MAX_DIMENSIONS + 1 for head in message.tensors):
        raise WireError("the head of a tensor is malformed")
    return [TensorHead(head.dtype, tuple(head.shape), head.length, head.checksum) for head in message.tensors]


def expected_parts(layout: KVLayout, count: int) -> list[Expected]:
    """The tensors that ``count`` blocks consist of."""
    return [Expected(part.name, part.dtype, (count, *part.shape)) for part in layout.parts]


def joined(layout: KVLayout, first: int, chunks: Sequence[KVBlocks]) -> KVBlocks:
    """Consecutive chunks as one."""
    if not chunks:
        return KVBlocks(first, 0, {})
    parts = {part.name: torch.cat([chunk.parts[part.name] for chunk in chunks]) for part in layout.parts}
    return KVBlocks(first, sum(chunk.count for chunk in chunks), parts)
