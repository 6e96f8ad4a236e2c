"""Nouns survive the wire; malformed messages are refused by the right error."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark import errors
from dspark.errors import BadRequest, Overloaded, UnknownModel
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import Finish, LatencyBudget, Mode, ReplicaView, Request, Speculation, SpeculationState, StepOutcome, TokenLogprob
from dspark.workers.wire import codec
from dspark.workers.wire import dspark_pb2 as pb

FULL = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    top_k=-1,
    min_p=0.05,
    presence_penalty=-1.5,
    frequency_penalty=0.25,
    repetition_penalty=1.1,
    logit_bias={5: -3.5, 7: 2.0},
    seed=-(2**63),
    stop=("a", "µ"),
    stop_token_ids=(3, 4),
    min_tokens=2,
    max_tokens=9,
    ignore_eos=True,
    logprobs=0,
    prompt_logprobs=3,
    acceptance=AcceptanceRule.RATIO,
    skip_special_tokens=False,
    include_stop_str_in_output=True,
)


def through(request: Request) -> Request:
    return codec.request_from_wire(pb.Request.FromString(codec.request_to_wire(request).SerializeToString()))


def test_requests_survive() -> None:
    plain = Request("a", (1, 2, 3))
    full = Request(
        "b",
        (1, 2, 3, 2**31 - 1),
        FULL,
        LatencyBudget(100.5, 9.0),
        Speculation(Mode.STATIC, 3),
        -2,
        "salt",
        num_prompt_tokens=2,
        service_class="chat",
    )
    for text in ("tree:9", "tree:9:4", "shadow", "adaptive:4"):
        request = Request("c", (1,), speculation=Speculation.parse(text))
        assert str(request.speculation) == text
        assert through(request) == request
    for request in (plain, full):
        assert through(request) == request
    assert {field.name for field in dataclasses.fields(SamplingParams)} - {"n"} == {field.name for field in pb.Sampling.DESCRIPTOR.fields}


@given(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(0, 100, allow_nan=False),
    st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100, allow_nan=False), max_size=5),
)
def test_numbers_survive_exactly(seed: int, temperature: float, bias: dict[int, float]) -> None:
    request = Request("x", (1,), SamplingParams(seed=seed, temperature=temperature, logit_bias=bias))
    assert through(request) == request


def test_absent_is_not_zero() -> None:
    params = SamplingParams(max_tokens=None, seed=None, logprobs=None)
    assert through(Request("x", (1,), params)).sampling == params
    assert through(Request("x", (1,), SamplingParams(logprobs=0, seed=0))).sampling.logprobs == 0


def good() -> pb.Request:
    return codec.request_to_wire(Request("x", (1, 2)))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (lambda m: m.ClearField("prompt_token_ids"), "prompt"),
        (lambda m: m.prompt_token_ids.append(2**31), "prompt"),
        (lambda m: setattr(m, "num_prompt_tokens", 3), "prompt"),
        (lambda m: setattr(m, "num_prompt_tokens", 0), "prompt"),
        (lambda m: setattr(m, "cache_salt", "s" * 257), "cache_salt"),
        (lambda m: setattr(m, "speculation", "static:99"), "speculation"),
        (lambda m: setattr(m, "ttft_ms", math.nan), "latency_budget"),
        (lambda m: setattr(m, "tpot_ms", -1.0), "latency_budget"),
        (lambda m: setattr(m.sampling, "temperature", math.inf), "temperature"),
        (lambda m: setattr(m.sampling, "top_p", 1.5), "top_p"),
        (lambda m: setattr(m.sampling, "acceptance", "never"), "acceptance"),
        (lambda m: m.sampling.stop.extend(["x"] * 17), "stop"),
        (lambda m: setattr(m.sampling, "max_tokens", 0), "max_tokens"),
        (lambda m: setattr(m.sampling, "logprobs", 21), "logprobs"),
    ],
)
def test_bad_content_is_the_requests_fault(change: object, param: str) -> None:
    message = good()
    change(message)  # type: ignore[operator]
    with pytest.raises(BadRequest) as caught:
        codec.request_from_wire(message)
    assert caught.value.param == param


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a\nb"])
def test_a_bad_id_breaks_the_protocol(request_id: str) -> None:
    message = good()
    message.id = request_id
    with pytest.raises(codec.WireError):
        codec.request_from_wire(message)


def test_outcomes_survive() -> None:
    entry = TokenLogprob(5, -0.25, 2, ((6, -0.125), (5, -0.25)))
    outcomes = [
        StepOutcome("a", 12, (5,), 0, 3, (entry,), (None, entry), Finish.STOP, "stop\n", 4),
        StepOutcome("b", 7, (1, 2, 3), 2, 3, finish=Finish.STOP, stop_reason=0),
        StepOutcome("c", 7, (), 0, logprobs=(), finish=Finish.ERROR, error="broken"),
        StepOutcome("d", 8, (9,), 0),
    ]
    message = pb.Outcomes.FromString(codec.outcomes_to_wire(outcomes).SerializeToString())
    assert codec.outcomes_from_wire(message) == outcomes


@pytest.mark.parametrize(
    "outcome",
    [
        pb.Outcome(id="a", finish="because"),
        pb.Outcome(id="a", tokens=[1, 2], logprobs=pb.Logprobs(tokens=[pb.TokenLogprob(rank=1)])),
        pb.Outcome(id="a", tokens=[1], logprobs=pb.Logprobs(tokens=[pb.TokenLogprob(rank=0)])),
        pb.Outcome(id="a", tokens=[1], logprobs=pb.Logprobs(tokens=[pb.TokenLogprob(rank=1, top_ids=[1])])),
        pb.Outcome(id=""),
    ],
)
def test_malformed_outcomes_are_refused(outcome: pb.Outcome) -> None:
    with pytest.raises(codec.WireError):
        codec.outcomes_from_wire(pb.Outcomes(outcomes=[outcome]))


def test_views_survive() -> None:
    view = ReplicaView(
        *("r", "h:1", 1, 2, 3, 2**40, 5, 6, True, 1.5, ((1, 0.5), (8, 0.75)), frozenset({0, 2**64 - 1}), 0.5),
        prefill_token_s=0.001,
        context_row_s=0.002,
        draft_costs=((1, 0.25),),
        drafted_per_round=2.5,
        max_step_tokens=77,
        waiting=((-5, 1, 2**40), (3, 2, 7)),
        speculation=SpeculationState.PAUSED,
        speculation_limit=0.25,
    )
    plain = ReplicaView("r", "h:1", 1, 2, 3, 4, 5, 6)
    unset = {field.name for field in dataclasses.fields(view) if getattr(view, field.name) == getattr(plain, field.name)}
    assert unset == {"id", "address", "queued", "running", "max_running", "free_blocks", "num_blocks", "age_s"}
    status = codec.Status(view, False, {"steps_total": 3.0})
    message = pb.View.FromString(codec.status_to_wire(status).SerializeToString())
    assert codec.status_from_wire(message, "r", "h:1") == status


@pytest.mark.parametrize(
    "change",
    [
        {"step_tokens": [1]},
        {"draft_costs": [1.0]},
        {"budgets_met": math.nan},
        {"speculation_limit": math.inf},
        {"prefill_token_s": math.nan},
        {"draft_requests": [1], "draft_costs": [math.nan]},
        {"stats": {"x": math.inf}},
        {"speculation": "maybe"},
        {"waiting": [pb.Waiting()] * (codec.MAX_WAITING + 1)},
    ],
)
def test_malformed_views_are_refused(change: dict[str, object]) -> None:
    good = codec.status_to_wire(codec.Status(ReplicaView("r", "h:1", 1, 2, 3, 4, 5, 6)))
    codec.status_from_wire(good, "r", "h:1")
    good.MergeFrom(pb.View(**change))
    with pytest.raises(codec.WireError):
        codec.status_from_wire(good, "r", "h:1")


def test_decisions_survive_and_wild_ones_are_refused() -> None:
    for tune in (codec.Tune(), codec.Tune(0.0, 0), codec.Tune(0.25, 7)):
        assert codec.tune_from_wire(pb.Tune.FromString(codec.tune_to_wire(tune).SerializeToString())) == tune
    for wild in ({"speculation_limit": 1.5}, {"speculation_limit": -0.1}, {"speculation_limit": math.nan}, {"wanted_verifiers": 2**31}):
        with pytest.raises(codec.WireError):
            codec.tune_from_wire(pb.Tune(**wild))


@pytest.mark.parametrize(
    "error",
    [
        BadRequest("no", "top_p", "some_code"),
        UnknownModel("who", "model"),
        Overloaded("full", 2.5),
        errors.WorkerLost("gone"),
        errors.ConfigError("x"),
        errors.TooLarge("y"),
    ],
)
def test_errors_survive(error: errors.DSparkError) -> None:
    back = codec.error_from_wire(pb.Rejected.FromString(codec.error_to_wire("a", error).SerializeToString()))
    assert type(back) is type(error)
    assert (str(back), vars(back)) == (str(error), vars(error))


def test_odd_errors_stay_errors() -> None:
    assert type(codec.error_from_wire(pb.Rejected(kind="os.system", message="hm"))) is errors.DSparkError
    overloaded = codec.error_from_wire(pb.Rejected(kind="Overloaded", retry_after_s=-math.inf))
    assert isinstance(overloaded, Overloaded)
    assert overloaded.retry_after_s == 1.0
