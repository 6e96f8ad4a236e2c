"""Verifiers whose streams are cut, held, slowed down or spoiled while 16 requests run: every text is what it would have been.

Real engines and real gRPC, in this process; a broken network (``helpers/proxies.py``) lies between router and verifiers.
What happens to processes is in ``test_processes.py``.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
from helpers.drafters import KnownTexts
from helpers.engines import greedy, make_engine, run, tiny_target
from helpers.proxies import Proxy
from helpers.repeats import FAULT_REPEATS, Recovery, counted

from dspark.cluster import fleet as fleet_module
from dspark.cluster.dispatch import Dispatcher, Generation
from dspark.cluster.fleet import Fleet, ReplicaFacts
from dspark.sampling import SamplingParams
from dspark.types import Request
from dspark.workers.blocks import BlockPool
from dspark.workers.verifier.host import EngineHost
from dspark.workers.wire.client import GrpcLink
from dspark.workers.wire.link import Link
from dspark.workers.wire.server import WireServer

NUM_STREAMS, LENGTH, NUM_BLOCKS = 16, 100, 160
SILENCE_S = 1.5  # after which a router gives a stream up; half a minute outside of tests
PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(4 + 3 * i)] for i in range(NUM_STREAMS)}
SEEDED = SamplingParams(temperature=0.9, top_p=0.9, seed=4, max_tokens=LENGTH, ignore_eos=True)
REQUESTS = {
    "greedy": [greedy(name, prompt, LENGTH) for name, prompt in PROMPTS.items()],
    "seeded": [Request(name, tuple(prompt), SEEDED) for name, prompt in PROMPTS.items()],
}
FAULTS: dict[str, Callable[[Proxy, int], None]] = {
    "cut": lambda proxy, seed: proxy.cut(),
    "partition": lambda proxy, seed: proxy.hold(),
    "slow": lambda proxy, seed: setattr(proxy, "delay_s", 0.1),
    "corrupt": lambda proxy, seed: proxy.spoil(seed),
}


class Cluster:
    """Engines behind proxies, and a router."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        target = tiny_target()
        self.hosts: dict[str, EngineHost] = {}
        for name in ("v0", "v1"):
            pool = BlockPool(NUM_BLOCKS)
            self.hosts[name] = EngineHost(make_engine(target, KnownTexts(texts, pool), pool, speculation="static:2"))
            self.hosts[name].start()
        self.servers: dict[str, WireServer] = {}
        self.proxies: dict[str, Proxy] = {}

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Dispatcher]:
        facts = []
        for name, host in self.hosts.items():
            server = self.servers[name] = WireServer(host, name, "model", "secret")
            proxy = self.proxies[name] = Proxy(await server.start())
            facts.append(ReplicaFacts(name, proxy.address, "secret", "model", "tiny", 512, {}))

        async def discover() -> Sequence[ReplicaFacts]:
            return facts

        def connect(found: ReplicaFacts) -> Link:
            return GrpcLink(found.replica_id, found.address, found.token, "router", found.fingerprint, silence_s=SILENCE_S)

        fleet = Fleet(discover, connect)
        await fleet.refresh()
        await fleet.start()
        try:
            yield Dispatcher(fleet, 64, 20.0)
        finally:
            await fleet.close()
            for proxy in self.proxies.values():
                proxy.close()
            for server in self.servers.values():
                await server.stop()

    def is_free(self) -> bool:
        """Whether nothing is held by anybody."""
        return all(
            not host.engine.sequences and host.engine.pool.num_free == NUM_BLOCKS and host.stats()["num_requests_running"] == 0
            for host in self.hosts.values()
        )


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, list[int]]]:
    target = tiny_target()
    return {
        kind: {n: r.tokens for n, r in run(make_engine(target, speculation="off"), requests).items()} for kind, requests in REQUESTS.items()
    }


@pytest.fixture(params=list(REQUESTS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cluster(plain: dict[str, dict[str, list[int]]], kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(fleet_module, "OPEN_TIMEOUT_S", 0.5)
    monkeypatch.setattr(fleet_module, "REFRESH_S", 0.1)
    built = Cluster([[*request.prompt_token_ids, *plain[kind][request.id]] for request in REQUESTS[kind]])
    yield built
    for host in built.hosts.values():
        host.close()


async def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, what
        await asyncio.sleep(0.01)
    return time.monotonic() - started


async def read(generation: Generation, got: dict[str, list[int]], times: dict[str, list[float]]) -> None:
    """Everything a request yields; a token more or less than there should be is seen by whoever compares."""
    name = generation.request.id
    async for outcome in generation:
        got[name].extend(outcome.tokens)
        times[name].append(time.monotonic())
    generation.close()


async def one_fault(cluster: Cluster, dispatcher: Dispatcher, kind: str, fault: str, seed: int, recovery: Recovery) -> dict[str, list[int]]:
    """16 streams, a fault of one of the two verifiers in the middle, healed later; their texts."""
    chance = random.Random(seed)
    requests = [Request(f"{r.id}.{seed}", r.prompt_token_ids, r.sampling) for r in REQUESTS[kind]]
    got: dict[str, list[int]] = {request.id: [] for request in requests}
    times: dict[str, list[float]] = {request.id: [] for request in requests}
    replays = dispatcher.replays
    generations = await dispatcher.start(requests)
    reading = [asyncio.create_task(read(generation, got, times)) for generation in generations]
    middle = chance.uniform(0.1, 0.5) * NUM_STREAMS * LENGTH
    await eventually(lambda: sum(map(len, got.values())) > middle, "the middle of the streams")
    victim = chance.choice(list(cluster.hosts))
    broken_s = time.monotonic()
    FAULTS[fault](cluster.proxies[victim], seed)
    if fault != "slow":
        await eventually(lambda: victim not in {view.id for view in dispatcher.fleet.views}, f"losing {victim}")
    lost_s = time.monotonic() - broken_s
    await asyncio.gather(*reading)
    done_s = time.monotonic() - broken_s
    cluster.proxies[victim].heal()
    back_s = await eventually(lambda: len(dispatcher.fleet.views) == 2, f"the return of {victim}")
    recovery.whole_s = time.monotonic() - broken_s
    recovery.pause_s = max((later - earlier for seen in times.values() for earlier, later in itertools.pairwise(seen)), default=0.0)
    story = f"{fault:9} {kind} seed {seed}: lost after {lost_s:.2f} s, longest pause of a stream {recovery.pause_s:.2f} s, "
    print(f"{story}{dispatcher.replays - replays} replays, all done after {done_s:.2f} s, back {back_s:.2f} s after healing")
    return {name.partition(".")[0]: tokens for name, tokens in got.items()}


def check(cluster: Cluster, plain: dict[str, dict[str, list[int]]], kind: str, fault: str, seeds: Sequence[int]) -> int:
    """One fault for each seed, on one cluster; how many requests were replayed."""

    async def test() -> int:
        async with cluster.serving() as dispatcher:
            for seed in seeds:
                with counted(f"stream of a verifier, {kind}", fault) as recovery:
                    assert await one_fault(cluster, dispatcher, kind, fault, seed, recovery) == plain[kind]
                    await eventually(cluster.is_free, "blocks and slots are held")
                    assert dispatcher.in_flight == 0
            return dispatcher.replays

    replays = asyncio.run(asyncio.wait_for(test(), 60.0 + 20.0 * len(seeds)))
    for host in cluster.hosts.values():
        host.engine.pool.check()
    return replays


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", list(FAULTS))
def test_streams_survive_a_broken_network(cluster: Cluster, plain: dict[str, dict[str, list[int]]], kind: str, fault: str) -> None:
    replays = check(cluster, plain, kind, fault, range(FAULT_REPEATS))
    assert fault == "slow" or replays > 0, "nobody was hit"


def test_a_cut_stream_is_replayed(cluster: Cluster, plain: dict[str, dict[str, list[int]]], kind: str) -> None:
    assert check(cluster, plain, kind, "cut", [1]) > 0
