"""Nouns of ``dspark.types`` to and from protobuf messages; everything received is checked before it becomes a noun.

A ``*_from_wire`` function either returns a valid noun or raises: ``BadRequest`` where the content of one request is at
fault (the sender gets a Rejected), ``WireError`` where the message breaks the protocol (the session ends). Neither
touches the engine loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from dspark import errors
from dspark.errors import BadRequest, DSparkError, Overloaded, ProtocolMismatch
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import Finish, KVSource, LatencyBudget, ReplicaView, Request, Speculation, SpeculationState, StepOutcome, TokenLogprob
from dspark.workers.wire import dspark_pb2 as pb

PROTOCOL: Final = 2
MAX_UP_BYTES: Final = 16 * 2**20  # one Submit: a million tokens of five bytes, and room
MAX_DOWN_BYTES: Final = 64 * 2**20  # prompt log-probabilities of a long prompt with 20 alternatives each
MAX_ID_CHARS: Final = 128
MAX_SALT_CHARS: Final = 256
MAX_CLASS_CHARS = 64
MAX_SOURCE_CHARS: Final = 512
MAX_PROMPT_TOKENS: Final = 2**20
MAX_CANCELS: Final = 4096
MAX_DIGEST: Final = 65536
MAX_STATS: Final = 2048  # a verifier tells the load of each of its experts
MAX_WAITING: Final = 64  # priorities told apart in a view
MAX_WANTED: Final = 65536
TOKEN_LIMIT: Final = 2**31

_ERRORS: Final[Mapping[str, type[DSparkError]]] = {
    cls.__name__: cls
    for cls in (
        errors.ConfigError,
        errors.BadRequest,
        errors.UnknownModel,
        errors.TooLarge,
        errors.Overloaded,
        errors.WorkerLost,
        errors.ProtocolMismatch,
    )
}


class WireError(ProtocolMismatch):
    """A message that breaks the protocol; the session it came on is closed."""


@dataclass(frozen=True, slots=True)
class Tune:
    """What a router decided for the cluster: the share of the longest draft that may be verified, and how many verifiers it wants.

    ``wanted_verifiers`` 0 is no opinion.
    """

    speculation_limit: float = 1.0
    wanted_verifiers: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """What a verifier says of itself, four times a second: its view, whether it makes progress, and its counters."""

    view: ReplicaView
    healthy: bool = True
    stats: Mapping[str, float] = field(default_factory=dict)


# --- requests ---


def request_to_wire(request: Request) -> pb.Request:
    """The message of a request; its receiver gets an equal request back."""
    budget, source = request.latency_budget, request.kv_source
    return pb.Request(
        id=request.id,
        prompt_token_ids=request.prompt_token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=_sampling_to_wire(request.sampling),
        ttft_ms=budget.ttft_ms,
        tpot_ms=budget.tpot_ms,
        speculation=str(request.speculation) if request.speculation else "",
        priority=request.priority,
        cache_salt=request.cache_salt,
        noise_seed=request.noise_seed,
        service_class=request.service_class,
        kv_source=None if source is None else pb.KVSource(replica_id=source.replica_id, address=source.address, token=source.token),
    )


def request_from_wire(message: pb.Request) -> Request:
    """A checked request. ``BadRequest`` names the field that is wrong; token ids are checked for size, not against a vocabulary."""
    check_id(message.id)
    tokens = tuple(message.prompt_token_ids)
    if not 0 < len(tokens) <= MAX_PROMPT_TOKENS:
        raise BadRequest(f"the prompt has {len(tokens)} tokens; from 1 to {MAX_PROMPT_TOKENS} can be served", "prompt")
    if max(tokens) >= TOKEN_LIMIT:
        raise BadRequest("a token id of the prompt is out of range", "prompt")
    if not 0 < message.num_prompt_tokens <= len(tokens):
        raise BadRequest(f"num_prompt_tokens {message.num_prompt_tokens} is not within the {len(tokens)} tokens sent", "prompt")
    if len(message.cache_salt) > MAX_SALT_CHARS:
        raise BadRequest(f"cache_salt has over {MAX_SALT_CHARS} characters", "cache_salt")
    if len(message.service_class) > MAX_CLASS_CHARS:
        raise BadRequest(f"service_class has over {MAX_CLASS_CHARS} characters", "service_class")
    return Request(
        id=message.id,
        prompt_token_ids=tokens,
        sampling=_sampling_from_wire(message.sampling),
        latency_budget=LatencyBudget(_budget(message, "ttft_ms"), _budget(message, "tpot_ms")),
        speculation=_speculation(message.speculation),
        priority=message.priority,
        cache_salt=message.cache_salt,
        noise_seed=message.noise_seed,
        num_prompt_tokens=message.num_prompt_tokens,
        service_class=message.service_class,
        kv_source=_source(message.kv_source) if message.HasField("kv_source") else None,
    )


def _source(message: pb.KVSource) -> KVSource:
    if max(map(len, (message.replica_id, message.address, message.token))) > MAX_SOURCE_CHARS:
        raise BadRequest(f"a part of kv_source has over {MAX_SOURCE_CHARS} characters", "kv_source")
    return KVSource(message.replica_id, message.address, message.token)


def check_id(request_id: str) -> None:
    """WireError unless the id is one a request may have."""
    if not 0 < len(request_id) <= MAX_ID_CHARS or not request_id.isprintable():
        raise WireError(f"request id of {len(request_id)} characters; 1 to {MAX_ID_CHARS} printable ones are allowed")


def _budget(message: pb.Request, name: str) -> float | None:
    if not message.HasField(name):
        return None
    value = float(getattr(message, name))
    if not math.isfinite(value) or value <= 0:
        raise BadRequest(f"latency_budget.{name} must be a number over 0, not {value!r}", "latency_budget")
    return value


def _speculation(text: str) -> Speculation | None:
    if not text:
        return None
    try:
        return Speculation.parse(text)
    except ValueError as error:
        raise BadRequest(str(error), "speculation") from error


def _sampling_to_wire(params: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        min_tokens=params.min_tokens,
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        acceptance=params.acceptance or "",
        skip_special_tokens=params.skip_special_tokens,
        include_stop_str_in_output=params.include_stop_str_in_output,
    )


def _sampling_from_wire(message: pb.Sampling) -> SamplingParams:
    """SamplingParams checks every value itself; only the absent ones need care here. n is 1 on the wire."""
    try:
        acceptance = AcceptanceRule(message.acceptance) if message.acceptance else None
    except ValueError as error:
        raise BadRequest(f"acceptance must be 'ratio' or 'coupled', not {message.acceptance!r}", "acceptance") from error
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        acceptance=acceptance,
        skip_special_tokens=message.skip_special_tokens,
        include_stop_str_in_output=message.include_stop_str_in_output,
    )


# --- outcomes ---


def outcomes_to_wire(outcomes: Sequence[StepOutcome]) -> pb.Outcomes:
    """One message for all outcomes of a round."""
    return pb.Outcomes(outcomes=[_outcome_to_wire(outcome) for outcome in outcomes])


def outcomes_from_wire(message: pb.Outcomes) -> list[StepOutcome]:
    """Checked outcomes; WireError when one is malformed."""
    return [_outcome_from_wire(outcome) for outcome in message.outcomes]


def _outcome_to_wire(outcome: StepOutcome) -> pb.Outcome:
    reason = outcome.stop_reason
    return pb.Outcome(
        id=outcome.request_id,
        base_len=outcome.base_len,
        tokens=outcome.tokens,
        accepted=outcome.accepted,
        drafted=outcome.drafted,
        logprobs=None if outcome.logprobs is None else _logprobs_to_wire(outcome.logprobs),
        prompt_logprobs=None if outcome.prompt_logprobs is None else _logprobs_to_wire(outcome.prompt_logprobs),
        finish=outcome.finish or "",
        stop_text=reason if isinstance(reason, str) else None,
        stop_token=reason if isinstance(reason, int) else None,
        num_cached_tokens=outcome.num_cached_tokens,
        error=outcome.error or "",
    )


def _outcome_from_wire(message: pb.Outcome) -> StepOutcome:
    check_id(message.id)
    try:
        finish = Finish(message.finish) if message.finish else None
    except ValueError as error:
        raise WireError(f"unknown finish {message.finish!r}") from error
    logprobs = tuple(_logprob(entry) for entry in message.logprobs.tokens) if message.HasField("logprobs") else None
    if logprobs is not None and len(logprobs) != len(message.tokens):
        raise WireError(f"{len(logprobs)} log-probabilities for {len(message.tokens)} tokens")
    return StepOutcome(
        request_id=message.id,
        base_len=message.base_len,
        tokens=tuple(message.tokens),
        accepted=message.accepted,
        drafted=message.drafted,
        logprobs=logprobs,
        prompt_logprobs=_prompt_logprobs(message.prompt_logprobs) if message.HasField("prompt_logprobs") else None,
        finish=finish,
        stop_reason=_stop_reason(message),
        num_cached_tokens=message.num_cached_tokens,
        error=message.error or None,
    )


def _stop_reason(message: pb.Outcome) -> str | int | None:
    if message.HasField("stop_text"):
        return message.stop_text
    return message.stop_token if message.HasField("stop_token") else None


def _logprobs_to_wire(entries: Sequence[TokenLogprob | None]) -> pb.Logprobs:
    return pb.Logprobs(
        tokens=[
            pb.TokenLogprob()
            if entry is None
            else pb.TokenLogprob(
                token_id=entry.token_id,
                logprob=entry.logprob,
                rank=entry.rank,
                top_ids=[token for token, _ in entry.top],
                top_logprobs=[logprob for _, logprob in entry.top],
            )
            for entry in entries
        ]
    )


def _prompt_logprobs(message: pb.Logprobs) -> tuple[TokenLogprob | None, ...]:
    return tuple(_logprob(entry) if entry.rank else None for entry in message.tokens)


def _logprob(entry: pb.TokenLogprob) -> TokenLogprob:
    if entry.rank == 0 or len(entry.top_ids) != len(entry.top_logprobs):
        raise WireError("malformed log-probability")
    return TokenLogprob(entry.token_id, entry.logprob, entry.rank, tuple(zip(entry.top_ids, entry.top_logprobs, strict=True)))


# --- views ---


def status_to_wire(status: Status) -> pb.View:
    """The message of a status. Its address and age stay behind: the receiver knows where it came from and when."""
    view = status.view
    return pb.View(
        queued=view.queued,
        running=view.running,
        max_running=view.max_running,
        queued_tokens=view.queued_tokens,
        free_blocks=view.free_blocks,
        num_blocks=view.num_blocks,
        draining=view.draining,
        tokens_per_round=view.tokens_per_round,
        step_tokens=[tokens for tokens, _ in view.step_costs],
        step_costs=[cost for _, cost in view.step_costs],
        prefix_digest=sorted(view.prefix_digest)[:MAX_DIGEST],
        budgets_met=view.budgets_met,
        healthy=status.healthy,
        stats=status.stats,
        draft_requests=[requests for requests, _ in view.draft_costs],
        draft_costs=[cost for _, cost in view.draft_costs],
        prefill_token_s=view.prefill_token_s,
        context_row_s=view.context_row_s,
        drafted_per_round=view.drafted_per_round,
        max_step_tokens=view.max_step_tokens,
        waiting=[pb.Waiting(priority=priority, requests=requests, tokens=tokens) for priority, requests, tokens in view.waiting],
        speculation=view.speculation,
        speculation_limit=view.speculation_limit,
    )


def status_from_wire(message: pb.View, replica_id: str, address: str) -> Status:
    """A checked status of the replica at the other end; WireError when it contradicts itself."""
    _check_view(message)
    view = ReplicaView(
        id=replica_id,
        address=address,
        queued=message.queued,
        running=message.running,
        max_running=message.max_running,
        queued_tokens=message.queued_tokens,
        free_blocks=message.free_blocks,
        num_blocks=message.num_blocks,
        draining=message.draining,
        tokens_per_round=message.tokens_per_round,
        step_costs=tuple(zip(message.step_tokens, message.step_costs, strict=True)),
        prefix_digest=frozenset(message.prefix_digest),
        budgets_met=message.budgets_met,
        draft_costs=tuple(zip(message.draft_requests, message.draft_costs, strict=True)),
        prefill_token_s=message.prefill_token_s,
        context_row_s=message.context_row_s,
        drafted_per_round=message.drafted_per_round,
        max_step_tokens=message.max_step_tokens,
        waiting=tuple((entry.priority, entry.requests, entry.tokens) for entry in message.waiting),
        speculation=_speculation_state(message.speculation),
        speculation_limit=message.speculation_limit,
    )
    return Status(view, message.healthy, dict(message.stats))


def _check_view(message: pb.View) -> None:
    if len(message.step_tokens) != len(message.step_costs) or len(message.draft_requests) != len(message.draft_costs):
        raise WireError("a cost table of the view has sizes without costs, or costs without sizes")
    if len(message.prefix_digest) > MAX_DIGEST or len(message.stats) > MAX_STATS or len(message.waiting) > MAX_WAITING:
        raise WireError("the view is too large")
    rates = (message.tokens_per_round, message.drafted_per_round, message.budgets_met, message.speculation_limit)
    costs = (message.prefill_token_s, message.context_row_s)
    numbers = (*rates, *costs, *message.step_costs, *message.draft_costs, *message.stats.values())
    if not all(math.isfinite(number) for number in numbers):
        raise WireError("a number of the view is not finite")


def _speculation_state(text: str) -> SpeculationState:
    try:
        return SpeculationState(text)
    except ValueError as error:
        raise WireError(f"unknown state of speculation {text[:40]!r}") from error


# --- decisions ---


def tune_to_wire(tune: Tune) -> pb.Tune:
    """The message of a decision."""
    return pb.Tune(speculation_limit=tune.speculation_limit, wanted_verifiers=tune.wanted_verifiers)


def tune_from_wire(message: pb.Tune) -> Tune:
    """A checked decision; WireError when it is out of range."""
    if not 0 <= message.speculation_limit <= 1 or message.wanted_verifiers > MAX_WANTED:
        raise WireError("a decision out of range")
    return Tune(message.speculation_limit, message.wanted_verifiers)


# --- errors ---


def error_to_wire(request_id: str, error: DSparkError) -> pb.Rejected:
    """The refusal of one request, by class name."""
    return pb.Rejected(
        id=request_id,
        kind=type(error).__name__,
        message=str(error),
        param=(error.param or "") if isinstance(error, BadRequest) else "",
        code=(error.code or "") if isinstance(error, BadRequest) else "",
        retry_after_s=error.retry_after_s if isinstance(error, Overloaded) else 0.0,
    )


def error_from_wire(message: pb.Rejected) -> DSparkError:
    """The error to raise at this end; an unknown kind becomes a plain DSparkError."""
    cls = _ERRORS.get(message.kind, DSparkError)
    if issubclass(cls, BadRequest):
        return cls(message.message, message.param or None, message.code or None)
    if issubclass(cls, Overloaded):
        wait_s = message.retry_after_s
        return cls(message.message, wait_s if math.isfinite(wait_s) and wait_s >= 0 else 1.0)
    return cls(message.message)
