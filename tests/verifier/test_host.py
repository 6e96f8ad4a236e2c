"""The engine thread: submissions from other threads, one delivery a step, cancel, drain, failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from helpers.engines import greedy, make_engine, tiny_target
from helpers.receivers import Receiver

from dspark.errors import BadRequest, Overloaded, WorkerLost
from dspark.sampling import SamplingParams
from dspark.types import Finish, Request, StepOutcome
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.host import EngineHost


@pytest.fixture
def engine() -> Engine:
    return make_engine(tiny_target(), max_queued=8)


@pytest.fixture
def host(engine: Engine) -> Iterator[EngineHost]:
    host = EngineHost(engine)
    host.start()
    yield host
    host.close()


def test_requests_of_many_threads_get_their_own_tokens(host: EngineHost) -> None:
    receivers = [Receiver(), Receiver()]
    requests = [greedy(f"r{i}", [5 + i, 6, 7], 12) for i in range(8)]
    threads = [threading.Thread(target=host.submit, args=(r, receivers[i % 2])) for i, r in enumerate(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for receiver in receivers:
        receiver.wait_for(4)
    for i, request in enumerate(requests):
        assert len(receivers[i % 2].tokens(request.id)) == 12
        assert not receivers[1 - i % 2].tokens(request.id)
    assert max(len(call) for call in receivers[0].calls) > 1, "outcomes of a step come in one call"
    stats = host.stats()
    assert stats["generation_tokens_total"] == 96
    assert stats["num_free_blocks"] == stats["num_blocks"]
    assert host.is_healthy()


def submit_many(host: EngineHost, count: int) -> None:
    for i in range(count):
        host.submit(greedy(f"r{i}", range(3, 60), 150), Receiver())


def test_refusals_reach_the_caller(host: EngineHost) -> None:
    with pytest.raises(BadRequest, match="empty"):
        host.submit(Request("a", ()), Receiver())
    with pytest.raises(Overloaded) as caught:
        submit_many(host, 200)
    assert caught.value.retry_after_s > 0


def test_cancel_frees_blocks_at_once(host: EngineHost) -> None:
    receiver = Receiver()
    host.submit(greedy("long", [5, 6, 7], 200), receiver)
    while not receiver.calls:
        time.sleep(0.005)
    host.cancel("long")
    host.cancel("unknown")
    deadline = time.monotonic() + 1.0
    while host.stats()["num_free_blocks"] < host.stats()["num_blocks"]:
        assert time.monotonic() < deadline, "blocks were not back within a second"
        time.sleep(0.005)
    assert not receiver.ended
    assert host.view("id", "addr").running == 0


def test_drain_lets_running_requests_finish(host: EngineHost) -> None:
    receiver = Receiver()
    host.submit(greedy("a", [5, 6, 7], 60), receiver)
    assert host.drain(20.0)
    assert len(receiver.tokens("a")) == 60
    with pytest.raises(WorkerLost):
        host.submit(greedy("b", [5], 1), receiver)
    assert host.view("id", "addr").draining


def test_drain_gives_up_and_close_aborts(engine: Engine) -> None:
    host = EngineHost(engine)
    host.start()
    receiver = Receiver()
    host.submit(greedy("a", [5, 6, 7], 240), receiver)
    assert not host.drain(0.0)
    host.close()
    assert receiver.ended["a"].finish is Finish.ABORT


def test_a_failing_step_ends_everything_with_its_reason(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[StepOutcome]:
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine, "step", broken)
    host = EngineHost(engine)
    host.start()
    receiver = Receiver()
    host.submit(greedy("a", [5, 6, 7]), receiver)
    receiver.wait_for(1)
    assert receiver.ended["a"].finish is Finish.ERROR
    assert "device lost" in str(receiver.ended["a"].error)
    assert not host.is_healthy()
    with pytest.raises(WorkerLost, match="device lost"):
        host.submit(greedy("b", [5]), receiver)
    host.close()


def test_a_stuck_engine_is_unhealthy_only_with_work(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def stuck() -> list[StepOutcome]:
        release.wait(10)
        return []

    monkeypatch.setattr(engine, "step", stuck)
    host = EngineHost(engine, stall_s=0.05)
    host.start()
    time.sleep(0.1)
    assert host.is_healthy(), "idle is healthy"
    host.submit(greedy("a", [5]), Receiver())
    time.sleep(0.2)
    assert not host.is_healthy()
    host.cancel("a")
    release.set()
    host.close()


def test_a_broken_receiver_costs_its_own_requests_only(host: EngineHost) -> None:
    def broken(outcomes: Sequence[StepOutcome]) -> None:
        raise ValueError("closed")

    good = Receiver()
    host.submit(Request("bad", (5, 6), SamplingParams(max_tokens=50)), broken)
    host.submit(greedy("good", [5, 6, 7], 20), good)
    good.wait_for(1)
    assert len(good.tokens("good")) == 20
    assert host.is_healthy()
    assert host.stats()["num_requests_running"] == 0
