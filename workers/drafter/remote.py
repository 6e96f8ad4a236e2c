"""The seam's far side on other machines: features out, trees in.

Taps are projected here (W_c), so a token costs d values on the wire. Everything that a worker may come to lack is kept:
tokens, and the features of every position under the target's block ids. A request is drafted for by one worker as long as
that can be relied on, then by another, or by none: its drafts are then empty, or those of the fallback.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

import torch
from torch import Tensor

from dspark.drafting import FULL_RETRY_S, DraftBatch, Held
from dspark.kv_blocks import KeepsBlocks
from dspark.types import BlockTables, Drafter, DraftTree, DraftTurn, FedStep
from dspark.workers.drafter.draft_links import DraftLink, DraftLinks, Round, RoundTimes
from dspark.workers.drafter.feature_store import FeatureStore
from dspark.workers.drafter.grafted import FeatureProjection
from dspark.workers.drafter.local import num_usable

MAX_BATCH_BYTES: Final = 4 * 2**20  # features of one batch; what a worker lacks beyond that goes with the next ones
CATCH_UP: Final = 8  # positions that are sent together of requests that nothing is drafted for

Assign = Callable[[str, Mapping[str, int]], str]  # request id, requests that each usable worker has -> the worker for this one


@dataclass(slots=True)
class _Request:
    """One live request, and what its worker was sent of it: tokens and features below the two marks.

    ``num_features``: features of positions below are in the store. ``since`` is the first batch that was sent knowing what
    the worker holds: what answers to earlier batches say of it is out of date. ``awaited`` is the batch that asked for a draft
    for the present ``base_len``, ``tree`` that draft once it came.
    """

    turn: DraftTurn
    tokens: list[int]
    num_features: int = 0
    link: DraftLink | None = None
    tokens_sent: int = 0
    features_sent: int = 0
    since: int = 0
    awaited: int | None = None
    tree: DraftTree | None = None
    shunned: str = ""  # a worker that had no room for it,
    shunned_until_s: float = 0.0

    @property
    def num_behind(self) -> int:
        """Features that its worker was not sent yet."""
        return self.num_features - self.features_sent


class FeatureFeed:
    """Keeps the features of a target's step where the step writes its KV."""

    def __init__(self, projection: FeatureProjection, store: FeatureStore) -> None:
        self._projection, self._store = projection, store

    def __call__(self, taps: Tensor, ids: Tensor, positions: Tensor, step: FedStep) -> None:
        self._store.write_slots(self._projection.project(taps), step.slots)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """The features of slots go to other slots, as the target's KV does."""
        self._store.move(sources, targets)


@dataclass(slots=True)
class RemoteCounters:
    """Totals since start."""

    batches: int = 0
    positions_sent: int = 0  # features
    trees: int = 0
    stale: int = 0  # drafts that came for another base_len
    misses: int = 0  # waits that ended without the drafts
    wait_s: float = 0.0
    worker_s: float = 0.0  # computing at workers, as they say


class RemoteDrafter:
    """Drafts by the workers of ``links``; ``assign`` says which of them drafts for a request that has none.

    ``fallback`` is fed with every turn, and drafts for requests without a draft in time. With ``feeds`` features are kept by the
    target's forward itself, and turns bring none; a fallback would lack them.
    """

    def __init__(
        self,
        projection: FeatureProjection,
        tables: BlockTables,
        links: DraftLinks,
        assign: Assign,
        fallback: Drafter | None = None,
        feeds: bool = False,
    ) -> None:
        if feeds and fallback is not None:
            raise ValueError("a fallback needs the features that turns bring")
        config, weight = projection.config, projection.fc.weight
        self.block_size = config.block_size
        self.taps = config.target_layer_ids
        self.signals = projection.signals
        self.projection = projection
        self.links = links
        self.store = FeatureStore(tables, config.hidden_size, weight.dtype, weight.device)
        self.feed = FeatureFeed(projection, self.store) if feeds else None
        self.counters = RemoteCounters()
        self.on_round: Callable[[Round], None] | None = None  # hears of every answered batch
        self._times = RoundTimes()
        self._assign = assign
        self._fallback = fallback
        self._requests: dict[str, _Request] = {}

    @torch.no_grad()
    def project(self, taps: Any) -> Tensor:
        """Context features [n, d] of concatenated taps [n, len(taps) * d]."""
        return self.projection.project(taps)

    @torch.no_grad()
    def propose(self, turns: Sequence[DraftTurn]) -> None:
        """Send what is new, and what workers were found to lack, to the worker of each request; waits for nothing.

        Of requests that nothing is drafted for, only when it is worth a message.
        """
        self._absorb()
        self.store.write(turns)
        if self._fallback is not None:
            self._fallback.propose(turns)
        usable = self.links.usable()
        batches: dict[str, list[_Request]] = {}
        for turn in turns:
            request = self._advance(turn)
            if request is None or self._bind(request, usable) is None or request.link is None:
                continue
            if turn.max_draft or request.num_behind >= CATCH_UP:
                batches.setdefault(request.link.worker_id, []).append(request)
        for worker_id, requests in batches.items():
            self._send(usable[worker_id], requests)

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """Drafts that are there, waiting at most ``wait_s`` for those that were asked for; each has at most ``want[id]`` tokens."""
        self._absorb()
        self._wait([request for request_id in want if (request := self._requests.get(request_id))], wait_s)
        trees = {}
        for request_id, limit in want.items():
            request = self._requests.get(request_id)
            if request is not None and request.tree is not None and limit > 0:
                trees[request_id] = request.tree.first(limit)
        self.counters.trees += len(trees)
        if self._fallback is not None and (missing := {name: limit for name, limit in want.items() if name not in trees}):
            trees |= self._fallback.collect(missing, 0.0)
        return trees

    def close(self, request_ids: Sequence[str]) -> None:
        """Forget requests that ended, here and at their workers."""
        closed: dict[DraftLink, list[str]] = {}
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None and request.link is not None:
                closed.setdefault(request.link, []).append(request_id)
        for link, ids in closed.items():
            link.close_requests(ids)
        if self._fallback is not None:
            self._fallback.close(request_ids)

    def round_seconds(self, num_requests: int) -> float:
        """How long it takes lately from ``propose`` until the drafts of that many requests are there."""
        return self._times(num_requests)

    def block_pools(self) -> dict[str, Tensor]:
        """What is kept under the target's block ids, by name: [num_blocks, ...]."""
        own = {"features": self.store.by_block()}
        return own | (self._fallback.block_pools() if isinstance(self._fallback, KeepsBlocks) else {})

    def end(self) -> None:
        """End the streams to all workers, for good."""
        self.links.close()

    def stats(self) -> dict[str, float]:
        """Counters and gauges for metrics."""
        sent, received = self.links.num_bytes
        counters = self.counters
        return {
            "draft_workers": len(self.links.links),
            "draft_workers_usable": len(self.links.usable()),
            "draft_workers_lost_total": self.links.num_lost,
            "draft_batches_total": counters.batches,
            "draft_bytes_sent_total": sent,
            "draft_bytes_received_total": received,
            "draft_positions_sent_total": counters.positions_sent,
            "draft_trees_total": counters.trees,
            "draft_stale_total": counters.stale,
            "draft_misses_total": counters.misses,
            "draft_wait_seconds_total": counters.wait_s,
            "draft_worker_seconds_total": counters.worker_s,
        }

    def _advance(self, turn: DraftTurn) -> _Request | None:
        """The request as of this turn; None, and forgotten, if tokens are missing."""
        request = self._requests.get(turn.request_id)
        has_all = len(turn.tokens) == turn.base_len
        if request is not None and has_all and request.tokens != list(turn.tokens[: len(request.tokens)]):
            self.close([turn.request_id])
            request = None
        if request is None and has_all:
            request = self._requests[turn.request_id] = _Request(turn, [])
        num_new = turn.base_len - len(request.tokens) if request is not None else -1
        if request is None or not 0 <= num_new <= len(turn.tokens):
            self.close([turn.request_id])
            return None
        request.tokens.extend(turn.tokens[len(turn.tokens) - num_new :])
        request.turn, request.awaited, request.tree = turn, None, None
        if self.feed is not None:
            request.num_features = min(turn.num_computed, turn.base_len - 1)
        elif turn.features is not None:
            request.num_features = turn.feature_start + max(0, num_usable(turn))
        return request

    def _bind(self, request: _Request, usable: Mapping[str, DraftLink]) -> DraftLink | None:
        """The link that drafts for the request: its own as long as that can be used and does not drain, else another one."""
        link = request.link
        if link is not None and usable.get(link.worker_id) is link:
            return link
        if link is not None and link.is_open and not usable:
            return None  # it may be used again later, with what it holds
        is_shunned = self.links.clock() < request.shunned_until_s
        names = [name for name in usable if not (is_shunned and name == request.shunned)]
        if not names:
            return None
        if link is not None:
            link.close_requests([request.turn.request_id])
        counts = Counter(other.link.worker_id for other in self._requests.values() if other is not request and other.link is not None)
        request.link = usable[self._assign(request.turn.request_id, {name: counts[name] for name in names})]
        # The worker is taken to have the prefix that the verifier found in its cache; if it has less it says so.
        request.tokens_sent, request.features_sent = 0, request.turn.feature_start
        request.since = request.link.next_seq
        return request.link

    def _send(self, link: DraftLink, requests: list[_Request]) -> None:
        """One batch for requests of a link; those that need least come first, so that a long catch-up holds nobody up."""
        room = MAX_BATCH_BYTES // self.store.bytes_per_position
        spans = []
        requests.sort(key=lambda request: request.num_behind)
        for request in requests:
            count = min(max(0, request.num_behind), room)
            room -= count
            spans.append((request.turn.request_id, request.features_sent, count))
        features, wait_ready = self._read([span for span in spans if span[2]])
        parts = iter(torch.split(features, [count for _, _, count in spans if count]))
        turns = [_turn(request, next(parts) if count else None, count) for request, (_, _, count) in zip(requests, spans, strict=True)]
        seq = link.send(turns, wait_ready)
        for request, turn, (_, _, count) in zip(requests, turns, spans, strict=True):
            request.tokens_sent = turn.base_len
            request.features_sent += count
            request.awaited = seq if turn.max_draft else None
        self.counters.batches += 1
        self.counters.positions_sent += sum(count for _, _, count in spans)

    def _read(self, spans: Sequence[tuple[str, int, int]]) -> tuple[Tensor, Callable[[], None]]:
        """Features of some spans on the host, and what to call before they are looked at."""
        if not spans:
            return torch.empty(0), _ready
        rows = self.store.read(spans)
        if not rows.is_cuda:
            return rows, _ready
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return host, copied.synchronize

    def _wait(self, requests: Iterable[_Request], wait_s: float) -> None:
        """Give the workers of these requests ``wait_s``; note which of them kept it."""
        awaited = {
            (request.link, request.awaited)
            for request in requests
            if request.link is not None and request.awaited is not None and request.tree is None
            if request.link.is_open and not request.link.is_overdue
        }
        if not awaited or wait_s <= 0:
            return
        started_s = self.links.clock()
        self.links.wait_answered(awaited, wait_s)
        now_s = self.links.clock()
        self.counters.wait_s += now_s - started_s
        late = {link: seq for link, seq in sorted(awaited, key=itemgetter(1)) if seq in link.pending}
        for link, seq in late.items():
            link.miss(seq, now_s)
            self.counters.misses += 1
        for link in {link for link, _ in awaited if link.is_open} - late.keys():
            link.trust.keep()
        self._absorb()

    def _absorb(self) -> None:
        """Take in what the workers have answered."""
        for link in self.links.links:
            for batch, round_ in link.take():
                self._note(round_)
                for held in batch.held:
                    self._correct(link, batch, held)
                for tree in batch.trees:
                    request = self._requests.get(tree.request_id)
                    if request is None or request.link is not link or batch.seq < request.since or tree.base_len != request.turn.base_len:
                        self.counters.stale += 1
                    else:
                        request.tree = tree

    def _note(self, round_: Round) -> None:
        self.counters.worker_s += round_.worker_s
        if round_.num_drafting:
            self._times.observe(round_.num_drafting, round_.answered_s - round_.sent_s)
        if self.on_round is not None:
            self.on_round(round_)

    def _correct(self, link: DraftLink, batch: DraftBatch, held: Held) -> None:
        """Go on from what the worker holds."""
        request = self._requests.get(held.request_id)
        if request is None or request.link is not link or batch.seq < request.since:
            return
        if held.is_full:
            request.link, request.shunned, request.shunned_until_s = None, link.worker_id, self.links.clock() + FULL_RETRY_S
            return
        if held.known < request.tokens_sent or held.have < request.features_sent:
            request.since = link.next_seq
        request.tokens_sent = min(held.known, len(request.tokens))
        request.features_sent = held.have


def _turn(request: _Request, features: Tensor | None, count: int) -> DraftTurn:
    """What the worker is told: tokens and features from where it is, and a draft only if it will have all the context."""
    turn = request.turn
    is_complete = request.features_sent + count >= turn.base_len - 1
    return DraftTurn(
        request_id=turn.request_id,
        base_len=turn.base_len,
        tokens=tuple(request.tokens[request.tokens_sent :]),
        feature_start=request.features_sent,
        features=features,
        max_draft=turn.max_draft if is_complete else 0,
        sampling=turn.sampling,
        noise_seed=turn.noise_seed,
        max_nodes=turn.max_nodes,
        cache_salt=turn.cache_salt,
    )


def _ready() -> None:
    """Nothing to wait for."""
