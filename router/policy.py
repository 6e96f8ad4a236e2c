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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Final

from dspark.router.predict import NOTHING_SENT, Ask, Prediction, Sent, predict
from dspark.router.prefixes import PrefixIndex, tokens_held
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


_Compared = tuple[Standing, Prediction]
Look = Callable[[str], Standing | None]  # None: the replica takes no requests now


def choose(ask: Ask, replica_ids: Sequence[str], look: Look, prefixes: PrefixIndex) -> Iterator[Prediction]:
    """Every replica that takes requests, best first, as far as somebody reads on.

    The first one is the choice: if it is late, no replica is known that keeps the budget. Replicas beyond the compared ones
    follow in groups, each ordered by itself: they are for a request that the first ones refuse.
    """
    holders = prefixes.holders(ask.keys) if ask.keys else ()
    compared: list[_Compared] = []
    num_seen = 0
    groups = _groups(ask, replica_ids, holders[-1] if holders else ())
    for group in groups:
        num_seen += len(group)
        compared += _compare(ask, group, look, holders)
        if num_seen >= SEARCH or any(not p.is_late and standing.view.age_s <= MAX_AGE_S for standing, p in compared):
            break
    is_drawn = len(replica_ids) > FULL_SCAN
    yield from _ordered(ask, compared, is_drawn)
    for group in groups:
        yield from _ordered(ask, _compare(ask, group, look, holders), is_drawn)


def _compare(ask: Ask, group: Sequence[str], look: Look, holders: Sequence[Collection[str]]) -> list[_Compared]:
    compared = []
    for replica_id in group:
        standing = look(replica_id)
        if standing is not None and not standing.view.draining:
            new_tokens = max(ask.num_tokens - tokens_held(holders, replica_id), 1)
            compared.append((standing, predict(standing.view, ask, new_tokens, standing.sent)))
    return compared


def _ordered(ask: Ask, compared: Sequence[_Compared], is_drawn: bool) -> list[Prediction]:
    """Fresh before stale, within the budget before over it, then by load; equal ones as drawn, or by a hash where none was drawn.

    Either way several routers with the same views do not all choose the same replica.
    """
    keyed = [
        (
            standing.view.age_s > MAX_AGE_S,
            max(prediction.lateness, 1.0),
            prediction.ttft_s,
            number if is_drawn else _tie(ask.id, prediction.replica_id),
            prediction,
        )
        for number, (standing, prediction) in enumerate(compared)
    ]
    keyed.sort(key=itemgetter(0, 1, 2, 3))
    return [entry[4] for entry in keyed]


def _groups(ask: Ask, replica_ids: Sequence[str], holders: Collection[str]) -> Iterator[list[str]]:
    """All replicas in groups: the drawn ones, then the rest from a drawn place on."""
    count = len(replica_ids)
    if count <= FULL_SCAN:
        yield list(replica_ids)
        return
    draw = hashlib.blake2b(ask.id.encode(), digest_size=4 * (DRAWN + DRAWN_HOLDERS + 1)).digest()
    numbers = [int.from_bytes(draw[i : i + 4], "little") for i in range(0, len(draw), 4)]
    first = {replica_ids[number % count]: None for number in numbers[:DRAWN]}
    if holders:
        most = min(len(holders), MAX_HOLDERS)
        for number in numbers[DRAWN : DRAWN + DRAWN_HOLDERS]:
            first[next(islice(holders, number % most, None))] = None
    yield list(first)
    start = numbers[-1] % count
    rest = (replica_ids[(start + i) % count] for i in range(count))
    others = (replica_id for replica_id in rest if replica_id not in first)
    while group := list(islice(others, FULL_SCAN)):
        yield group


def _tie(request_id: str, replica_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{request_id}\0{replica_id}".encode(), digest_size=8).digest(), "big")
