"""Which verifier a request goes to: pure functions over ``ReplicaView``; no clocks, no I/O.

The order: replicas that are predicted to keep the request's latency budget come first, the least loaded of them before the
others; where none is, the one that misses it by the least. A request without a budget goes to the least loaded. Load is
the predicted time to the request's first token, so a replica that holds the request's prefix counts as less loaded.

(The other way, filling the fullest replica that still keeps the budget, packs better and was refused: predictions are a
quarter of a second old, routers do not see each other's choices, and the fullest replica is the one that a wrong
prediction pushes over its budgets.)

Up to ``FULL_SCAN`` replicas are all compared. Beyond, a few are drawn by a hash of the request, and a few of those that
hold the longest part of its prefix: comparing even two random ones does nearly as well as comparing all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from dspark.router.predict import NOTHING_SENT, Ask, Prediction, Sent, predict
from dspark.router.prefixes import PrefixIndex
from dspark.types import ReplicaView

MAX_AGE_S: Final = 10.0  # views come four times a second; an older one says little about the load now
FULL_SCAN: Final = 16
DRAWN: Final = 3  # replicas drawn by hash
DRAWN_HOLDERS: Final = 2  # of those that hold the longest part of the prefix
MAX_HOLDERS: Final = 64  # looked at for that
SEARCH: Final = 32  # replicas compared before the budget counts as one that nobody can keep


@dataclass(frozen=True, slots=True)
class Standing:
    """A replica as a router sees it: its own view, and what was sent there since."""

    view: ReplicaView
    sent: Sent = NOTHING_SENT


Look = Callable[[str], Standing | None]  # None: the replica takes no requests now


def choose(ask: Ask, replica_ids: Sequence[str], look: Look, prefixes: PrefixIndex) -> Iterator[Prediction]:
    """Every replica that takes requests, best first, as far as somebody reads on.

    The first one is the choice: if it is late, no replica is known that keeps the budget. Replicas beyond the compared ones
    follow in groups, each ordered by itself: they are for a request that the first ones refuse.
    """
    compared: list[tuple[Standing, Prediction]] = []
    num_seen = 0
    groups = _groups(ask, replica_ids, prefixes)
    for group in groups:
        num_seen += len(group)
        compared += _predictions(ask, group, look, prefixes)
        if num_seen >= SEARCH or any(not p.is_late and standing.view.age_s <= MAX_AGE_S for standing, p in compared):
            break
    yield from _ordered(ask, compared)
    for group in groups:
        yield from _ordered(ask, _predictions(ask, group, look, prefixes))


def _predictions(ask: Ask, group: Sequence[str], look: Look, prefixes: PrefixIndex) -> list[tuple[Standing, Prediction]]:
    standings = [standing for replica_id in group if (standing := look(replica_id)) is not None and not standing.view.draining]
    hits = prefixes.hits(ask.keys, [standing.view.id for standing in standings]) if ask.keys else {}
    return [
        (standing, predict(standing.view, ask, max(ask.num_tokens - hits.get(standing.view.id, 0), 1), standing.sent))
        for standing in standings
    ]


def _ordered(ask: Ask, compared: Sequence[tuple[Standing, Prediction]]) -> list[Prediction]:
    """Fresh before stale, within the budget before over it, then by load; equal ones by a hash of request and replica.

    The hash keeps several routers with the same views from all choosing the same replica.
    """
    if len(compared) == 1:
        return [compared[0][1]]
    keyed = [
        (standing.view.age_s > MAX_AGE_S, max(prediction.lateness, 1.0), prediction.ttft_s, _tie(ask.id, prediction.replica_id), prediction)
        for standing, prediction in compared
    ]
    keyed.sort(key=lambda entry: entry[:4])
    return [entry[4] for entry in keyed]


def _groups(ask: Ask, replica_ids: Sequence[str], prefixes: PrefixIndex) -> Iterator[list[str]]:
    """All replicas in groups: the drawn ones, then the rest from a drawn place on."""
    count = len(replica_ids)
    if count <= FULL_SCAN:
        yield list(replica_ids)
        return
    draw = hashlib.blake2b(ask.id.encode(), digest_size=4 * (DRAWN + DRAWN_HOLDERS + 1)).digest()
    numbers = [int.from_bytes(draw[i : i + 4], "little") for i in range(0, len(draw), 4)]
    first = {replica_ids[number % count]: None for number in numbers[:DRAWN]}
    holders = list(islice(prefixes.longest(ask.keys), MAX_HOLDERS))
    for number in numbers[DRAWN : DRAWN + DRAWN_HOLDERS]:
        if holders:
            first[holders[number % len(holders)]] = None
    yield list(first)
    start = numbers[-1] % count
    rest = (replica_ids[(start + i) % count] for i in range(count))
    others = (replica_id for replica_id in rest if replica_id not in first)
    while group := list(islice(others, FULL_SCAN)):
        yield group


def _tie(request_id: str, replica_id: str) -> bytes:
    return hashlib.blake2b(f"{request_id}\0{replica_id}".encode(), digest_size=8).digest()
