"""What a replica would make of one more request: seconds to its first token, and per token after it. No clocks, no I/O.

Both come from the replica's own step-cost table. A step computes one row of every running request (and its drafted tokens),
and fills what is left of ``max_step_tokens`` with known tokens that have no KV yet: the chunks of prefill. So the first
token waits for the tokens in line before it, for their share of steps, and, where all places are taken, for a place.

A replica without a cost table is measured in tokens instead of seconds: good for comparing such replicas with each other,
and no reason to call anything late.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

from dspark.types import LatencyBudget, ReplicaView

TYPICAL_OUTPUT_TOKENS: Final = 128.0  # of a request whose length nobody knows yet
FIXED_STEP_TOKENS: Final = 32.0  # without a table: what a step costs besides its tokens, in tokens
BLOCK_SIZE: Final = 16


@dataclass(frozen=True, slots=True)
class Sent:
    """What a replica's view does not show yet: requests that this router sent and their tokens, and requests that have ended."""

    requests: int = 0
    tokens: int = 0
    ended: int = 0


NO_BUDGET: Final = LatencyBudget()
NOTHING_SENT: Final = Sent()


@dataclass(frozen=True, slots=True)
class Ask:
    """What routing knows of a request: its known tokens, the keys of their prefix chunks, how urgent it is, and its budget."""

    id: str
    num_tokens: int
    budget: LatencyBudget = NO_BUDGET
    priority: int = 0
    keys: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a replica would make of a request. ``lateness``: the worse of predicted / promised; 0 if nothing is promised or known."""

    replica_id: str
    ttft_s: float
    tpot_s: float
    lateness: float

    @property
    def is_late(self) -> bool:
        return self.lateness > 1.0


def predict(view: ReplicaView, ask: Ask, new_tokens: int, sent: Sent) -> Prediction:
    """The request on this replica, with ``new_tokens`` of its tokens to compute."""
    ttft_s = predicted_ttft(view, new_tokens, ask.priority, sent)
    tpot_s = predicted_tpot(view, max(view.running + view.queued - sent.ended, 0) + sent.requests + 1)
    return Prediction(view.id, ttft_s, tpot_s, lateness(ask.budget, ttft_s, tpot_s) if view.step_costs else 0.0)


def lateness(budget: LatencyBudget, ttft_s: float, tpot_s: float) -> float:
    """The worse of measured / promised; over 1 is late, 0 without promises."""
    worst = 0.0
    if budget.ttft_ms is not None:
        worst = 1e3 * ttft_s / budget.ttft_ms
    if budget.tpot_ms is not None:
        worst = max(worst, 1e3 * tpot_s / budget.tpot_ms)
    return worst


def predicted_ttft(view: ReplicaView, new_tokens: int, priority: int, sent: Sent) -> float:
    """Seconds until a request with ``new_tokens`` tokens to compute yields its first token, those in line before it included.

    Less urgent requests that wait are not before it; running ones are, and none of them is stopped for it.
    """
    behind_requests = behind_tokens = 0
    for waiting_priority, requests, tokens in view.waiting:
        if waiting_priority > priority:
            behind_requests += requests
            behind_tokens += tokens
    still_there = max(view.running + view.queued - sent.ended, 0)
    ahead = max(still_there - behind_requests, 0) + sent.requests
    in_line = round((view.queued_tokens - behind_tokens) * min(1.0, still_there / max(view.queued, 1)))  # what ended was computed
    decoding = min(ahead, view.max_running)
    room = max(view.max_step_tokens - decoding, 1)
    full_steps, rest = divmod(in_line + sent.tokens + new_tokens, room)
    last_s = seconds = step_seconds(view, decoding, rest)
    if full_steps:
        seconds += full_steps * step_seconds(view, decoding, room)
    if view.running > sent.ended:
        seconds += last_s / 2  # of the step that is under way
    lacks_blocks = new_tokens > view.free_blocks * BLOCK_SIZE
    excess = max(ahead + 1 - view.max_running, int(lacks_blocks))
    return seconds + excess * seconds_per_place(view) if excess > 0 else seconds


def predicted_tpot(view: ReplicaView, rows: int) -> float:
    """Seconds per token of a request while ``rows`` requests want to run."""
    return step_seconds(view, min(rows, view.max_running), 0) / max(view.tokens_per_round, 1.0)


def seconds_per_place(view: ReplicaView) -> float:
    """Seconds until one of ``max_running`` running requests ends and leaves its place."""
    places = max(view.max_running, 1)
    return TYPICAL_OUTPUT_TOKENS * predicted_tpot(view, places) / places


def step_seconds(view: ReplicaView, rows: int, prefill_tokens: int) -> float:
    """Seconds of a step in which ``rows`` requests decode, with their drafts, beside ``prefill_tokens`` tokens of prefill.

    Drafts only fill what is left of a step.
    """
    tokens, more_s = rows, 0.0
    if view.drafted_per_round and rows:
        tokens = round(rows * (1.0 + view.drafted_per_round))
        tokens = max(min(tokens, view.max_step_tokens - prefill_tokens), rows)
        more_s = _at(view.draft_costs, rows) if view.draft_costs else 0.0
    if view.prefill_token_s:
        more_s += prefill_tokens * view.prefill_token_s
    else:
        tokens += prefill_tokens
    return verify_seconds(view, tokens) + rows * view.context_row_s + more_s


def verify_seconds(view: ReplicaView, tokens: int) -> float:
    """Seconds of a step of ``tokens`` tokens; without a table, its cost in tokens."""
    return _at(view.step_costs, tokens) if view.step_costs else FIXED_STEP_TOKENS + tokens


def _at(costs: tuple[tuple[int, float], ...], size: int) -> float:
    """The table's next larger size, and beyond the table in proportion."""
    index = bisect_left(costs, (size,))
    if index < len(costs):
        return costs[index][1]
    last, cost = costs[-1]
    return cost * size / last
