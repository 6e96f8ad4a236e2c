"""Traces served on a clock that only steps move: the same every time, as fast as the cost table says, and a judge of policies."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from helpers.engines import tiny_target

from dspark.bench.metrics import Limits
from dspark.bench.simulated import (
    SERVINGS,
    Kind,
    Served,
    SimulatedPlan,
    make_kinds,
    make_trace,
    relative_classes,
    run_simulated,
    serve,
)
from dspark.bench.traffic import ServiceClass
from dspark.errors import ConfigError
from dspark.workers.verifier.costs import CostTable, Curve
from dspark.workers.verifier.scheduler import Limits as StepLimits
from dspark.workers.verifier.targets import Target

# As measured for SmolLM2 on two cores, rounded.
COSTS = CostTable(
    verify=Curve((1, 8, 64, 256), (0.03, 0.037, 0.085, 0.228)),
    draft=Curve((1, 64), (0.0075, 0.045)),
    verify_context_s=6.5e-6,
    prefill_s=0.0008,
    draft_deeper=Curve((1, 64), (0.0005, 0.006)),
)
CLASSES = (ServiceClass("interactive", Limits(1200.0, 87.5)), ServiceClass("batch", Limits(6000.0, 262.5)))
PLAN = SimulatedPlan(
    rates=(2.0,),
    requests=40,
    repeats=1,
    seed=0,
    max_tokens=64,
    kinds=(Kind("chat", (60, 110, 200), 0.55), Kind("math", (90, 130), 0.8)),
    classes=CLASSES,
    limits=StepLimits(64, 512, prefix_cache=False),
)
PLAIN, ADAPTIVE, BUDGETS, REFUSING = SERVINGS


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def kept(plan: SimulatedPlan, served: Served, rate: float) -> float:
    trace = make_trace(plan, rate, plan.seed)
    return sum(map(served.keeps, trace)) / len(trace)


def test_one_request_takes_what_the_table_says(target: Target) -> None:
    plan = dataclasses.replace(PLAN, requests=1)
    (arrival,) = make_trace(plan, 2.0, 0)
    served = serve(plan, PLAIN, [arrival], target, COSTS)
    timeline = served.timeline(arrival)
    assert timeline is not None
    assert timeline.num_tokens == 64
    prompt = arrival.num_prompt
    assert timeline.ttft_s == pytest.approx(COSTS.step_seconds(1, prompt) + COSTS.prefill_s * prompt)
    assert timeline.tpot_s == pytest.approx(COSTS.step_seconds(1, prompt + 32), rel=0.02)


def test_the_same_trace_is_served_the_same_and_drafts_make_it_faster(target: Target) -> None:
    trace = make_trace(PLAN, 2.0, 0)
    assert trace == make_trace(PLAN, 2.0, 0) != make_trace(PLAN, 2.0, 1)
    plain, once, again = (serve(PLAN, serving, trace, target, COSTS) for serving in (PLAIN, ADAPTIVE, ADAPTIVE))
    assert once.chunks_s == again.chunks_s
    assert max(map(max, once.chunks_s.values())) < max(map(max, plain.chunks_s.values()))
    assert all(count == 64 for count in once.num_tokens.values())


@pytest.mark.parametrize("rate", [3.0, 4.5, 6.0])
def test_budgets_do_no_harm(target: Target, rate: float) -> None:
    """Below, at and beyond the load at which budgets begin to be missed: an earlier policy kept less than half (docs/adr/011)."""
    plan = dataclasses.replace(PLAN, requests=120)
    trace = make_trace(plan, rate, 0)
    without, told, refusing = (kept(plan, serve(plan, s, trace, target, COSTS), rate) for s in (ADAPTIVE, BUDGETS, REFUSING))
    assert told >= 0.93 * without
    assert refusing >= 0.93 * without


def test_refusals_help_beyond_the_knee(target: Target) -> None:
    plan = dataclasses.replace(PLAN, requests=160)
    trace = make_trace(plan, 7.0, 0)
    without, refusing = (serve(plan, serving, trace, target, COSTS) for serving in (ADAPTIVE, REFUSING))
    assert not without.refused
    assert refusing.refused
    assert not refusing.refused & set(refusing.chunks_s)
    assert kept(plan, refusing, 7.0) > kept(plan, without, 7.0)


def test_rows_ratios_and_records(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    run_simulated(dataclasses.replace(PLAN, requests=10, repeats=2), target, COSTS, out)
    printed = capsys.readouterr().out
    assert all(serving.name in printed for serving in SERVINGS)
    assert "goodput at 2/s against adaptive: plain " in printed
    assert printed.count("interactive") == 1 + len(SERVINGS)
    records = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [record["serving"] for record in records] == [serving.name for serving in SERVINGS]
    assert all(len(record["shares_kept"]) == 2 and record["kind"] == "simulated" for record in records)


def test_kinds_and_classes_from_what_is_known() -> None:
    kinds = make_kinds({"a": [100, 300], "b": [200]}, [0.5])
    assert [(kind.name, kind.lengths, kind.acceptance) for kind in kinds] == [("a", (100, 300), 0.5), ("b", (200,), 0.5)]
    assert [kind.acceptance for kind in make_kinds({"a": [1], "b": [2]}, [0.5, 0.7])] == [0.5, 0.7]
    interactive, batch = relative_classes(kinds, COSTS)
    assert interactive.limits.tpot_ms == pytest.approx(2 * 1e3 * COSTS.step_seconds(1, 200), abs=0.1)
    assert batch.limits.ttft_ms == pytest.approx(5 * (interactive.limits.ttft_ms or 0), abs=0.5)
    for wrong in ([0.5, 0.6, 0.7], [1.5], []):
        with pytest.raises(ConfigError, match="--acceptance"):
            make_kinds({"a": [1], "b": [2]}, wrong)
