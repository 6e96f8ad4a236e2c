"""Whether KV of a prefix should be fetched from a replica that has it instead of being computed. Pure.

Computing costs prefill seconds a token, by the replica's own measurement. Fetching costs a round trip, the bytes, and a
moment of two engines; how fast it goes is measured by every fetch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from dspark.router.prefixes import CHUNK_TOKENS, tokens_held

LATENCY_S: Final = 0.02  # of a fetch without bytes
FIRST_BYTES_PER_S: Final = 100e6  # until fetches have been measured
MEASURED_BYTES: Final = 1 << 20  # fetched, after which the measured speed counts
MIN_GAIN: Final = 1.5  # computing must take this many times as long


def pays(num_tokens: int, prefill_token_s: float, bytes_per_token: float, bytes_per_s: float) -> bool:
    """Whether fetching that many tokens is predicted to be clearly faster than computing them; not where the cost is unknown."""
    if num_tokens <= 0 or bytes_per_token <= 0:
        return False
    fetch_s = LATENCY_S + num_tokens * bytes_per_token / bytes_per_s
    return num_tokens * prefill_token_s > MIN_GAIN * fetch_s


def speed(fetched_bytes: float, fetch_s: float) -> float:
    """Bytes a second of a replica's fetches so far."""
    return fetched_bytes / fetch_s if fetched_bytes >= MEASURED_BYTES and fetch_s > 0 else FIRST_BYTES_PER_S


def longest_holder(holders: Sequence[Collection[str]], replica_id: str, can_give: Callable[[str], bool]) -> tuple[str, int] | None:
    """(Another replica that holds more of a prefix than ``replica_id``, how many tokens more); None if there is none."""
    held = tokens_held(holders, replica_id)
    for count in range(len(holders), held // CHUNK_TOKENS, -1):
        for name in sorted(holders[count - 1]):
            if name != replica_id and can_give(name):
                return name, count * CHUNK_TOKENS - held
    return None
