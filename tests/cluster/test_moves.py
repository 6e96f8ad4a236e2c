"""Running requests leave a verifier that drains, with their KV; long prefixes come from where they are. Real engines, real gRPC."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from helpers.draft_modules import random_module
from helpers.engines import greedy, make_engine, run, tiny_target

from dspark.cluster.dispatch import Dispatcher, Generation
from dspark.cluster.fleet import Fleet, ReplicaFacts, ask_of
from dspark.sampling import SamplingParams
from dspark.types import Drafter, Request
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.host import EngineHost
from dspark.workers.verifier.kv_exchange import EngineExchange
from dspark.workers.wire.client import GrpcLink
from dspark.workers.wire.link import Link
from dspark.workers.wire.server import WireServer

NUM_BLOCKS, LENGTH = 128, 150
PROMPTS = [[3 + (7 * i + j) % 150 for j in range(40 + 5 * (i % 4))] for i in range(8)]
SEEDED = SamplingParams(temperature=0.9, seed=3, max_tokens=LENGTH, ignore_eos=True)
REQUESTS = [greedy(f"g{i}", prompt, LENGTH) for i, prompt in enumerate(PROMPTS[:4])]
REQUESTS += [Request(f"s{i}", tuple(prompt), SEEDED) for i, prompt in enumerate(PROMPTS[4:])]
SLOW_PREFILL = CostTable(Curve((1, 64), (0.01, 0.02)), Curve((1,), (0.0,)), prefill_s=0.05)


class Verifier:
    """An engine, its host and its server; ``limits`` are options of ``make_engine``."""

    def __init__(self, name: str, **limits: object) -> None:
        target, pool = tiny_target(), BlockPool(NUM_BLOCKS)
        drafter: Drafter = LocalDrafter(random_module(target), pool, law_width=8)
        self.name = name
        self.engine = make_engine(target, drafter, pool, **({"speculation": "static:2"} | limits))
        self.host = EngineHost(self.engine)
        self.exchange = EngineExchange(self.engine, "tiny", self.host.between_steps)
        self.described = {"kv_capacity_tokens": NUM_BLOCKS * 16, "kv_capacity_bytes": NUM_BLOCKS * 16 * 1000}
        self.is_alive = True
        self.host.start()

    def die(self) -> None:
        """Stop in the middle of a step; nothing is given back."""
        self.is_alive = False
        self.host.close()

    async def start(self) -> ReplicaFacts:
        self.server = WireServer(self.host, self.name, "model", "secret", exchange=self.exchange)
        return ReplicaFacts(self.name, await self.server.start(), "secret", "model", "tiny", 512, self.described)


@asynccontextmanager
async def serving(*verifiers: Verifier) -> AsyncIterator[Dispatcher]:
    facts = [await verifier.start() for verifier in verifiers]

    async def discover() -> Sequence[ReplicaFacts]:
        return facts

    def connect(found: ReplicaFacts) -> Link:
        return GrpcLink(found.replica_id, found.address, found.token, "router", found.fingerprint)

    fleet = Fleet(discover, connect, moves_kv=True)
    await fleet.refresh()
    try:
        yield Dispatcher(fleet, 64, 10.0)
    finally:
        await fleet.close()
        for verifier in verifiers:
            await verifier.server.stop()
            deadline = time.monotonic() + 5.0
            while verifier.is_alive and verifier.engine.pool.num_free < NUM_BLOCKS:
                assert time.monotonic() < deadline, "blocks are held"
                await asyncio.sleep(0.01)
            verifier.host.close()
            verifier.engine.pool.check()
        gc.collect()  # gRPC's servers must go while their event loop runs


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    return {name: result.tokens for name, result in run(make_engine(tiny_target(), speculation="off"), REQUESTS).items()}


@pytest.fixture
def pair() -> tuple[Verifier, Verifier]:
    return Verifier("v0"), Verifier("v1")


async def read(generation: Generation, into: dict[str, list[int]]) -> None:
    tokens = into.setdefault(generation.request.id, [])
    async for outcome in generation:
        tokens.extend(outcome.tokens)
    generation.close()


def bounded(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_streams_leave_a_verifier_that_drains(pair: tuple[Verifier, Verifier], expected: dict[str, list[int]]) -> None:
    leaving, staying = pair

    async def test() -> None:
        async with serving(*pair) as dispatcher:
            got: dict[str, list[int]] = {}
            generations = await dispatcher.start(REQUESTS)
            mine = [g for g in generations if g.replica_id == "v0"]
            assert len(mine) == 4
            reading = [asyncio.create_task(read(generation, got)) for generation in generations]
            while any(len(got.get(g.request.id, [])) < 30 for g in mine):
                await asyncio.sleep(0.005)
            before = staying.engine.scheduler.counters.prefix_hits
            started = time.monotonic()
            leaving.server.begin_drain()
            assert await asyncio.to_thread(leaving.host.drain, 20.0)
            drained_s = time.monotonic() - started
            unfinished = [task for task in reading if not task.done()]
            assert len(unfinished) > 4, f"it drained in {drained_s:.1f} s, and they were still running"
            await asyncio.gather(*reading)
            assert got == expected
            assert (dispatcher.moves, dispatcher.replays) == (4, 0)
            stats = staying.exchange.stats()
            assert stats["kv_fetches_total"] == 4
            assert stats["kv_failed_fetches_total"] == 0
            assert stats["kv_taken_blocks_total"] >= sum((len(g.request.prompt_token_ids) + 30) // 16 for g in mine) - 4
            assert staying.engine.scheduler.counters.prefix_hits > before
            assert dispatcher.in_flight == 0

    bounded(test)


def test_where_nobody_else_is_streams_end_where_they_are(expected: dict[str, list[int]]) -> None:
    alone = Verifier("v0")

    async def test() -> None:
        async with serving(alone) as dispatcher:
            got: dict[str, list[int]] = {}
            reading = [asyncio.create_task(read(generation, got)) for generation in await dispatcher.start(REQUESTS[:3])]
            await asyncio.sleep(0.05)
            alone.server.begin_drain()
            await asyncio.gather(*reading)
            assert got == {request.id: expected[request.id] for request in REQUESTS[:3]}
            assert (dispatcher.moves, dispatcher.replays) == (0, 0)

    bounded(test)


def test_a_verifier_that_dies_while_it_is_left_costs_a_prefill(pair: tuple[Verifier, Verifier], expected: dict[str, list[int]]) -> None:
    leaving, _ = pair

    async def test() -> None:
        async with serving(*pair) as dispatcher:
            got: dict[str, list[int]] = {}
            reading = [asyncio.create_task(read(generation, got)) for generation in await dispatcher.start(REQUESTS)]
            while sum(map(len, got.values())) < 200:
                await asyncio.sleep(0.005)
            leaving.server.begin_drain()
            leaving.die()
            await asyncio.gather(*reading)
            assert got == expected
            assert dispatcher.moves + dispatcher.replays >= 4

    bounded(test)


def test_a_long_prefix_is_fetched_from_a_busy_verifier() -> None:
    """The one that holds it takes no more requests; the other one fetches it, since its prefill is known to be slow."""
    document = [3 + (11 * j) % 150 for j in range(192)]
    first, second = (greedy(name, [*document, 7, end], 4) for name, end in (("first", 8), ("second", 9)))
    holder, idle = (Verifier(name, max_num_seqs=1, max_queued=0, max_batch_tokens=256, costs=SLOW_PREFILL) for name in ("v0", "v1"))

    async def test() -> None:
        async with serving(holder, idle) as dispatcher:
            got: dict[str, list[int]] = {}
            (generation,) = await dispatcher.start([first])
            await read(generation, got)
            held_by, other = (holder, idle) if generation.replica_id == "v0" else (idle, holder)
            occupant = greedy("busy", [5] * 8, 200)
            busy = await dispatcher.fleet.submit(dispatcher.fleet._links[held_by.name], occupant, ask_of(occupant))
            await anext(busy)
            await asyncio.sleep(0.6)  # a view that shows it
            (generation,) = await dispatcher.start([second])
            assert generation.replica_id == other.name
            await read(generation, got)
            busy.close()
            assert other.exchange.stats()["kv_taken_blocks_total"] == 12
            assert other.engine.scheduler.counters.prefix_hits == 192
            alone = run(make_engine(tiny_target(), speculation="off"), [second])
            assert got["second"] == alone["second"].tokens

    bounded(test)
