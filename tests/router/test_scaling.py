"""The scaler driven by traces: steps, ramps, noise, gaps, cold starts, replicas that never come."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from helpers.load_traces import TABLE, Trace

from dspark.router.replica_count import CountRules, ScalingState
from dspark.router.samples import Sample
from dspark.router.scaling import Report, Rules, VerifierScaler
from dspark.types import LatencyBudget, ReplicaView


def scaler(**changes: Any) -> VerifierScaler:
    count = {"min_count": 1, "max_count": 8, "up_cooldown_s": 10.0, "down_cooldown_s": 40.0, "start_timeout_s": 60.0}
    rules = {
        "target_met": 0.95,
        "window_s": 20.0,
        "min_samples": 10,
        "cold_start_s": 5.0,
        "default_budget": LatencyBudget(2000, 100),
        "speculation_lever": True,
    }
    return VerifierScaler(
        Rules(
            CountRules(**{key: changes.pop(key, value) for key, value in count.items()}),  # type: ignore[arg-type]
            **(rules | changes),  # type: ignore[arg-type]
        )
    )


def changes(counts: list[int]) -> list[int]:
    """The counts in the order in which they came."""
    return [count for count, _ in itertools.groupby(counts)]


# One replica keeps 35 ms a token up to 15 rows; 60 tokens then take 2 s: it does a little over 7 requests a second.


def test_a_light_load_changes_nothing() -> None:
    assert changes(Trace(scaler(), lambda t: 3.0).run(300)) == [1]


def test_a_step_up_and_down_moves_the_count_once_each_way() -> None:
    trace = Trace(scaler(), lambda t: 12.0 if 50 < t < 300 else 2.0)
    counts = trace.run(600)
    assert changes(counts) == [1, 2, 1]
    assert counts[60] == 2, "a few seconds and a start after the step"
    assert counts[295] == 2
    late = [d.met for d in trace.decisions[120:295] if d.met is not None]
    assert min(late) >= 0.95


def test_a_large_step_doubles() -> None:
    counts = Trace(scaler(), lambda t: 50.0 if t > 30 else 2.0).run(250)
    assert changes(counts)[:3] == [1, 2, 4]
    assert counts[-1] in (7, 8)


def test_a_ramp_is_followed_both_ways_without_oscillation() -> None:
    trace = Trace(scaler(), lambda t: 2.0 + 28.0 * min(t, 1200 - t) / 600)
    steps = changes(trace.run(1200))
    top = steps.index(max(steps))
    assert 4 <= max(steps) <= 8
    assert steps[:top] == sorted(steps[:top])
    assert steps[top:] == sorted(steps[top:], reverse=True)
    assert steps[-1] <= 2


@pytest.mark.parametrize("rate", [6.0, 7.5, 9.0, 14.0, 16.0])
@pytest.mark.parametrize("start", [1, 4])
def test_a_constant_load_ends_in_a_constant_count(rate: float, start: int) -> None:
    """Where a count is just too few it is tried again, less and less often."""
    counts = Trace(scaler(), lambda t: rate, replicas=start, noise=0.2).run(800)
    moves = [t for t in range(1, len(counts)) if counts[t] != counts[t - 1]]
    settled = [t for t in moves if t > 300]
    assert len(settled) <= 2, "one attempt with fewer, and back"
    assert counts[-1] == {6.0: 2, 7.5: 2, 9.0: 2, 14.0: 3, 16.0: 3}[rate]


def test_silence_is_no_zero() -> None:
    """No report and no sample for minutes, in a cluster that could shrink: nothing is removed."""
    trace = Trace(scaler(), lambda t: 12.0 if t < 100 else 1.0, replicas=2, silent=lambda t: 100 < t < 400)
    counts = trace.run(600)
    assert counts[399] == 2
    assert {decision.state for decision in trace.decisions[105:395]} == {ScalingState.BLIND}
    assert counts[-1] == 1


def test_no_reports_at_all_hold_the_count() -> None:
    chosen = scaler()
    trace = Trace(chosen, lambda t: 12.0, replicas=2)
    trace.run(50)
    decision = chosen.decide(51.0, [], [])
    assert (decision.wanted, decision.state) == (2, ScalingState.BLIND)


def test_an_unhealthy_verifier_is_a_fault_and_not_spare_capacity() -> None:
    chosen = scaler(down_cooldown_s=1.0)
    view = ReplicaView("a", "x", 0, 0, 4, 0, 10, 10)
    reports = [Report(view, True, 99.0), Report(view, False, 99.0)]
    for t in range(200):
        decision = chosen.decide(float(t), reports, [])
    assert decision.state is ScalingState.BLIND


@pytest.mark.parametrize(("cold_start_s", "wanted"), [(25.0, 2), (0.0, 3)])
def test_cold_starts_do_not_count(cold_start_s: float, wanted: int) -> None:
    """A new verifier is slow for a while. Counted, its requests would ask for a third one."""
    chosen = scaler(cold_start_s=cold_start_s)
    old, new = (ReplicaView(name, "x", 0, 8, 16, 0, 1000, 1000, step_costs=TABLE) for name in ("old", "new"))
    budget = LatencyBudget(None, 35)
    for t in range(20):
        samples = [Sample(name, t - 2.0, budget, 0.1, tpot_s) for name, tpot_s in (("old", 0.03), ("new", 0.036))]
        decision = chosen.decide(float(t), [Report(old, True, 1000.0), Report(new, True, 1.0 + t)], samples)
    assert decision.wanted == wanted


def test_what_cannot_be_scheduled_is_a_state_and_is_tried_again_later() -> None:
    trace = Trace(scaler(), lambda t: 9.0, capacity=1)
    counts = trace.run(150)
    assert set(counts) == {1}
    states = [decision.state for decision in trace.decisions]
    given_up = states.index(ScalingState.UNSCHEDULABLE)
    assert {decision.wanted for decision in trace.decisions[given_up : given_up + 50]} == {1}, "the missing one is not wanted any more"
    assert states[given_up + 1 :].count(ScalingState.SCALING) > 0, "and is tried again"
    trace.capacity = 2
    assert trace.run(150)[-1] == 2


def test_a_verifier_that_dies_is_waited_for() -> None:
    chosen = scaler()
    trace = Trace(chosen, lambda t: 12.0, replicas=2)
    trace.run(300)
    view = ReplicaView("v1", "x", 0, 3, 16, 0, 10, 10)
    for t in range(300, 350):
        decision = chosen.decide(float(t), [Report(view, True, 999.0)], [])
        assert (decision.wanted, decision.state) == (2, ScalingState.SCALING)


def test_bounds_and_states_at_them() -> None:
    trace = Trace(scaler(max_count=2), lambda t: 20.0)
    assert max(trace.run(80)) == 2
    assert trace.decisions[-1].state is ScalingState.AT_LIMIT
    assert min(Trace(scaler(min_count=3), lambda t: 0.1, replicas=5).run(400)) == 3


def test_a_budget_that_no_count_can_keep_adds_nothing() -> None:
    """21 ms a token is what one request alone takes."""
    trace = Trace(scaler(), lambda t: 1.5, budget=LatencyBudget(None, 15))
    assert changes(trace.run(300)) == [1]
    assert trace.decisions[-1].state is ScalingState.NO_GAIN


def test_idle_clusters_shrink_one_by_one() -> None:
    counts = Trace(scaler(), lambda t: 0.0, replicas=4).run(300)
    assert changes(counts) == [4, 3, 2, 1]
    first, second = counts.index(3), counts.index(2)
    assert second - first >= 40


def test_waiting_requests_count_before_they_end() -> None:
    """Nothing ends at all, as in a cluster that is stuck behind long requests; the queue alone tells."""
    chosen = scaler()
    view = ReplicaView("a", "x", 30, 16, 16, 1500, 1000, 1000, step_costs=((1, 0.02), (64, 0.08)))
    for t in range(60):
        waiting = (
            [Sample("a", 10.0 + i / 30, LatencyBudget(500, None), t - 10.0 - i / 30, ended=False) for i in range(30)] if t > 11 else []
        )
        decision = chosen.decide(float(t), [Report(view, True, 999.0)], waiting)
        if decision.wanted > 1:
            break
    assert 11 < t < 25


# --- the first lever ---


def drafting(**more: Any) -> dict[str, Any]:
    """Much drafting that helps little: at 12 rows a step takes 92 ms for 3 tokens, without drafts 32 ms for 1."""
    return {"drafted": 5.0, "accepted": 0.8, "budget": LatencyBudget(2000, 40)} | more


def test_speculation_is_limited_before_verifiers_are_added() -> None:
    trace = Trace(scaler(), lambda t: 4.5 if t > 50 else 1.0, **drafting())
    assert set(trace.run(300)) == {1}
    limits = [decision.speculation_limit for decision in trace.decisions]
    assert limits[50] == 1.0
    assert limits[-1] < 1.0
    assert trace.decisions[-1].met is not None
    assert trace.decisions[-1].met >= 0.95
    alone = Trace(scaler(speculation_lever=False), lambda t: 4.5 if t > 50 else 1.0, **drafting())
    assert max(alone.run(300)) > 1, "without the lever the load takes a second verifier"


def test_the_limit_is_lifted_when_the_load_is_gone() -> None:
    trace = Trace(scaler(), lambda t: 4.5 if 50 < t < 200 else 1.0, **drafting())
    trace.run(500)
    assert min(decision.speculation_limit for decision in trace.decisions[60:200]) < 1.0
    assert trace.decisions[-1].speculation_limit == 1.0


def test_drafting_that_pays_is_left_alone() -> None:
    trace = Trace(scaler(), lambda t: 30.0 if t > 50 else 2.0, drafted=2.0, accepted=1.8, budget=LatencyBudget(1000, 20))
    trace.run(300)
    assert {decision.speculation_limit for decision in trace.decisions} == {1.0}
    assert trace.decisions[-1].wanted > 1


def test_without_more_verifiers_to_have_the_lever_does_what_it_can() -> None:
    trace = Trace(scaler(max_count=1), lambda t: 6.5 if t > 50 else 1.0, **drafting(budget=LatencyBudget(2000, 28)))
    trace.run(300)
    assert trace.decisions[-1].speculation_limit < 1.0


def test_reasons_are_sentences_for_people() -> None:
    trace = Trace(scaler(), lambda t: 12.0 if 50 < t < 300 else 2.0)
    trace.run(500)
    reasons = {decision.reason for decision in trace.decisions if decision.state is ScalingState.SCALING}
    assert any("are expected of 2 verifiers" in reason for reason in reasons)
    assert any("1 verifiers are expected to be enough" in reason for reason in reasons)
