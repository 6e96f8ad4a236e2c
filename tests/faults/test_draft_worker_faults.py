"""Draft workers that die, stop, lose or spoil messages while engines decode: the text stays what plain decoding yields."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from helpers.draft_modules import random_module
from helpers.draft_workers import Workers, draft_workers
from helpers.drafters import KnownTexts
from helpers.engines import FLAT, greedy, make_engine, run, tiny_target
from helpers.repeats import FAULT_REPEATS, counted

from dspark.sampling import SamplingParams
from dspark.types import Request
from dspark.workers.verifier.targets import Target

PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(4 + 3 * i)] for i in range(16)}
LENGTH = 60
SEEDED = SamplingParams(temperature=0.9, top_p=0.9, seed=4, max_tokens=LENGTH, ignore_eos=True)
REQUESTS = {
    "greedy": [greedy(name, prompt, LENGTH) for name, prompt in PROMPTS.items()],
    "seeded": [Request(name, tuple(prompt), SEEDED) for name, prompt in PROMPTS.items()],
}
Fault = Callable[[Workers, str, random.Random, threading.Event], None]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def plain(target: Target) -> dict[str, dict[str, list[int]]]:
    return {
        kind: {n: r.tokens for n, r in run(make_engine(target, speculation="off"), requests).items()} for kind, requests in REQUESTS.items()
    }


def kill(workers: Workers, name: str, chance: random.Random, until: threading.Event) -> None:
    """A process that dies and comes back, again and again, never with what it held."""
    while not until.wait(chance.uniform(0.0, 0.1)):
        workers.network.kill(name)
        until.wait(chance.uniform(0.0, 0.1))
        workers.network.revive(name)


def freeze(workers: Workers, name: str, chance: random.Random, until: threading.Event) -> None:
    """A process that stands still now and then, longer than anybody waits for it."""
    answer = workers.hosts[name].worker.answer

    def frozen(*args: object) -> object:
        until.wait(chance.choice((0.0, 0.0, 0.0, 0.3)))
        return answer(*args)  # type: ignore[arg-type]

    workers.hosts[name].worker.answer = frozen  # type: ignore[method-assign, assignment]
    until.wait()


def partition(workers: Workers, name: str, chance: random.Random, until: threading.Event) -> None:
    """A network that swallows everything for a while."""
    while not until.wait(chance.uniform(0.02, 0.1)):
        workers.network.faults[name].drop = 1.0
        until.wait(chance.uniform(0.02, 0.2))
        workers.network.faults[name].drop = 0.0


def corrupt(workers: Workers, name: str, chance: random.Random, until: threading.Event) -> None:
    """A network that flips bits."""
    workers.network.faults[name].corrupt = 0.1
    until.wait()


def slow(workers: Workers, name: str, chance: random.Random, until: threading.Event) -> None:
    """Answers that come about when they are too late."""
    while not until.wait(0.01):
        workers.network.faults[name].delay_s = chance.uniform(0.0, 0.08)


FAULTS: list[Fault] = [kill, freeze, partition, corrupt, slow]


@contextmanager
def suffering(workers: Workers, faults: Sequence[Fault], seed: int) -> Iterator[None]:
    """Every worker suffers from all of ``faults`` until the block ends."""
    until = threading.Event()
    threads = [
        threading.Thread(target=fault, args=(workers, name, random.Random(seed + i), until))
        for i, fault in enumerate(faults)
        for name in workers.hosts
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        until.set()
        for thread in threads:
            thread.join()
        for name, faults_of in workers.network.faults.items():
            faults_of.delay_s = faults_of.drop = faults_of.corrupt = 0.0
            workers.network.revive(name)


def decode(target: Target, kind: str, expected: dict[str, list[int]], faults: Sequence[Fault], seed: int, num_workers: int) -> int:
    """Decode under faults, compare with plain decoding; how many drafted tokens were accepted."""
    texts = [[*request.prompt_token_ids, *expected[request.id]] for request in REQUESTS[kind]]
    names = [f"w{i}" for i in range(num_workers)]
    with draft_workers(random_module(target), *names) as workers:
        for host in workers.hosts.values():
            host.worker.drafter = KnownTexts(texts, host.worker.pool)
        engine = workers.engine(
            target, num_blocks=40, wait_s=0.05 if faults else 5.0, costs=FLAT
        )  # too few blocks for all: some are preempted and resumed
        with suffering(workers, faults, seed):
            out = run(engine, REQUESTS[kind])
        assert {name: result.tokens for name, result in out.items()} == expected
        assert engine.scheduler.counters.preemptions > 0
        for result in out.values():
            assert [outcome.accepted for outcome in result.outcomes] == [len(outcome.tokens) - 1 for outcome in result.outcomes]
        return engine.counters.accepted


@pytest.mark.parametrize("kind", list(REQUESTS))
def test_without_faults_every_draft_is_accepted(target: Target, plain: dict[str, dict[str, list[int]]], kind: str) -> None:
    """What the faults below take away: drafts by remote workers that are always right."""
    accepted = decode(target, kind, plain[kind], [], 0, 2)
    assert accepted > 0.6 * LENGTH * len(PROMPTS)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", list(REQUESTS))
def test_one_fault(target: Target, plain: dict[str, dict[str, list[int]]], kind: str, fault: Fault) -> None:
    decode(target, kind, plain[kind], [fault], 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FAULT_REPEATS))
@pytest.mark.parametrize("kind", list(REQUESTS))
def test_all_faults_at_once(target: Target, plain: dict[str, dict[str, list[int]]], kind: str, seed: int) -> None:
    with counted(f"streams of three draft workers, {kind}", "all at once"):
        decode(target, kind, plain[kind], FAULTS, seed, 3)
