"""KV blocks: a fixed pool with reference counts and a prefix cache over chained sha256 hashes.

A block holds the KV of ``block_size`` consecutive positions of one token prefix. A full block of committed tokens may be
registered under the hash of its whole prefix; another request with the same prefix (and the same cache salt) then shares it.
A registered block whose last user left stays in the cache until its memory is needed (least recently used first).
Drafters keep their own KV under the same block ids, so a hit restores both (docs/tour.md).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_SIZE = 16


def root_hash(cache_salt: str) -> bytes:
    """The hash before the first block; requests with different salts never share blocks."""
    return hashlib.sha256(b"dspark-kv-1:" + cache_salt.encode()).digest()


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a prefix that ends with the block ``tokens``, given the hash of the prefix before it."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], num_blocks: int, block_size: int, cache_salt: str) -> None:
    """Bring the chained hashes of the full blocks of ``tokens`` up to ``num_blocks``: the name of a prefix wherever its KV is kept."""
    for index in range(len(hashes), num_blocks):
        parent = hashes[-1] if hashes else root_hash(cache_salt)
        hashes.append(chain_hash(parent, tokens[index * block_size : (index + 1) * block_size]))


class BlockPool:
    """Hands out blocks to requests; every method leaves the invariants of ``check`` intact."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._clean = list(range(num_blocks - 1, -1, -1))  # free and unregistered, next on top
        self._idle: OrderedDict[int, None] = OrderedDict()  # free but registered, oldest first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._tables: dict[str, array[int]] = {}  # of 32-bit integers, so that they are copied to a device as they are

    @property
    def num_free(self) -> int:
        """Blocks that a request could get now, cached ones without users included."""
        return len(self._clean) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that the prefix cache can find."""
        return len(self._block_of)

    def table(self, request_id: str) -> Sequence[int]:
        """Physical block ids of an open request, in order: an ``array`` of 32-bit integers."""
        return self._tables[request_id]

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks ``num_tokens`` positions take."""
        return -(-num_tokens // self.block_size)

    def count_hits(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a prefix are cached."""
        return len(self.find(hashes))

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The leading blocks of a prefix that are cached, in order."""
        blocks: list[int] = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def open(self, request_id: str, hashes: Sequence[bytes]) -> int:
        """Begin a table that shares the cached leading blocks; returns how many blocks were found."""
        assert request_id not in self._tables, f"{request_id} is open already"
        blocks = self.find(hashes)
        for block in blocks:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1
        self._tables[request_id] = array("i", blocks)
        return len(blocks)

    def grow(self, request_id: str, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` positions; False, with nothing changed, if the pool cannot."""
        table = self._tables[request_id]
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._clean.pop() if self._clean else self._evict()
            self._refs[block] = 1
            table.append(block)
        return True

    def shrink(self, request_id: str, num_tokens: int) -> None:
        """Give back the blocks beyond ``num_tokens`` positions."""
        table = self._tables[request_id]
        keep = self.blocks_for(num_tokens)
        while len(table) > keep:
            self._unref(table.pop())

    def release(self, request_id: str) -> None:
        """End a table. Its registered blocks stay findable; the tail goes first when memory is needed."""
        for block in reversed(self._tables.pop(request_id)):
            self._unref(block)

    def register(self, request_id: str, index: int, digest: bytes) -> None:
        """Let the prefix cache find the full, committed block ``index`` of a request under ``digest``."""
        block = self._tables[request_id][index]
        if digest in self._block_of or block in self._hash_of:
            return  # an equal block is known already; this copy stays private
        self._block_of[digest] = block
        self._hash_of[block] = digest

    def clear_cache(self) -> None:
        """Forget every cached prefix; running requests keep their blocks."""
        self._block_of.clear()
        self._hash_of.clear()
        self._clean.extend(self._idle)
        self._idle.clear()

    def check(self) -> None:
        """Raise AssertionError unless held + free = all and the reference counts add up."""
        refs = [0] * self.num_blocks
        for table in self._tables.values():
            for block in table:
                refs[block] += 1
        assert refs == self._refs, "reference counts differ from the tables"
        free = [*self._clean, *self._idle]
        assert len(free) == len(set(free)), "a block is free twice"
        assert sorted(free) == [b for b in range(self.num_blocks) if refs[b] == 0], "held + free is not all"
        assert all(block in self._hash_of for block in self._idle), "an idle block has no hash"
        assert not any(block in self._hash_of for block in self._clean), "a clean block is registered"
        assert {d: b for b, d in self._hash_of.items()} == self._block_of, "the two hash maps differ"

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def _unref(self, block: int) -> None:
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if block in self._hash_of:
                self._idle[block] = None
            else:
                self._clean.append(block)
