"""Which verifier a request goes to: pure functions over ``ReplicaView``; no clocks, no I/O.

The work ahead of a request is predicted in seconds from the replica's own step-cost table, or, while it has none, in
units of one token's cost. The replica with the least work comes first.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dspark.types import ReplicaView

MAX_AGE_S: Final = 10.0  # views come four times a second; an older one says little about the load now
TYPICAL_OUTPUT_TOKENS: Final = 128.0  # of a request whose length nobody knows yet
FIXED_STEP_TOKENS: Final = 32.0  # without a table: what a step costs besides its tokens, in tokens
BLOCK_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class Sent:
    """What this router has sent to a replica that the replica's view does not show yet."""

    requests: int = 0
    tokens: int = 0


def rank(
    views: Sequence[ReplicaView],
    request_id: str,
    num_tokens: int,
    hits: Mapping[str, int] | None = None,
    sent: Mapping[str, Sent] | None = None,
) -> list[str]:
    """Ids of the replicas that take new requests, best first.

    ``num_tokens`` is the length of the request's known tokens, ``hits`` how many of them each replica probably holds.
    Replicas whose view is older than ``MAX_AGE_S`` come last. Equal ones are ordered by a hash of request and
    replica, so that several routers with the same views do not all choose the same one.
    """
    hits, sent = hits or {}, sent or {}
    keyed = []
    for view in views:
        if view.draining:
            continue
        new_tokens = max(num_tokens - hits.get(view.id, 0), 1)
        work_s = predicted_work(view, new_tokens, sent.get(view.id, Sent()))
        keyed.append((view.age_s > MAX_AGE_S, work_s, _tie(request_id, view.id), view.id))
    return [replica_id for *_, replica_id in sorted(keyed)]


def predicted_work(view: ReplicaView, new_tokens: int, sent: Sent) -> float:
    """What must be computed before a request with ``new_tokens`` tokens to prefill yields its first token."""
    rows = view.running + view.queued + sent.requests
    prefill_tokens = view.queued_tokens + sent.tokens + new_tokens
    work = prefill_tokens * token_cost(view) + step_cost(view, min(rows + 1, view.max_running))
    lacks_blocks = new_tokens > view.free_blocks * BLOCK_SIZE
    excess = max(rows + 1 - view.max_running, int(lacks_blocks))
    if excess:
        steps = TYPICAL_OUTPUT_TOKENS / max(view.tokens_per_round, 1.0)
        work += excess * steps * step_cost(view, view.max_running) / max(view.max_running, 1)
    return work


def step_cost(view: ReplicaView, rows: int) -> float:
    """Cost of a step of ``rows`` tokens: the table's next larger size, and beyond the table in proportion."""
    if not view.step_costs:
        return FIXED_STEP_TOKENS + rows
    sizes = [size for size, _ in view.step_costs]
    index = bisect_left(sizes, rows)
    if index < len(sizes):
        return view.step_costs[index][1]
    size, cost = view.step_costs[-1]
    return cost * rows / size


def token_cost(view: ReplicaView) -> float:
    """Cost of one prefilled token in a large step."""
    if not view.step_costs:
        return 1.0
    size, cost = view.step_costs[-1]
    return cost / size


def _tie(request_id: str, replica_id: str) -> bytes:
    return hashlib.sha256(f"{request_id}\0{replica_id}".encode()).digest()[:8]
