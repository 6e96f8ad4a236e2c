"""What a draft worker does with the turns of many verifiers: keeps their context, drafts for all of them in one batch.

The worker has a block pool of its own, with the hashes that verifiers use: a prefix that any of them sent is there for all of
them. Drafting itself is ``LocalDrafter``, over that pool. Context is contiguous: features that begin beyond what is held are
left alone, and the answer says how much is held, so that the verifier can send the rest.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark.drafting import DraftBatch, Held, TurnBatch
from dspark.types import Drafter, DraftTree, DraftTurn
from dspark.workers.blocks import BlockPool, extend_hashes

Key = tuple[str, str]  # session, request id


@dataclass(slots=True)
class WorkerCounters:
    """Totals since start."""

    rounds: int = 0
    batches: int = 0
    turns: int = 0
    trees: int = 0
    drafted_tokens: int = 0
    stored_positions: int = 0  # context that was computed from features
    found_positions: int = 0  # context that the cache had
    refused: int = 0  # turns for which there was no room
    seconds: float = 0.0


@dataclass(slots=True)
class _Context:
    """One request of one session. Positions below ``have`` are in the pool, under the name ``id``; ``hashes`` are of full blocks."""

    id: str
    tokens: list[int]
    hashes: list[bytes]
    cache_salt: str
    have: int


@dataclass(slots=True)
class _Round:
    """Batches that are answered together. ``wanted``: pool id -> its last batch, its name there, how much to draft."""

    fed: list[DraftTurn] = field(default_factory=list)
    wanted: dict[str, tuple[int, str, int]] = field(default_factory=dict)

    def forget(self, context_id: str) -> None:
        self.fed = [turn for turn in self.fed if turn.request_id != context_id]
        self.wanted.pop(context_id, None)


class DraftWorker:
    """Answers rounds of batches; every call comes from one thread. ``drafter`` keeps its state under ``pool``'s block ids."""

    def __init__(self, drafter: Drafter, pool: BlockPool) -> None:
        self.drafter = drafter
        self.pool = pool
        self.counters = WorkerCounters()
        self._contexts: dict[Key, _Context] = {}
        self._num_opened = 0

    @property
    def num_requests(self) -> int:
        """Requests of all sessions that it holds context of."""
        return len(self._contexts)

    def answer(self, batches: Sequence[tuple[str, TurnBatch]]) -> list[DraftBatch]:
        """The answers to batches of (session, batch), in order; a request with several turns is drafted for once, after its last."""
        started = time.perf_counter()
        work = _Round()
        held: list[list[Held]] = [[] for _ in batches]
        for index, (session, batch) in enumerate(batches):
            for turn in batch.turns:
                if (found := self._take(work, index, session, turn)) is not None:
                    held[index].append(found)
        self.drafter.propose(work.fed)
        drafts = self.drafter.collect({name: count for name, (_, _, count) in work.wanted.items()}, 0.0) if work.wanted else {}
        trees: list[list[DraftTree]] = [[] for _ in batches]
        for name, tree in drafts.items():
            index, request_id, _ = work.wanted[name]
            trees[index].append(dataclasses.replace(tree, request_id=request_id))
        seconds = time.perf_counter() - started
        self._count(batches, drafts.values(), seconds)
        answers = zip(batches, trees, held, strict=True)
        return [DraftBatch(batch.seq, tuple(drafted), tuple(told), seconds) for (_, batch), drafted, told in answers]

    def close_requests(self, session: str, request_ids: Iterable[str]) -> None:
        """Forget requests; their full blocks stay findable until the memory is needed."""
        for request_id in request_ids:
            self._drop((session, request_id))

    def end_session(self, session: str) -> None:
        """Forget all requests of a session."""
        self.close_requests(session, [request_id for owner, request_id in self._contexts if owner == session])

    def reset(self) -> None:
        """Forget everything, what the cache holds included: for when a failure left it unknown what was written."""
        for key in list(self._contexts):
            self._drop(key)
        self.pool.clear_cache()

    def check(self) -> None:
        """AssertionError unless the pool's tables are those of the live requests."""
        self.pool.check()
        for context in self._contexts.values():
            assert len(self.pool.table(context.id)) == self.pool.blocks_for(context.have), f"{context.id} holds blocks it does not use"
        if not self._contexts:
            assert self.pool.num_free == self.pool.num_blocks, "blocks leaked"

    def _take(self, work: _Round, index: int, session: str, turn: DraftTurn) -> Held | None:
        """Put what is new in a turn into the round; what is held, if the turn implied something else."""
        key = (session, turn.request_id)
        context = self._find(work, key, turn)
        if context is None:
            return Held(turn.request_id, 0, 0)
        num_new = turn.base_len - len(context.tokens)
        if num_new > len(turn.tokens):
            return Held(turn.request_id, len(context.tokens), context.have)
        new = turn.tokens[len(turn.tokens) - num_new :]
        context.tokens.extend(new)
        start, features = context.have, _beyond(turn, context.have)
        if features is not None and not self._grow(context, start + len(features)):
            self._drop(key)
            work.forget(context.id)
            self.counters.refused += 1
            return Held(turn.request_id, 0, 0, is_full=True)
        count = turn.max_draft if context.have >= turn.base_len - 1 else 0
        work.fed.append(
            dataclasses.replace(turn, request_id=context.id, tokens=new, feature_start=start, features=features, max_draft=count)
        )
        work.wanted.pop(context.id, None)
        if count:
            work.wanted[context.id] = (index, turn.request_id, turn.max_nodes or count)
        implied = turn.feature_start + (0 if turn.features is None else len(turn.features))
        return None if context.have == implied else Held(turn.request_id, turn.base_len, context.have)

    def _find(self, work: _Round, key: Key, turn: DraftTurn) -> _Context | None:
        """The request's context, opened if the turn has all its tokens; None if it is not known, or known by other tokens."""
        begin = turn.base_len - len(turn.tokens)
        context = self._contexts.get(key)
        if context is not None:
            known = context.tokens[begin:]
            if turn.base_len >= len(context.tokens) and tuple(known) == turn.tokens[: len(known)]:
                return context
            self._drop(key)
            work.forget(context.id)
        return self._open(key, turn) if begin == 0 else None

    def _open(self, key: Key, turn: DraftTurn) -> _Context:
        """A context with what the cache has of the positions before the anchor."""
        size = self.pool.block_size
        hashes: list[bytes] = []
        extend_hashes(hashes, turn.tokens, (turn.base_len - 1) // size, size, turn.cache_salt)
        self._num_opened += 1
        context = _Context(f"{self._num_opened}:{key[1]}", [], hashes, turn.cache_salt, 0)
        context.have = self.pool.open(context.id, hashes) * size
        self.counters.found_positions += context.have
        self._contexts[key] = context
        return context

    def _grow(self, context: _Context, end: int) -> bool:
        """Room for positions below ``end``, whose features are at hand; full blocks become findable. False if there is none."""
        if not self.pool.grow(context.id, end):
            return False
        size = self.pool.block_size
        extend_hashes(context.hashes, context.tokens, end // size, size, context.cache_salt)
        for block in range(context.have // size, end // size):
            self.pool.register(context.id, block, context.hashes[block])
        self.counters.stored_positions += end - context.have
        context.have = end
        return True

    def _drop(self, key: Key) -> None:
        if (context := self._contexts.pop(key, None)) is not None:
            self.pool.release(context.id)
            self.drafter.close([context.id])

    def _count(self, batches: Sequence[tuple[str, TurnBatch]], trees: Iterable[DraftTree], seconds: float) -> None:
        counters, drafted = self.counters, [len(tree.tokens) for tree in trees]
        counters.rounds += 1
        counters.batches += len(batches)
        counters.turns += sum(len(batch.turns) for _, batch in batches)
        counters.trees += len(drafted)
        counters.drafted_tokens += sum(drafted)
        counters.seconds += seconds


def _beyond(turn: DraftTurn, have: int) -> Any:
    """The turn's features of positions from ``have`` on; None if there are none, or if they leave a gap."""
    if turn.features is None or not turn.feature_start <= have < turn.feature_start + len(turn.features):
        return None
    return turn.features[have - turn.feature_start :]
