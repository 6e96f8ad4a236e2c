"""Request bodies of the API, strictly typed; unknown fields are ignored, as OpenAI does.

Parsing happens from bytes, once. What cannot be honoured (tools, JSON schemas, suffixes …) is refused by name instead
of being dropped in silence.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspark.errors import BadRequest
from dspark.sampling import SamplingParams
from dspark.types import DEFAULT_TREE_NODES, LatencyBudget, Speculation

MAX_PROMPTS = 64  # prompts of one completion request
_PLAIN = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "prompt_logprobs",
    "acceptance",
    "skip_special_tokens",
    "include_stop_str_in_output",
)

Body = TypeVar("Body", bound="GenerationBody")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(_Strict):
    include_usage: bool | None = None


class SpeculationField(_Strict):
    """``tree``: how many nodes draft trees may have; true for as many as are usual, false and 0 for chains."""

    mode: Literal["off", "static", "adaptive", "shadow"]
    max_draft_tokens: int | None = None
    tree: bool | int | None = None

    def text(self) -> str:
        """As ``Speculation.parse`` reads it; BadRequest for a tree in a mode that has none."""
        length = "" if self.max_draft_tokens is None else f":{self.max_draft_tokens}"
        if not self.tree:
            return self.mode + length
        if self.mode != "adaptive":
            raise BadRequest(f"speculation.tree: mode {self.mode!r} verifies chains; trees need mode 'adaptive'", "speculation")
        return f"tree:{DEFAULT_TREE_NODES if self.tree is True else self.tree}{length}"


class LatencyField(_Strict):
    ttft_ms: float | None = Field(default=None, gt=0, le=1e9)
    tpot_ms: float | None = Field(default=None, gt=0, le=1e9)


class GenerationBody(_Strict):
    """What chat and text completions share. Null means the default everywhere, as in OpenAI's API."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    acceptance: str | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    speculation: str | SpeculationField | None = None
    latency_budget: LatencyField | None = None
    service_class: str | None = Field(default=None, min_length=1, max_length=64)
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options is only allowed together with stream", "stream_options")

    def sampling(self, **more: Any) -> SamplingParams:
        """The sampling parameters; ``more`` are those that the two APIs name differently."""
        given: dict[str, Any] = {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        if self.stop is not None:
            given["stop"] = self.stop
        if self.logit_bias:
            given["logit_bias"] = {_token_id(token): bias for token, bias in self.logit_bias.items()}
        return SamplingParams(**given | more)

    def budget(self) -> LatencyBudget:
        """The latency the caller asks for."""
        field = self.latency_budget
        return LatencyBudget(field.ttft_ms, field.tpot_ms) if field else LatencyBudget()

    def speculation_mode(self) -> Speculation | None:
        """The speculation the caller asks for; None leaves it to the engine."""
        field = self.speculation
        if field is None:
            return None
        text = field if isinstance(field, str) else field.text()
        try:
            return Speculation.parse(text)
        except ValueError as error:
            raise BadRequest(f"speculation: {error}", "speculation") from error


class ChatBody(GenerationBody):
    """POST /v1/chat/completions. What messages may hold is checked where they are rendered, ``dspark/prompting.py``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        if (self.tools and self.tool_choice != "none") or self.functions:
            raise BadRequest("tools are not supported", "tools")
        if self.response_format and self.response_format.get("type", "text") != "text":
            raise BadRequest("only response_format {'type': 'text'} is supported", "response_format")
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")

    def params(self) -> SamplingParams:
        """Sampling of one chat request; without a limit it may fill the context."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        try:
            return self.sampling(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)
        except BadRequest as error:
            if error.param == "logprobs":
                raise BadRequest(str(error).replace("logprobs", "top_logprobs"), "top_logprobs") from error
            raise


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise BadRequest("suffix is not supported", "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise BadRequest("best_of other than n is not supported", "best_of")

    @property
    def scores_only(self) -> bool:
        """``echo`` with ``max_tokens`` 0: the prompt's log-probabilities and nothing else."""
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """Each prompt of the request, as text or as token ids."""
        prompt = self.prompt
        prompts: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
        if not prompts or not all(prompts):
            raise BadRequest("the prompt is empty", "prompt")
        if len(prompts) > MAX_PROMPTS:
            raise BadRequest(f"{len(prompts)} prompts in one request; at most {MAX_PROMPTS}", "prompt")
        return prompts

    def params(self) -> SamplingParams:
        """Sampling of one prompt; echoed log-probabilities are the prompt's too."""
        more: dict[str, Any] = {"logprobs": self.logprobs}
        if self.max_tokens is not None:
            more["max_tokens"] = 1 if self.scores_only else self.max_tokens
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            more["prompt_logprobs"] = self.logprobs
        return self.sampling(**more)


def parse(cls: type[Body], raw: bytes) -> Body:
    """A checked body; ``BadRequest`` names the first field that is wrong."""
    try:
        body = cls.model_validate_json(raw)
    except ValidationError as error:
        raise _as_bad_request(error) from None
    body.check()
    return body


def _as_bad_request(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return BadRequest(f"the body is not valid JSON: {first['msg']}", None, "invalid_json")
    path = ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
    return BadRequest(f"{path or 'body'}: {first['msg']}", path or None, "invalid_value")


def _is_union_branch(part: int | str) -> bool:
    """pydantic adds the tried type to the path of a union's error: ``prompt.list[str].0``."""
    return isinstance(part, str) and (part in {"str", "int", "float", "bool"} or "[" in part or part[:1].isupper())


def _token_id(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadRequest(f"logit_bias: {text[:40]!r} is not a token id", "logit_bias") from None
