"""DraftWorker: drafts what a grafted drafter would, for many verifiers at once, and says what it holds where they are wrong."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.draft_modules import Tables, make_turn, tiny_module

from dspark.drafting import DraftBatch, DraftLayout, Held, TurnBatch
from dspark.errors import WorkerLost
from dspark.kernels.graphs import plain_calls
from dspark.sampling import SamplingParams
from dspark.types import DraftTree, DraftTurn
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.fused import fuse_layers
from dspark.workers.drafter.graph_worker import GraphWorkerDrafter
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.worker import DraftWorker
from dspark.workers.drafter.worker_host import MAX_FAILURES, DraftWorkerHost

GREEDY = SamplingParams(temperature=0.0)
RATIO = SamplingParams(temperature=0.8)
COUPLED = SamplingParams(temperature=0.8, seed=11)
TOKENS = [int(t) for t in torch.randint(0, 32, (60,), generator=torch.Generator().manual_seed(1))]
FEATURES = torch.randn(60, 16, generator=torch.Generator().manual_seed(2))
HAS_GRAPHS = False
LAYOUT = DraftLayout("t", "d", "float32", 16, 4, 32)


@pytest.fixture(autouse=True, params=["launches", "graphs"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with the drafter of a CPU, and with that of a GPU run on the CPU."""
    monkeypatch.setattr(f"{__name__}.HAS_GRAPHS", request.param == "graphs")


def make_worker(num_blocks: int = 32) -> DraftWorker:
    pool = BlockPool(num_blocks, 4)
    if not HAS_GRAPHS:
        return DraftWorker(LocalDrafter(tiny_module(), pool), pool)
    module = tiny_module()
    fuse_layers(module)
    drafter = GraphWorkerDrafter(module, pool, 64, max_rows=2, max_model_len=40)
    drafter.prepare(plain_calls)
    return DraftWorker(drafter, pool)


def turn(name: str, base_len: int, known: int = 0, start: int = 0, stop: int | None = None, **changes: Any) -> DraftTurn:
    """Tokens ``known ..``, features of positions ``start .. stop`` (up to the anchor if None)."""
    stop = base_len - 1 if stop is None else stop
    return make_turn(name, base_len, TOKENS[known:base_len], FEATURES[start:stop] if stop > start else None, start, **changes)


def ask(worker: DraftWorker, *turns: DraftTurn, session: str = "v0") -> DraftBatch:
    (answer,) = worker.answer([(session, TurnBatch(1, turns))])
    worker.pool.check()
    return answer


def local(base_len: int, sampling: SamplingParams = GREEDY, **changes: Any) -> DraftTree:
    tables = Tables()
    tables.blocks["r"] = list(range(16))
    drafter = LocalDrafter(tiny_module(), tables)
    drafter.propose([turn("r", base_len, sampling=sampling, **changes)])
    return drafter.collect({"r": 4}, 0.0)["r"]


def same(one: DraftTree, other: DraftTree) -> None:
    assert (one.base_len, one.tokens, one.parents) == (other.base_len, other.tokens, other.parents)
    assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
    assert (one.law is None) == (other.law is None)
    if one.law is not None and other.law is not None:
        assert torch.equal(one.law.ids, other.law.ids)
        torch.testing.assert_close(one.law.probs, other.law.probs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, RATIO, COUPLED])
def test_drafts_are_those_of_a_grafted_drafter(sampling: SamplingParams) -> None:
    worker = make_worker()
    for start, stop in ((0, 7), (7, 14)):
        chunk = turn("r", 15, 0 if start == 0 else 15, start, stop, max_draft=0, sampling=sampling)
        assert ask(worker, chunk) == DraftBatch(1, seconds=pytest.approx(0, abs=10))
    for before, base_len in ((15, 16), (16, 19), (19, 24)):
        answer = ask(worker, turn("r", base_len, before, before - 1, sampling=sampling))
        assert answer.held == ()
        same(answer.trees[0], local(base_len, sampling))
    worker.check()


def test_verifiers_are_drafted_for_together_and_share_prefixes() -> None:
    worker = make_worker()
    batches = [("v0", TurnBatch(4, (turn("a", 21), turn("b", 9, sampling=RATIO)))), ("v1", TurnBatch(9, (turn("a", 14),)))]
    first, second = worker.answer(batches)
    assert (first.seq, second.seq) == (4, 9)
    same(first.trees[0], dataclasses.replace(local(21), request_id="a"))
    same(first.trees[1], local(9, RATIO))
    same(second.trees[0], local(14))
    assert worker.counters.found_positions == 8 + 12, "the same prefix was computed once"
    worker.end_session("v0")
    worker.close_requests("v1", ["a", "unknown"])
    worker.check()


def test_a_prefix_in_the_cache_needs_no_features() -> None:
    worker = make_worker()
    ask(worker, turn("a", 30))
    answer = ask(worker, turn("b", 24, 0, 10, 15, max_draft=0), session="v1")
    assert answer.held == (Held("b", 24, 20),), "it has five blocks of the prefix, two more than the verifier believed"
    answer = ask(worker, turn("b", 24, 24, 20), session="v1")
    assert answer.held == ()
    same(answer.trees[0], local(24))


def test_salts_separate() -> None:
    worker = make_worker()
    ask(worker, dataclasses.replace(turn("a", 30), cache_salt="x"))
    assert ask(worker, turn("b", 30, 0, 29)).held == (Held("b", 30, 0),)
    assert ask(worker, dataclasses.replace(turn("c", 30, 0, 29), cache_salt="x")).held == (Held("c", 30, 28),)


def test_gaps_are_told_and_filled() -> None:
    worker = make_worker()
    answer = ask(worker, turn("r", 20, 0, 12))
    assert (answer.trees, answer.held) == ((), (Held("r", 20, 0),))
    assert ask(worker, turn("r", 20, 20, 0, 10, max_draft=0)).held == ()
    answer = ask(worker, turn("r", 22, 20, 21))
    assert (answer.trees, answer.held) == ((), (Held("r", 22, 10),))
    answer = ask(worker, turn("r", 22, 22, 8))
    assert answer.held == ()
    same(answer.trees[0], local(22))


def test_lost_turns_and_foreign_tokens_start_over() -> None:
    worker = make_worker()
    assert ask(worker, turn("r", 12, 10, 9)).held == (Held("r", 0, 0),)
    ask(worker, turn("r", 12))
    assert ask(worker, turn("r", 18, 15, 14)).held == (Held("r", 12, 11),)
    foreign = dataclasses.replace(turn("r", 13, 11, 11), tokens=((TOKENS[11] + 1) % 32, 3))
    assert ask(worker, foreign).held == (Held("r", 0, 0),)
    worker.check()
    other = dataclasses.replace(turn("r", 12), tokens=tuple(TOKENS[12:24]))
    (tree,) = ask(worker, other).trees
    assert tree.tokens != local(12).tokens
    (tree,) = ask(worker, turn("r", 9)).trees
    same(tree, local(9))  # a shorter request under the same id is another one


def test_a_repeated_turn_drafts_the_same_again() -> None:
    worker = make_worker()
    first = ask(worker, turn("r", 14)).trees[0]
    for again in (turn("r", 14), turn("r", 14, 14, 13)):
        same(ask(worker, again).trees[0], first)


def test_only_the_last_turn_of_a_round_is_drafted_for() -> None:
    worker = make_worker()
    first, second = worker.answer([("v0", TurnBatch(1, (turn("r", 14),))), ("v0", TurnBatch(2, (turn("r", 16, 14, 13),)))])
    assert first == DraftBatch(1, seconds=first.seconds)
    same(second.trees[0], local(16))


def test_a_full_pool_refuses_and_recovers() -> None:
    worker = make_worker(num_blocks=8)
    assert ask(worker, turn("a", 25)).trees
    answer = ask(worker, dataclasses.replace(turn("b", 13), cache_salt="b"))
    assert (answer.trees, answer.held) == ((), (Held("b", 0, 0, is_full=True),))
    assert worker.num_requests == 1
    # grown within one round beyond what is free: the request's earlier turn goes as well
    small = dataclasses.replace(turn("c", 9, max_draft=4), cache_salt="c")
    large = dataclasses.replace(turn("c", 20, 9, 8), cache_salt="c")
    first, second = worker.answer([("v0", TurnBatch(1, (small,))), ("v0", TurnBatch(2, (large,)))])
    assert (first.trees, second.trees, second.held) == ((), (), (Held("c", 0, 0, is_full=True),))
    worker.close_requests("v0", ["a"])
    worker.check()
    assert ask(worker, dataclasses.replace(turn("b", 13), cache_salt="b")).trees


class Answers:
    """A host's answers, by sequence number."""

    def __init__(self) -> None:
        self._queue: queue.Queue[DraftBatch] = queue.Queue()

    def __call__(self, batch: DraftBatch) -> None:
        self._queue.put(batch)

    def next(self) -> DraftBatch:
        return self._queue.get(timeout=5)


def test_the_host_answers_every_batch_and_batches_what_waits() -> None:
    worker, answers = make_worker(), Answers()
    gate, inner = threading.Event(), worker.answer

    def slow(batches: Sequence[tuple[str, TurnBatch]]) -> list[DraftBatch]:
        gate.wait(5)
        return inner(batches)

    worker.answer = slow  # type: ignore[method-assign]
    host = DraftWorkerHost(worker, LAYOUT, stall_s=0.05)
    host.start()
    host.submit("v0", TurnBatch(1, (turn("a", 14),)), answers)
    while host._inbox:
        threading.Event().wait(0.001)
    threading.Event().wait(0.1)
    assert not host.is_healthy(), "nothing was answered for longer than it may take"
    host.submit("v0", TurnBatch(2, (turn("b", 14),)), answers)
    host.submit("v1", TurnBatch(1, (turn("a", 14),)), answers)
    host.close_requests("v1", ["a"])
    host.submit("v1", TurnBatch(2, (turn("a", 16, 14, 13),)), answers)
    gate.set()
    batches = [answers.next() for _ in range(4)]
    assert [batch.seq for batch in batches] == [1, 2, 1, 2]
    assert batches[3].held == (Held("a", 0, 0),), "it was closed before"
    assert host.is_healthy()
    assert host.stats()["rounds_total"] == 3
    host.end_session("v0")
    host.end_session("v1")
    host.close()
    worker.check()
    with pytest.raises(WorkerLost):
        host.submit("v0", TurnBatch(3, ()), answers)


def test_a_round_that_raises_costs_its_drafts_only() -> None:
    worker, answers = make_worker(), Answers()
    host = DraftWorkerHost(worker, LAYOUT)
    host.start()
    host.submit("v0", TurnBatch(1, (turn("a", 14),)), answers)
    assert answers.next().trees
    propose = worker.drafter.propose

    def broken(turns: Sequence[DraftTurn]) -> None:
        raise RuntimeError("no memory")

    worker.drafter.propose = broken  # type: ignore[method-assign]
    host.submit("v0", TurnBatch(2, (turn("a", 16, 14, 13),)), answers)
    assert answers.next() == DraftBatch(2, held=(Held("a", 0, 0),))
    assert host.is_healthy()
    worker.drafter.propose = propose  # type: ignore[method-assign]
    host.submit("v0", TurnBatch(3, (turn("a", 16, 0, 15),)), answers)
    assert answers.next().held == (Held("a", 16, 0),), "the cache was emptied: nobody knows what was written"
    worker.drafter.propose = broken  # type: ignore[method-assign]
    for number in range(MAX_FAILURES):
        host.submit("v0", TurnBatch(number, (turn("a", 16),)), answers)
        answers.next()
    assert not host.is_healthy()
    with pytest.raises(WorkerLost):
        host.submit("v0", TurnBatch(9, ()), answers)
    host.close()
