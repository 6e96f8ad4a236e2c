"""Service classes and latency budgets from the request to the metrics, as clients see them."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from helpers.apis import CHAT, Setup, api, run
from helpers.scripted import ScriptedHost
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from dspark.cluster.http.budgets import Ledger, Stopwatch, shown
from dspark.config import ServiceClass
from dspark.router.classes import Classes, Terms
from dspark.types import LatencyBudget

CLASSES = Classes(
    {
        "chat": ServiceClass(ttft_ms=60_000, tpot_ms=50_000, priority=-1),
        "strict": ServiceClass(ttft_ms=0.001, tpot_ms=0.001),
        "now": ServiceClass(ttft_ms=30, reject_when_late=True),
        "batch": ServiceClass(priority=5),
    },
    default="chat",
)
COSTS = ((1, 0.010), (64, 0.020))


async def counters(setup: Setup, name: str) -> dict[tuple[str, ...], float]:
    """Series of a counter by (service class, budget, met), as far as it has them."""
    text = (await setup.client.get("/metrics")).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    return {tuple(s.labels[k] for k in ("service_class", "budget", "met") if k in s.labels): s.value for s in samples}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ("chat", 60_000, 50_000, -1)),
        ({"service_class": "batch"}, ("batch", None, None, 5)),
        ({"service_class": "chat", "latency_budget": {"tpot_ms": 7}}, ("chat", 60_000, 7, -1)),
        ({"service_class": "batch", "latency_budget": {"ttft_ms": 9}, "priority": 0}, ("batch", 9, None, 0)),
        ({"priority": 3}, ("chat", 60_000, 50_000, 3)),
    ],
)
def test_a_request_gets_its_class_and_its_own_wishes_win(body: dict[str, Any], expected: tuple[Any, ...]) -> None:
    async def test() -> None:
        async with api(classes=CLASSES) as setup:
            assert (await setup.post("/v1/chat/completions", CHAT | body)).status_code == 200
            (seen,) = setup.hosts.hosts["v0"].seen
            assert (seen.service_class, seen.latency_budget.ttft_ms, seen.latency_budget.tpot_ms, seen.priority) == expected

    run(test)


def test_an_unknown_class_is_refused_and_the_known_ones_are_named() -> None:
    async def test() -> None:
        async with api(classes=CLASSES) as setup:
            error = (await setup.post("/v1/chat/completions", CHAT | {"service_class": "gold"})).json()["error"]
            assert (error["param"], error["code"]) == ("service_class", "unknown_service_class")
            assert "chat, strict, now, batch" in error["message"]
            assert setup.hosts.hosts["v0"].seen == []

    run(test)


def test_what_was_kept_is_in_the_response_and_in_the_metrics() -> None:
    async def test() -> None:
        async with api(classes=CLASSES) as setup:
            kept = (await setup.post("/v1/chat/completions", CHAT)).json()["metrics"]["latency_budget"]
            assert (kept["service_class"], kept["ttft_ms"], kept["tpot_ms"], kept["met"]) == ("chat", 60_000, 50_000, True)
            assert 0 < kept["measured_tpot_ms"] < 50_000
            assert 0 < kept["measured_ttft_ms"] < 60_000
            *_, last = await setup.stream("/v1/chat/completions", CHAT | {"service_class": "strict", "n": 2})
            missed = last["metrics"]["latency_budget"]
            assert (missed["service_class"], missed["met"]) == ("strict", False)
            assert missed["measured_ttft_ms"] > 0.001
            free = (await setup.post("/v1/chat/completions", CHAT | {"service_class": "batch"})).json()
            assert "latency_budget" not in free["metrics"]
            assert await counters(setup, "dspark_budget_requests_total") == {
                ("chat", "ttft", "true"): 1,
                ("chat", "tpot", "true"): 1,
                ("strict", "ttft", "false"): 2,
                ("strict", "tpot", "false"): 2,
            }
            assert await counters(setup, "dspark_goodput_requests_total") == {("chat",): 1}

    run(test)


class Slow(ScriptedHost):
    """A verifier with a cost table, whose queue the test decides about."""

    queue = 0

    def view(self, replica_id: str, address: str) -> Any:

        return dataclasses.replace(super().view(replica_id, address), step_costs=COSTS, queued=self.queue, queued_tokens=100 * self.queue)


def test_a_class_may_be_refused_instead_of_late() -> None:
    async def test() -> None:
        host = Slow(vocab=1000)
        async with api(host, classes=CLASSES) as setup:
            assert (await setup.post("/v1/chat/completions", CHAT | {"service_class": "now"})).status_code == 200
            host.queue = 200
            await asyncio.sleep(0.1)  # for the next view
            refused = await setup.post("/v1/chat/completions", CHAT | {"service_class": "now"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert "ttft_ms 30" in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1
            assert (await setup.post("/v1/chat/completions", CHAT | {"service_class": "strict"})).status_code == 200, "late, not refused"
            own = CHAT | {"service_class": "now", "latency_budget": {"ttft_ms": 1e8}}
            assert (await setup.post("/v1/chat/completions", own)).status_code == 200, "its own budget is the one that counts"
            assert await counters(setup, "dspark_late_rejections_total") == {("now",): 1}
            assert len(host.seen) == 3

    run(test)


def test_a_failed_request_met_nothing() -> None:
    async def test() -> None:
        host = ScriptedHost(vocab=1000, step_s=0.02)
        async with api(host, classes=CLASSES) as setup:
            task = asyncio.create_task(setup.stream("/v1/chat/completions", CHAT | {"max_tokens": 500}))
            while not host.seen:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            setup.hosts.kill("v0")
            await task
            kept = await counters(setup, "dspark_budget_requests_total")
            assert kept == {("chat", "ttft", "true"): 1, ("chat", "tpot", "false"): 1}
            assert await counters(setup, "dspark_goodput_requests_total") == {}

    run(test)


# --- the ledger by itself, with a made-up clock ---


class Somewhere:
    replica_id = "v0"


def ledger() -> tuple[Ledger, CollectorRegistry]:
    registry = CollectorRegistry()
    return Ledger(registry, "tiny"), registry


def watch(ttft_ms: float | None, tpot_ms: float | None, *chunks: tuple[float, int]) -> Stopwatch:
    result = Stopwatch(Terms("c", LatencyBudget(ttft_ms, tpot_ms), 0, False), 10.0)
    for at_s, num_tokens in chunks:
        result.chunk(at_s, num_tokens)
    return result


@pytest.mark.parametrize(
    ("chunks", "closed_s", "finished", "failed", "ttft", "tpot", "good"),
    [
        (((10.4, 1), (11.0, 6)), 11.0, True, False, True, True, True),
        (((10.6, 1), (11.0, 6)), 11.0, True, False, False, True, False),
        (((10.4, 1), (11.1, 6)), 11.1, True, False, True, False, False),
        (((10.4, 1),), 10.4, True, False, True, None, True),
        ((), 10.2, False, False, None, None, False),
        ((), 10.6, False, False, False, None, False),
        (((10.4, 1), (10.5, 6)), 10.5, False, False, True, True, False),
        (((10.4, 1), (10.5, 6)), 10.5, False, True, True, False, False),
        ((), 10.2, False, True, False, False, False),
    ],
    ids=["kept", "late first", "slow", "one token", "left early", "left when late", "left midway", "failed midway", "failed before"],
)
def test_every_end_of_a_request(
    chunks: Any, closed_s: float, finished: bool, failed: bool, ttft: bool | None, tpot: bool | None, good: bool
) -> None:
    """Budgets of 500 ms and 100 ms."""
    book, registry = ledger()
    timed = watch(500, 100, *chunks)
    book.opened(timed, Somewhere())
    book.closed(timed, closed_s, finished, failed)

    def count(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "tiny", "service_class": "c"} | labels)

    for budget, met in (("ttft", ttft), ("tpot", tpot)):
        for value in (True, False):
            expected = 1.0 if met is value else None
            assert count("dspark_budget_requests_total", budget=budget, met=str(value).lower()) == expected
    assert count("dspark_goodput_requests_total") == (1.0 if good else None)


def test_scaling_gets_those_that_ended_once_and_those_that_wait_each_time() -> None:
    book, _ = ledger()
    done, waiting, running = watch(500, 100, (10.4, 1), (11.0, 6)), watch(500, None), watch(None, None, (10.1, 1))
    for timed in (done, waiting, running):
        book.opened(timed, Somewhere())
    book.closed(done, 11.0, True, False)
    ended, waits = book.take(12.0)
    assert (ended.ended, ended.replica_id, ended.arrived_s) == (True, "v0", 10.0)
    assert (ended.ttft_s, ended.tpot_s) == (pytest.approx(0.4), pytest.approx(0.1))
    assert (waits.ended, waits.ttft_s) == (False, pytest.approx(2.0))
    (again,) = book.take(13.0)
    assert again.ttft_s == pytest.approx(3.0)


def test_the_slowest_choice_is_shown() -> None:
    both = shown([watch(500, None, (10.4, 1), (10.5, 2)), watch(500, None, (10.6, 1), (11.0, 2))])["latency_budget"]
    assert both == {
        "service_class": "c",
        "ttft_ms": 500,
        "tpot_ms": None,
        "measured_ttft_ms": pytest.approx(600),
        "measured_tpot_ms": pytest.approx(200),
        "met": False,
    }
    assert shown([watch(None, None, (10.4, 1))]) == {}


# --- status ---


def test_status_tells_all_that_is_known() -> None:
    async def test() -> None:
        host = Slow(vocab=1000, max_running=4)
        async with api(host, classes=CLASSES) as setup:
            await setup.post("/v1/chat/completions", CHAT)
            answer = (await setup.client.get("/status")).json()
            while answer["verifiers"][0]["kv"]["free_blocks"] < 256:  # views come four times a second
                await asyncio.sleep(0.05)
                answer = (await setup.client.get("/status")).json()
            assert (answer["status"], answer["model"], answer["routers"]) == ("ok", "tiny", {"count": 1, "in_flight": 0})
            (verifier,) = answer["verifiers"]
            assert (verifier["id"], verifier["state"], verifier["requests"]["places"]) == ("v0", "ok", 4)
            assert verifier["kv"] == {"blocks": 256, "free_blocks": 256}
            assert verifier["budgets"] == {"met": 1, "missed": 0, "share": 1.0}
            assert verifier["predicted"]["tpot_ms"] == 10.0
            assert verifier["speculation"] == {"state": "off", "limit": 1.0}
            assert answer["draft_workers"] == []
            assert answer["scaling"] is None
            chat, *others = answer["service_classes"]
            assert (chat["name"], chat["is_default"], chat["ttft"]) == ("chat", True, {"met": 1, "missed": 0, "share": 1.0})
            assert [entry["name"] for entry in others] == ["strict", "now", "batch"]
            assert (chat["goodput_requests"], chat["late_rejections"]) == (1, 0)
            host.healthy = False
            await asyncio.sleep(0.1)
            stuck = (await setup.client.get("/status")).json()
            assert (stuck["status"], stuck["verifiers"][0]["state"]) == ("no verifier makes progress", "no progress")

    run(test)


def test_status_counts_all_routers() -> None:
    async def test() -> None:
        async def others() -> list[Any]:
            name = "dspark_budget_requests"
            labels = {"model_name": "tiny", "service_class": "chat", "budget": "ttft", "met": "false"}
            flying = ("dspark_in_flight", "gauge", "", [("dspark_in_flight", {"model_name": "tiny"}, 2.0)])
            return [[], [(name, "counter", "", [(f"{name}_total", labels, 3.0)]), flying]]

        async with api(classes=CLASSES, other_families=others) as setup:
            await setup.post("/v1/chat/completions", CHAT)
            answer = (await setup.client.get("/status")).json()
            assert answer["routers"] == {"count": 2, "in_flight": 2}
            assert answer["service_classes"][0]["ttft"] == {"met": 1, "missed": 3, "share": 0.25}

    run(test)
