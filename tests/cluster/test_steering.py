"""From budgets to decisions to verifiers and to Serve, without Ray: fleets of scripted verifiers, made-up contexts of Serve."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers.apis import run
from helpers.fleets import Hosts, serving
from helpers.scripted import ScriptedHost
from prometheus_client import CollectorRegistry

from dspark.cluster import autoscaling
from dspark.cluster.app import draft_worker_scaling, verifier_scaling
from dspark.cluster.autoscaling import BUSY, REFUSED, REQUESTS, TURNS, WANTED, BusyDraftWorkers, WantedVerifiers
from dspark.cluster.http.budgets import Ledger, Stopwatch
from dspark.cluster.steering import Steering, rules_of
from dspark.config import AutoscaleConfig, ServeConfig
from dspark.router.classes import Terms
from dspark.router.replica_count import ScalingState
from dspark.types import LatencyBudget, ReplicaView

FIXED = ServeConfig(autoscale=AutoscaleConfig(cold_start_s=0))
SCALED = ServeConfig(autoscale=AutoscaleConfig(max_verifiers=4, cold_start_s=0, up_cooldown_s=0, speculation_lever=False))


DRAFT_RULES = {"min_count": 1, "max_count": 4, "up_cooldown_s": 5.0, "down_cooldown_s": 20.0, "start_timeout_s": 60.0}


class Busy(ScriptedHost):
    """Drafts much, to little use, at full load."""

    def view(self, replica_id: str, address: str) -> ReplicaView:
        return dataclasses.replace(
            super().view(replica_id, address),
            running=8,
            step_costs=tuple((n, 0.020 + 0.002 * n) for n in range(1, 129)),
            drafted_per_round=5.0 * self.speculation_limit,
            tokens_per_round=1.0 + 0.5 * (1 - (1 - self.speculation_limit) ** 2),
            speculation_limit=self.speculation_limit,
        )


def slow_requests(ledger: Ledger, now_s: float, count: int, tpot_ms: float, budget: LatencyBudget) -> None:
    """Requests that ended just now."""

    class Somewhere:
        replica_id = "v0"

    for _ in range(count):
        timed = Stopwatch(Terms("chat", budget, 0, False), now_s - 0.1)
        timed.chunk(now_s - 0.1, 1)
        timed.chunk(now_s - 0.1 + 10 * tpot_ms / 1e3, 10)
        ledger.opened(timed, Somewhere())
        ledger.closed(timed, now_s, True, False)


def test_missed_budgets_reach_verifiers_as_a_limit_and_serve_as_a_count() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.add("v0", Busy())
        async with serving(hosts) as dispatcher:
            ledger = Ledger(CollectorRegistry(), "tiny")
            now_s = asyncio.get_running_loop().time()
            fixed = Steering(dispatcher.fleet, ledger, rules_of(FIXED))
            assert fixed.decide(now_s + 1).state is ScalingState.SETTLING
            slow_requests(ledger, now_s + 15, 30, 60, LatencyBudget(None, 45))
            limited = fixed.decide(now_s + 16)
            assert limited.speculation_limit < 1.0
            assert limited.wanted == 1, "the number is not ours to change"
            assert hosts.hosts["v0"].speculation_limit == limited.speculation_limit

            scaled = Steering(dispatcher.fleet, ledger, rules_of(SCALED))
            scaled.decide(now_s + 17)
            slow_requests(ledger, now_s + 18, 30, 200, LatencyBudget())
            decision = scaled.decide(now_s + 19)
            assert decision.wanted > 1, "requests without a budget count with the default one where verifiers are scaled"
            assert scaled.decision == decision

    run(test)


def test_without_budgets_a_fixed_cluster_is_left_alone() -> None:
    async def test() -> None:
        hosts = Hosts()
        hosts.add("v0", Busy())
        async with serving(hosts) as dispatcher:
            ledger = Ledger(CollectorRegistry(), "tiny")
            steering = Steering(dispatcher.fleet, ledger, rules_of(FIXED))
            for t in range(40):
                now_s = asyncio.get_running_loop().time() + t
                slow_requests(ledger, now_s, 5, 5000, LatencyBudget())
                decision = steering.decide(now_s)
            assert (decision.speculation_limit, decision.state) == (1.0, ScalingState.STEADY)

    run(test)


def test_a_loop_that_fails_once_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark.cluster.steering.PERIOD_S", 0.01)

    async def test() -> None:
        seen: list[int] = []

        def after(decision: object) -> None:
            seen.append(1)
            if len(seen) == 1:
                raise RuntimeError("a bug")

        hosts = Hosts()
        hosts.add("v0", ScriptedHost())
        async with serving(hosts) as dispatcher:
            task = asyncio.create_task(Steering(dispatcher.fleet, Ledger(CollectorRegistry(), "tiny"), rules_of(SCALED), after).run())
            while len(seen) < 3:
                await asyncio.sleep(0.01)
            task.cancel()

    run(test)


# --- Serve's side ---


@dataclass(frozen=True)
class Point:
    timestamp: float
    value: float


@dataclass(frozen=True)
class Replica:
    unique_id: str


@dataclass
class Context:
    """What our policies read of Serve's ``AutoscalingContext``."""

    target_num_replicas: int = 2
    current_time: float = 100.0
    raw_metrics: dict[str, dict[Replica, list[Point]]] | None = field(default_factory=dict)
    running_replicas: list[Replica] = field(default_factory=lambda: [Replica("a"), Replica("b")])


def said(values: dict[str, float], at_s: float = 99.0, name: str = WANTED) -> dict[str, dict[Replica, list[Point]]]:
    return {name: {Replica(replica): [Point(at_s - 5, 1.0), Point(at_s, value)] for replica, value in values.items()}}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, 2),
        (None, 2),
        (said({}), 2),
        (said({"a": 3.0}), 3),
        (said({"a": 3.0, "b": 4.0}), 4),
        (said({"a": 0.0}), 2),
        (said({"a": 0.0, "b": 1.0}), 1),
        (said({"a": 3.0}, at_s=80.0), 2),
        (said({"gone": 9.0}), 2),
        ({WANTED: {Replica("a"): []}}, 2),
    ],
    ids=["nothing", "none", "no series", "one", "most", "no opinion", "one has none", "stale", "not running", "empty series"],
)
def test_serve_gets_the_newest_wish_or_stays(metrics: Any, expected: int) -> None:
    assert WantedVerifiers()(Context(raw_metrics=metrics)) == (expected, {})


@pytest.mark.parametrize("policy", [WantedVerifiers(), BusyDraftWorkers(DRAFT_RULES, 20.0)], ids=["verifiers", "draft workers"])
def test_a_policy_never_raises(policy: Any) -> None:
    broken = Context(raw_metrics={WANTED: {Replica("a"): [None]}, BUSY: {Replica("a"): [None]}})  # type: ignore[list-item]
    assert policy(broken) == (2, {})


def test_draft_workers_are_decided_once_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = BusyDraftWorkers(DRAFT_RULES, 20.0)
    asked: list[float] = []
    decide = policy._scaler.decide
    monkeypatch.setattr(policy._scaler, "decide", lambda now_s, reports: (asked.append(now_s), decide(now_s, reports))[1])
    context = Context(target_num_replicas=1, running_replicas=[Replica("a")])
    for second in range(30):
        context.raw_metrics = {}
        for name, rate in ((BUSY, 0.95), (TURNS, 20.0), (REFUSED, 0.0)):
            context.raw_metrics |= said({"a": rate * second}, 100.0 + second, name)
        for tenth in range(10):
            context.current_time = 100.0 + second + tenth / 10
            wanted, _ = policy(context)
    assert len(asked) == 30
    assert wanted == 2
    context.running_replicas.append(Replica("b"))  # it has not reported yet
    context.raw_metrics = said({"a": 29.0}, 131.0, BUSY) | said({"a": 600.0}, 131.0, TURNS)
    assert policy(context)[0] == 2


@pytest.mark.parametrize(("held", "expected"), [(8.0, 2), (800.0, 1)])
def test_requests_without_room_are_a_share_of_those_that_are_held(held: float, expected: int) -> None:
    policy = BusyDraftWorkers(DRAFT_RULES, 20.0)
    context = Context(target_num_replicas=1, running_replicas=[Replica("a")])
    for second in range(30):
        context.raw_metrics, context.current_time = said({"a": held}, 100.0 + second, REQUESTS), 100.0 + second
        for name, rate in ((BUSY, 0.2), (TURNS, 400.0), (REFUSED, 1.0)):
            context.raw_metrics |= said({"a": rate * second}, 100.0 + second, name)
        wanted, _ = policy(context)
    assert wanted == expected


def test_options_for_serve() -> None:
    assert verifier_scaling(ServeConfig(num_verifiers=3)) == {"num_replicas": 3}
    scaling = verifier_scaling(ServeConfig(num_verifiers=2, autoscale=AutoscaleConfig(max_verifiers=5)))["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"], scaling["max_replicas"]) == (1, 2, 5)
    module, _, name = scaling["policy"]["policy_function"].partition(":")
    assert (module, getattr(autoscaling, name)) == ("dspark.cluster.autoscaling", WantedVerifiers)
    assert draft_worker_scaling(ServeConfig(), 2) == {"num_replicas": 2}
    drafting = draft_worker_scaling(ServeConfig(autoscale=AutoscaleConfig(max_draft_workers=3)), 2)["autoscaling_config"]
    policy = drafting["policy"]
    assert getattr(autoscaling, policy["policy_function"].partition(":")[2])(**policy["policy_kwargs"])(Context()) == (2, {})
