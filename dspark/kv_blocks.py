"""KV blocks that go from one verifier to another, as nouns: ``workers/verifier`` makes and takes them, ``workers/wire`` carries them.

A block is known by the hash of its whole prefix (``workers/blocks.py``), so what moves is a piece of the prefix cache: it is right
for whoever asks for the same tokens, and superfluous at worst. The giver keeps nothing for the taker, and the taker's request
does not depend on it: whatever does not arrive is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from dspark.types import Request


@dataclass(frozen=True, slots=True)
class BlockPart:
    """What one pool keeps of a block: ``shape`` values of ``dtype``. The target's layers and the drafter have pools."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What both ends must agree on. ``identity`` names the target's and the drafter's weights."""

    identity: str
    block_size: int
    parts: tuple[BlockPart, ...]

    def mismatch(self, other: KVLayout) -> str | None:
        """Why blocks of ``other`` are of no use here; None if they fit."""
        for name in ("identity", "block_size"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} is {getattr(self, name)!r} here and {getattr(other, name)!r} there"
        if self.parts != other.parts:
            here, there = set(self.parts), set(other.parts)
            return f"the pools differ: only here {_names(here - there)}; only there {_names(there - here)}"
        return None


@dataclass(frozen=True, slots=True)
class KVBlocks:
    """Consecutive blocks of a prefix, from the block ``first`` on: by the name of each part a tensor [n, *shape].

    They are on the host, or where the engine has them: whoever takes blocks takes both.
    """

    first: int
    count: int
    parts: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parts.values())


@dataclass(frozen=True, slots=True)
class TransferStats:
    """One fetch: how many blocks and bytes came, and how long it took in all."""

    blocks: int
    num_bytes: int
    seconds: float


@runtime_checkable
class KeepsBlocks(Protocol):
    """A drafter that keeps context under the target's block ids."""

    def block_pools(self) -> dict[str, Any]:
        """Its pools by name: tensors [num_blocks, ...], as views that can be written to."""


class KVExchange(Protocol):
    """What a verifier's engine offers to move blocks; all methods are thread-safe, their work is done between two steps.

    ``device`` is where its pools are.
    """

    layout: KVLayout
    device: str

    def prefix(self, request: Request) -> Sequence[bytes]:
        """Hashes of the blocks that the prefix cache could find for a request."""

    def held(self, hashes: Sequence[bytes]) -> Future[int]:
        """How many leading blocks of a prefix are here."""

    def give(self, hashes: Sequence[bytes], first: int, on_device: bool = False) -> Future[KVBlocks]:
        """Copies of the blocks from ``first`` on, as far as they are here; on the host, or complete on ``device``."""

    def take(self, hashes: Sequence[bytes], blocks: KVBlocks) -> Future[int]:
        """Put blocks into the prefix cache; how many found room."""

    def stats(self) -> dict[str, float]:
        """Counters by name."""

    def note(self, stats: TransferStats | None) -> None:
        """Count a fetch; None: one that failed."""

    def note_fallback(self) -> None:
        """Count a fetch that went over gRPC because no pair could be had."""


def _names(parts: set[BlockPart]) -> str:
    return ", ".join(sorted(f"{part.name} {part.dtype} {list(part.shape)}" for part in parts)) or "none"
