"""Requests reach verifiers, survive their deaths and leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from helpers.fleets import Hosts, serving
from helpers.scripted import ScriptedHost, continuation

from dspark.cluster import dispatch
from dspark.cluster.dispatch import MAX_REPLAYS, Generation
from dspark.errors import BadRequest, Overloaded, WorkerLost
from dspark.sampling import SamplingParams
from dspark.types import Request

PROMPT = (1, 2, 3)


def request(name: str = "r", max_tokens: int = 20, prompt: tuple[int, ...] = PROMPT) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))


async def collect(generation: Generation) -> list[int]:
    tokens: list[int] = []
    try:
        async for outcome in generation:
            tokens.extend(outcome.tokens)
    finally:
        generation.close()
    return tokens


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


def fleet_of(*hosts: ScriptedHost) -> Hosts:
    hosting = Hosts()
    for index, host in enumerate(hosts):
        hosting.add(f"v{index}", host)
    return hosting


def test_load_spreads_over_verifiers() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost(), ScriptedHost())
        async with serving(hosts) as dispatcher:
            for host in hosts.hosts.values():
                host.gate.clear()
            generations = [(await dispatcher.start([request(f"r{i}")]))[0] for i in range(8)]
            for host in hosts.hosts.values():
                host.gate.set()
            assert [await collect(g) for g in generations] == [continuation(PROMPT, 20)] * 8
            assert sorted(len(host.seen) for host in hosts.hosts.values()) == [4, 4]
            assert dispatcher.in_flight == 0

    run(test)


def test_a_shared_prefix_stays_where_it_is() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost(), ScriptedHost())
        async with serving(hosts) as dispatcher:
            for i in range(6):
                (generation,) = await dispatcher.start([request(f"r{i}", 2, tuple([7] * 640 + [i]))])
                await collect(generation)
            assert sorted(len(host.seen) for host in hosts.hosts.values()) == [0, 6]

    run(test)


def test_a_death_mid_stream_costs_a_replay_and_no_token() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost(step_s=0.01), ScriptedHost(step_s=0.01))
        async with serving(hosts) as dispatcher:
            (generation,) = await dispatcher.start([request(max_tokens=60)])
            first = next(name for name, host in hosts.hosts.items() if host.seen)
            tokens: list[int] = []
            async for outcome in generation:
                tokens.extend(outcome.tokens)
                if len(tokens) == 10:
                    hosts.kill(first)
            generation.close()
            assert tokens == continuation(PROMPT, 60)
            (other,) = (host for name, host in hosts.hosts.items() if name != first)
            (replay,) = other.seen
            assert replay.prompt_token_ids == (*PROMPT, *tokens[:10])
            assert replay.num_prompt_tokens == 3
            assert replay.noise_seed == generation.request.noise_seed
            assert (generation.num_replays, dispatcher.replays, dispatcher.in_flight) == (1, 1, 0)

    run(test)


def test_a_replay_waits_for_a_new_verifier() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost(step_s=0.01))
        async with serving(hosts) as dispatcher:
            (generation,) = await dispatcher.start([request(max_tokens=40)])
            await anext(generation)
            hosts.kill("v0")
            hosts.add("v1", ScriptedHost())
            assert len(await collect(generation)) == 38

    run(test)


def test_without_another_verifier_the_stream_ends_in_an_error() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost(step_s=0.01))
        async with serving(hosts, replay_wait_s=0.3) as dispatcher:
            (generation,) = await dispatcher.start([request(max_tokens=40)])
            await anext(generation)
            hosts.kill("v0")
            with pytest.raises(Overloaded, match="no verifier"):
                await collect(generation)
            assert dispatcher.in_flight == 0

    run(test)


def test_a_request_that_kills_verifiers_is_given_up() -> None:
    async def test() -> None:
        hosts = fleet_of(*(ScriptedHost(step_s=0.01) for _ in range(6)))
        async with serving(hosts) as dispatcher:
            (generation,) = await dispatcher.start([request(max_tokens=1000)])

            async def kill_wherever_it_goes() -> None:
                async for _ in generation:
                    hosts.kill(next(name for name, host in hosts.hosts.items() if host.stats()["running"]))

            with pytest.raises(WorkerLost, match="gave up"):
                await kill_wherever_it_goes()
            generation.close()
            assert sum(len(host.seen) for host in hosts.hosts.values()) == MAX_REPLAYS + 1

    run(test)


def test_closing_frees_the_verifier_at_once() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost(step_s=0.01))
        async with serving(hosts) as dispatcher:
            (generation,) = await dispatcher.start([request(max_tokens=1000)])
            await anext(generation)
            generation.close()
            generation.close()
            assert hosts.hosts["v0"].stats() == {"running": 0.0, "free_blocks": 256.0}
            assert dispatcher.in_flight == 0

    run(test)


def test_our_admission_refuses_with_a_time_to_come_back() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost(max_running=2, max_queued=50))
        hosts.hosts["v0"].gate.clear()
        async with serving(hosts, max_waiting=3) as dispatcher:
            generations = [(await dispatcher.start([request(f"r{i}")]))[0] for i in range(5)]
            with pytest.raises(Overloaded) as caught:
                await dispatcher.start([request("over")])
            assert caught.value.retry_after_s >= 1
            hosts.hosts["v0"].gate.set()
            assert [len(await collect(g)) for g in generations] == [20] * 5

    run(test)


def test_a_set_of_choices_is_placed_whole_or_not_at_all() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost(max_running=1, max_queued=1))
        hosts.hosts["v0"].gate.clear()
        async with serving(hosts, max_waiting=100) as dispatcher:
            with pytest.raises(Overloaded):
                await dispatcher.start([request(f"r{i}") for i in range(4)])
            assert hosts.hosts["v0"].stats()["running"] == 0
            with pytest.raises(BadRequest):
                await dispatcher.start([request("a"), request("b", prompt=(1000,))])
            assert hosts.hosts["v0"].stats()["running"] == 0
            assert dispatcher.in_flight == 0

    run(test)


def test_an_overloaded_verifier_is_passed_over() -> None:
    async def test() -> None:
        full, free = ScriptedHost(max_running=8), ScriptedHost(max_running=1)
        full.fail_with = Overloaded("full")
        hosts = fleet_of(full, free)
        async with serving(hosts) as dispatcher:
            for i in range(3):
                (generation,) = await dispatcher.start([request(f"r{i}", 4)])
                assert len(await collect(generation)) == 4

    run(test)


def test_no_verifier_is_an_overload_after_a_bounded_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "NEW_WAIT_S", 0.2)

    async def test() -> None:
        async with serving(Hosts()) as dispatcher:
            with pytest.raises(Overloaded, match="no verifier"):
                await dispatcher.start([request()])

    run(test)


def test_draining_routers_take_nothing_new() -> None:
    async def test() -> None:
        async with serving(fleet_of(ScriptedHost())) as dispatcher:
            (generation,) = await dispatcher.start([request()])
            dispatcher.is_draining = True
            with pytest.raises(Overloaded, match="shutting down"):
                await dispatcher.start([request("late")])
            assert len(await collect(generation)) == 20

    run(test)


def test_a_verifier_with_another_model_is_not_used() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost())
        async with serving(hosts) as dispatcher:
            hosts.add("other", ScriptedHost(), fingerprint="another model")
            await dispatcher.fleet.refresh()
            assert [status.view.id for status in dispatcher.fleet.statuses] == ["v0"]

    run(test)


def test_a_verifier_that_left_keeps_its_streams() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost(step_s=0.01))
        async with serving(hosts) as dispatcher:
            (generation,) = await dispatcher.start([request(max_tokens=40)])
            await anext(generation)
            hosts.listed.clear()  # Serve stops listing a replica as soon as it begins to shut down
            await dispatcher.fleet.refresh()
            assert len(await collect(generation)) == 38
            await dispatcher.fleet.refresh()
            assert dispatcher.fleet.statuses == []

    run(test)


def test_verifiers_are_kept_and_found_again_while_serve_does_not_answer() -> None:
    async def test() -> None:
        hosts = fleet_of(ScriptedHost(), ScriptedHost())
        async with serving(hosts) as dispatcher:
            hosts.is_silent = True
            lost = hosts.links["v1"]
            lost.kill()
            await dispatcher.fleet.refresh()
            assert sorted(status.view.id for status in dispatcher.fleet.statuses) == ["v0", "v1"]
            assert hosts.links["v1"] is not lost, "it is opened again, with what was known of it"
            (generation,) = await dispatcher.start([request()])
            assert len(await collect(generation)) == 20
            hosts.is_silent = False
            hosts.kill("v1")
            await dispatcher.fleet.refresh()
            assert [status.view.id for status in dispatcher.fleet.statuses] == ["v0"]

    run(test)


def test_an_unhealthy_verifier_gets_nothing_new() -> None:
    async def test() -> None:
        sick, well = ScriptedHost(max_running=64), ScriptedHost()
        sick.healthy = False
        hosts = fleet_of(sick, well)
        async with serving(hosts) as dispatcher:
            for i in range(4):
                (generation,) = await dispatcher.start([request(f"r{i}", 2)])
                await collect(generation)
            assert (len(sick.seen), len(well.seen)) == (0, 4)

    run(test)
