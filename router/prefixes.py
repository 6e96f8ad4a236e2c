"""Which replica probably holds a prompt's prefix: an index of what this router sent where, by salted hashes."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Final

CHUNK_TOKENS: Final = 64  # coarser than KV blocks: the index only steers, the replica knows
MAX_CHUNKS: Final = 64  # of a prompt; more would cost time and hardly change the choice


class PrefixIndex:
    """Remembers the last ``capacity`` prefix chunks and where they went. Chunks of different salts never match."""

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._holders: OrderedDict[bytes, dict[str, None]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def holders(self, keys: Sequence[bytes]) -> list[Collection[str]]:
        """Who holds each chunk, up to the first that nobody holds. Whoever holds a chunk holds all before it."""
        found: list[Collection[str]] = []
        for key in keys:
            holders = self._holders.get(key)
            if holders is None:
                break
            found.append(holders)
        return found

    def add(self, keys: Sequence[bytes], replica_id: str) -> None:
        """Note that ``replica_id`` computes these chunks, a prompt's first ones; the chunks least recently sent are forgotten.

        Chunks are forgotten with all of their holders and from a chain's end, so what is left of a chain is its start.
        """
        for key in reversed(keys):  # the first chunk is the most recent one: a chain is forgotten from its end
            self._holders.setdefault(key, {})[replica_id] = None
            self._holders.move_to_end(key)
        while len(self._holders) > self._capacity:
            self._holders.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """Drop a replica that is gone, and every chunk that nobody else holds."""
        for key in [key for key, holders in self._holders.items() if replica_id in holders]:
            del self._holders[key][replica_id]
            if not self._holders[key]:
                del self._holders[key]


def tokens_held(holders: Sequence[Collection[str]], replica_id: str) -> int:
    """Tokens of the prefix that a replica probably holds."""
    low, high = 0, len(holders)
    while low < high:
        middle = (low + high) // 2
        if replica_id in holders[middle]:
            low = middle + 1
        else:
            high = middle
    return low * CHUNK_TOKENS


def chunk_keys(tokens: Sequence[int], salt: str = "") -> list[bytes]:
    """Chained sha256 keys of the prompt's whole chunks: equal keys mean equal tokens from the start, and equal salts."""
    digest = hashlib.sha256(salt.encode())
    keys = []
    for start in range(0, min(len(tokens) - CHUNK_TOKENS + 1, CHUNK_TOKENS * MAX_CHUNKS), CHUNK_TOKENS):
        digest.update(array("q", tokens[start : start + CHUNK_TOKENS]).tobytes())
        keys.append(digest.digest()[:16])
    return keys
