"""RemoteDrafter: the drafts of a grafted drafter from elsewhere; no fault of a worker costs more than its drafts, and one wait."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import pytest
import torch
from helpers.draft_modules import Tables, make_turn, tiny_module
from helpers.draft_workers import LAW_WIDTH, Workers, draft_workers, eventually, layout_of

from dspark.drafting import DraftLayout
from dspark.router.drafters import assign_by_load
from dspark.sampling import SamplingParams
from dspark.types import DraftTree, DraftTurn
from dspark.workers.drafter import remote
from dspark.workers.drafter.draft_links import PAUSE_S, STUCK_S, DraftLinks, RoundTimes
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.drafter.remote import RemoteDrafter

GREEDY = SamplingParams(temperature=0.0)
RATIO = SamplingParams(temperature=0.8)
COUPLED = SamplingParams(temperature=0.8, seed=11)
TOKENS = [int(t) for t in torch.randint(0, 32, (60,), generator=torch.Generator().manual_seed(1))]
TAPS = torch.randn(60, 32, generator=torch.Generator().manual_seed(2))
MODULE = tiny_module()
WAIT_S = 2.0


class Side:
    """A drafter under test, fed as an engine would feed it."""

    def __init__(self, drafter: Any, tables: Tables) -> None:
        self.drafter = drafter
        self.tables = tables

    def feed(self, name: str, base_len: int, known: int = 0, start: int = 0, stop: int | None = None, **changes: Any) -> None:
        self.drafter.propose([self.turn(name, base_len, known, start, stop, **changes)])

    def turn(self, name: str, base_len: int, known: int = 0, start: int = 0, stop: int | None = None, **changes: Any) -> DraftTurn:
        self.tables.blocks.setdefault(name, list(range(16 * len(self.tables.blocks), 16 * len(self.tables.blocks) + 16)))
        features = self.drafter.project(TAPS[start : base_len - 1 if stop is None else stop])
        return make_turn(name, base_len, TOKENS[known:base_len], features, start, **changes)

    def draft(self, name: str, count: int = 4, wait_s: float = WAIT_S) -> DraftTree | None:
        return self.drafter.collect({name: count}, wait_s).get(name)


def far(workers: Workers, **options: Any) -> Side:
    tables = Tables(num_blocks=64)
    return Side(RemoteDrafter(MODULE, tables, workers.connect(), assign_by_load, **options), tables)


def near() -> Side:
    tables = Tables(num_blocks=64)
    return Side(LocalDrafter(MODULE, tables, law_width=LAW_WIDTH), tables)


def same(one: DraftTree | None, other: DraftTree | None) -> None:
    assert one is not None
    assert other is not None
    assert (one.request_id, one.base_len, one.tokens, one.parents) == (other.request_id, other.base_len, other.tokens, other.parents)
    assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
    assert one.margin == pytest.approx(other.margin, abs=1e-5)
    assert (one.law is None) == (other.law is None)
    if one.law is not None and other.law is not None:
        assert torch.equal(one.law.ids, other.law.ids)
        torch.testing.assert_close(one.law.probs, other.law.probs)


@pytest.mark.parametrize("sampling", [GREEDY, RATIO, COUPLED])
def test_drafts_equal_those_of_a_grafted_drafter(sampling: SamplingParams) -> None:
    with draft_workers(MODULE, "w0") as workers:
        sides = (far(workers), near())
        for side in sides:
            side.feed("r", 15, 0, 0, 6, max_draft=0, sampling=sampling)
            side.feed("r", 15, 15, 6, sampling=sampling)
        same(*(side.draft("r") for side in sides))
        for before, base_len in ((15, 16), (16, 20), (20, 23)):
            for side in sides:
                side.feed("r", base_len, before, before - 1, sampling=sampling)
            same(*(side.draft("r") for side in sides))
            same(*(side.draft("r", 2) for side in sides))
        sides[0].drafter.close(["r"])


@pytest.mark.parametrize("sampling", [GREEDY, RATIO, COUPLED])
def test_trees_equal_those_of_a_grafted_drafter(sampling: SamplingParams) -> None:
    with draft_workers(MODULE, "w0") as workers:
        sides = (far(workers), near())
        for side in sides:
            side.feed("r", 15, sampling=sampling, max_nodes=11)
        trees = [side.draft("r", 11) for side in sides]
        same(*trees)
        assert trees[0] is not None
        assert not trees[0].is_chain
        assert len(trees[0].tokens) == 11
        same(*(side.draft("r", 5) for side in sides))
        sides[0].drafter.close(["r"])


def test_propose_waits_for_nothing_and_collect_no_longer_than_it_may() -> None:
    with draft_workers(MODULE, "w0") as workers:
        side = far(workers)
        workers.network.faults["w0"].delay_s = 0.3
        started = time.monotonic()
        side.feed("r", 15)
        assert time.monotonic() - started < 0.15
        started = time.monotonic()
        assert side.draft("r", wait_s=0.05) is None
        assert 0.05 <= time.monotonic() - started < 0.2
        started = time.monotonic()
        side.feed("r", 16, 15, 14)
        assert side.draft("r", wait_s=0.05) is None
        assert time.monotonic() - started < 0.05, "a worker that was waited for in vain is left alone"
        assert side.drafter.stats()["draft_misses_total"] == 1
        workers.network.faults["w0"].delay_s = 0.0
        eventually(lambda: bool(side.drafter.links.usable()), "the worker's return")
        side.feed("r", 18, 16, 15)
        alone = near()
        alone.feed("r", 18)
        same(side.draft("r"), alone.draft("r"))
        side.drafter.close(["r"])


def test_a_worker_that_fell_silent_costs_one_wait() -> None:
    """However many requests wait for it, in whatever groups, and however long it stays silent."""
    with draft_workers(MODULE, "w0") as workers:
        side = far(workers)
        for name in ("a", "b"):
            side.feed(name, 15)
            assert side.draft(name) is not None
        workers.network.faults["w0"].delay_s = 3.0
        started, waited_s, base_len = time.monotonic(), [], 15
        while time.monotonic() - started < PAUSE_S + 0.6:  # its pause is over then, and it has not answered yet
            base_len += 1
            for name in ("a", "b"):
                side.feed(name, base_len, base_len - 1, base_len - 2)
            for name in ("a", "b"):
                began = time.monotonic()
                assert side.draft(name, wait_s=0.05) is None
                waited_s.append(time.monotonic() - began)
            time.sleep(0.06)
        assert side.drafter.stats()["draft_misses_total"] == 1
        assert waited_s[0] >= 0.05
        assert sum(waited_s[1:]) < 0.1
        workers.network.faults["w0"].delay_s = 0.0
        eventually(lambda: bool(side.drafter.collect({}, 0.0) == {} and side.drafter.links.usable()), "the worker's return", 5.0)
        side.feed("a", base_len + 2, base_len, base_len - 1)
        alone = near()
        alone.feed("a", base_len + 2)
        same(side.draft("a"), alone.draft("a"))
        side.drafter.close(["a", "b"])


def test_each_miss_in_a_row_doubles_the_pause() -> None:
    with draft_workers(MODULE, "w0") as workers:
        links = workers.connect()
        (link,) = links.links
        for misses, pause_s in ((1, PAUSE_S), (2, 2 * PAUSE_S), (3, 4 * PAUSE_S)):
            link.trust.miss(10.0)
            assert link.trust.misses == misses
            assert not link.is_usable(10.0 + pause_s - 1e-6)
            assert link.is_usable(10.0 + pause_s)
        link.trust.keep()
        assert link.is_usable(10.0)


def test_round_times_are_learned() -> None:
    times = RoundTimes()
    assert times(5) == 0.0
    times.observe(4, 2.0)
    assert times(8) == times(4) == 2.0, "one size says nothing about others"
    for count in (2, 4, 6, 8) * 20:
        times.observe(count, 1.0 + 0.25 * count)
    assert [times(count) for count in (1, 4, 16)] == pytest.approx([1.25, 2.0, 5.0], rel=0.02)
    for count in (2, 4, 6, 8) * 100:
        times.observe(count, 8.0 - 0.5 * count)
    assert times(2) == times(8), "more requests never take less time"


def test_a_worker_that_lives_but_does_not_answer_is_connected_to_afresh() -> None:
    now = 0.0
    with draft_workers(MODULE, "w0") as workers:
        workers.network.faults["w0"].drop = 1.0
        links = DraftLinks(layout_of(MODULE), workers.network.open_session, clock=lambda: now)
        links.set_workers(workers.facts)
        assert links.wait_connected(5) is None
        (link,) = links.links
        link.send([], lambda: None)
        now = STUCK_S
        assert links.usable() == {"w0": link}
        now = STUCK_S + 0.1
        links.usable()
        eventually(lambda: links.links not in ([], [link]), "the new stream")
        links.close()


def test_an_answer_says_that_earlier_batches_are_lost() -> None:
    with draft_workers(MODULE, "w0") as workers:
        links = workers.connect()
        (link,) = links.links
        workers.network.faults["w0"].drop = 1.0
        lost = [link.send([], lambda: None) for _ in range(3)]
        workers.network.faults["w0"].drop = 0.0
        assert set(lost) == set(link.pending)
        links.wait_answered([(link, link.send([], lambda: None))], 5)
        assert not link.pending


def test_stale_drafts_are_dropped() -> None:
    with draft_workers(MODULE, "w0") as workers:
        side = far(workers)
        workers.network.faults["w0"].delay_s = 0.05
        side.feed("r", 15)
        eventually(lambda: workers.hosts["w0"].worker.counters.trees == 1, "the first draft")
        side.feed("r", 17, 15, 14)
        tree = side.draft("r")
        assert tree is not None
        assert tree.base_len == 17
        assert side.drafter.stats()["draft_stale_total"] == 1
        side.drafter.close(["r"])


def test_a_prefix_hit_at_the_verifier_starves_nobody() -> None:
    """The worker has the prefix: its features are not sent. It does not: they are sent from the store."""
    with draft_workers(MODULE, "w0", "w1") as workers:
        side = far(workers)
        side.feed("r", 40)
        first = side.drafter.stats()["draft_positions_sent_total"]
        assert first == 39
        side.draft("r")
        names = [f"n{i}" for i in range(20)]
        home = assign_by_load("r", {"w0": 0, "w1": 0})
        other = next(worker for worker in ("w0", "w1") if worker != home)
        with_it = next(name for name in names if assign_by_load(name, {"w0": 0, "w1": 0}) == home)
        without = next(name for name in names if assign_by_load(name, {"w0": 0, "w1": 0}) == other)
        for name, num_sent in ((with_it, 7), (without, 39)):
            side.tables.blocks[name] = [*side.tables.blocks["r"][:8], *range(40 + 10 * (name == without), 50 + 10 * (name == without))]
            before = side.drafter.stats()["draft_positions_sent_total"]
            side.feed(name, 40, 0, 32)
            tree = side.draft(name)
            if name == without:
                assert tree is None, "the worker had to say that it lacks the prefix"
                before += 7  # sent in vain
                side.feed(name, 40, 40, 32)
                tree = side.draft(name)
            alone = near()
            alone.feed(name, 40)
            same(tree, alone.draft(name))
            assert side.drafter.stats()["draft_positions_sent_total"] - before == num_sent
        side.drafter.close(["r", with_it, without])


def test_a_long_catch_up_goes_in_parts_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with draft_workers(MODULE, "w0") as workers:
        side = far(workers)
        workers.network.kill("w0")
        side.feed("long", 50)
        workers.network.revive("w0")
        eventually(lambda: bool(side.drafter.links.usable()), "the worker's return")
        monkeypatch.setattr(remote, "MAX_BATCH_BYTES", 20 * side.drafter.store.bytes_per_position)
        side.drafter.propose([side.turn("long", 50, 50, 49), side.turn("short", 9)])
        trees = side.drafter.collect({"long": 4, "short": 4}, WAIT_S)
        assert set(trees) == {"short"}
        rounds = 0
        while (tree := side.draft("long")) is None:
            side.feed("long", 50, 50, 49)
            rounds += 1
            assert rounds < 6
        assert rounds == 3, "20 + 20 + 9 positions"
        alone = near()
        alone.feed("long", 50)
        same(tree, alone.draft("long"))
        side.drafter.close(["long", "short"])


def test_a_killed_worker_costs_drafts_until_another_has_the_context() -> None:
    with draft_workers(MODULE, "w0", "w1") as workers:
        side, alone = far(workers), near()
        side.feed("r", 30)
        home = assign_by_load("r", {"w0": 0, "w1": 0})
        assert side.draft("r") is not None
        side.feed("r", 32, 30, 29)
        workers.network.kill(home)
        started = time.monotonic()
        side.draft("r")
        assert time.monotonic() - started < WAIT_S / 2, "a lost stream is not waited for"
        side.feed("r", 33, 32, 31)
        side.draft("r")
        side.feed("r", 34, 33, 32)
        alone.feed("r", 34)
        same(side.draft("r"), alone.draft("r"))
        side.drafter.close(["r"])


def test_a_returning_worker_drafts_on_from_the_store() -> None:
    with draft_workers(MODULE, "w0") as workers:
        side, alone = far(workers), near()
        side.feed("r", 30)
        assert side.draft("r") is not None
        workers.network.kill("w0")
        side.feed("r", 32, 30, 29)
        assert side.draft("r") is None
        workers.network.revive("w0")
        eventually(lambda: bool(side.drafter.links.usable()), "the worker's return")
        side.feed("r", 33, 32, 31)
        side.draft("r")
        side.feed("r", 33, 33, 32)
        alone.feed("r", 33)
        same(side.draft("r"), alone.draft("r"))
        assert side.drafter.stats()["draft_workers_lost_total"] == 1
        side.drafter.close(["r"])


def test_a_draining_worker_is_left_for_another_or_used_to_its_end() -> None:
    with draft_workers(MODULE, "w0", "w1") as workers:
        side = far(workers)
        by_id = {link.worker_id: link for link in side.drafter.links.links}
        home = assign_by_load("r", dict.fromkeys(by_id, 0))
        side.feed("r", 20)
        assert side.draft("r") is not None
        by_id[home].drains()
        for base_len in (21, 22):
            side.feed("r", base_len, base_len - 1, base_len - 2)
            tree = side.draft("r")
        assert tree is not None
        assert workers.hosts[home].worker.counters.trees == 1
        eventually(lambda: workers.hosts[home].worker.num_requests == 0, "the old worker's forgetting")
        by_id[next(name for name in by_id if name != home)].drains()
        side.feed("r", 23, 22, 21)
        assert side.draft("r") is not None
        side.drafter.close(["r"])


def test_a_worker_without_room_is_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FULL_RETRY_S", 0.2)
    with draft_workers(MODULE, "w0", num_blocks=2) as workers:
        side = far(workers)
        side.feed("a", 30)
        assert side.draft("a") is not None
        side.drafter.propose([dataclasses.replace(side.turn("b", 20), cache_salt="b")])
        side.draft("b")
        side.drafter.close(["a"])
        side.feed("b", 20, 20, 19)
        time.sleep(0.25)
        for _ in range(3):
            side.feed("b", 20, 20, 19)
            tree = side.draft("b")
        assert tree is not None
        side.drafter.close(["b"])


@pytest.mark.parametrize(("fault", "rate"), [("drop", 0.3), ("corrupt", 0.05)])
def test_a_bad_network_costs_drafts_only(fault: str, rate: float) -> None:
    """Drafts still come, and none that was not asked for; what was lost is what a grafted drafter drafts all the same."""
    with draft_workers(MODULE, "w0") as workers:
        side, num_drafts = far(workers), 0
        setattr(workers.network.faults["w0"], fault, rate)
        side.feed("r", 10)
        for base_len in range(11, 50):
            side.feed("r", base_len, base_len - 1, base_len - 2, sampling=RATIO)
            if (tree := side.draft("r", wait_s=0.1)) is not None:
                alone = near()
                alone.feed("r", base_len, sampling=RATIO)
                expected = alone.draft("r")
                assert tree.base_len == base_len
                if fault == "drop":
                    same(tree, expected)
                num_drafts += 1
            else:
                time.sleep(0.02)
        assert num_drafts > 0
        setattr(workers.network.faults["w0"], fault, 0.0)
        eventually(lambda: bool(side.drafter.links.usable()), "the worker's return", 15)
        for base_len in range(50, 53):
            side.feed("r", base_len, base_len - 1, base_len - 2)
            tree = side.draft("r")
        assert tree is not None
        side.drafter.close(["r"])


def test_requests_without_a_draft_get_the_fallback_s() -> None:
    with draft_workers(MODULE, "w0") as workers:
        side = far(workers, fallback=NgramDrafter())
        tokens = (1, 2, 3, 4, 5, 6, 1, 2, 3, 4)
        features = side.drafter.project(TAPS[:9])
        side.tables.blocks["r"] = [0, 1, 2]
        side.drafter.propose([make_turn("r", 10, tokens, features)])
        with_worker = side.draft("r")
        assert with_worker is not None
        assert with_worker.law is None
        workers.network.kill("w0")
        side.drafter.propose([make_turn("r", 11, (5,), side.drafter.project(TAPS[9:10]), 9)])
        tree = side.draft("r", 2)
        assert tree is not None
        assert tree.tokens == (6, 1)
        side.drafter.close(["r"])
        assert side.draft("r") is None
        workers.network.revive("w0")


def test_a_worker_of_another_layout_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with draft_workers(MODULE, "w0") as workers:
        layout = layout_of(MODULE)
        wrong = DraftLayout(layout.target, "another", layout.dtype, layout.feature_width, layout.block_size, layout.vocab_size)
        links = DraftLinks(wrong, workers.network.open_session)
        assert links.wait_connected(0.05) == "none within 0.05 s"
        links.set_workers(workers.facts)
        eventually(lambda: "drafter is 'drafter' here and 'another' there" in caplog.text, "the refusal")
        started = time.monotonic()
        assert "another" in (links.wait_connected(5.0) or "")
        assert time.monotonic() - started < 2.0, "there is nothing to wait for"
        links.close()


def test_workers_that_are_not_named_any_more_are_used_to_their_end() -> None:
    with draft_workers(MODULE, "w0", "w1") as workers:
        links = workers.connect()
        links.set_workers(workers.facts[:1])
        assert set(links.usable()) == {"w0"}
        links.set_workers(workers.facts)
        assert set(links.usable()) == {"w0", "w1"}
        links.set_workers([])
        assert set(links.usable()) == {"w0", "w1"}, "better than none"
        workers.network.kill("w1")
        workers.network.revive("w1")
        time.sleep(0.3)
        assert set(links.usable()) == {"w0"}, "it is not connected to again"
        moved = dataclasses.replace(workers.facts[0], address="local:elsewhere")
        (before,) = links.links
        links.set_workers([moved])
        eventually(lambda: links.links not in ([], [before]) and not before.is_open, "the new process under the old name")
        links.close()
        eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("draft-worker-")], "the threads' end")
        assert links.links == []
