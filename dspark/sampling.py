"""How one request wants its tokens drawn: ``SamplingParams``, validated at construction. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dspark.errors import BadRequest

MAX_N = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
SEED_LIMIT = 2**63


class AcceptanceRule(StrEnum):
    """Which of the two exactly lossless rules accepts drafted tokens (DSpark section 3.1; docs/adr)."""

    RATIO = "ratio"
    COUPLED = "coupled"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one request; every field is checked and a bad one raises ``BadRequest`` naming it.

    ``top_k`` 0 or -1 means no limit. ``max_tokens`` None means up to the context length.
    ``logprobs`` is the number of alternatives reported per token, taken from the target's law before
    temperature, penalties and truncation (0: only the chosen token). ``acceptance`` None means coupled
    when ``seed`` is given, otherwise ratio.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    acceptance: AcceptanceRule | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self._normalise()
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, exclusive_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, exclusive_low=True)
        _integer("n", self.n, 1, MAX_N)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, -SEED_LIMIT, SEED_LIMIT - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise BadRequest(f"min_tokens {self.min_tokens} is over max_tokens {self.max_tokens}", "min_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _integer(name, count, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise BadRequest(f"{name} must be true or false", name)
        self._check_lists()

    def _normalise(self) -> None:
        """Lists become tuples and names become enums, so that equal settings compare equal."""
        put = object.__setattr__  # frozen: normalisation happens once, at construction
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if value is None:
                value = ()
            if not isinstance(value, (list, tuple)):
                raise BadRequest(f"{name} must be a list", name)
            put(self, name, tuple(value))
        if self.logit_bias is None:
            put(self, "logit_bias", {})
        if self.acceptance is not None:
            try:
                put(self, "acceptance", AcceptanceRule(self.acceptance))
            except ValueError:
                raise BadRequest(f"acceptance must be 'ratio' or 'coupled', not {self.acceptance!r}", "acceptance") from None

    def _check_lists(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise BadRequest(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}", "stop")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_CHARS:
                raise BadRequest(f"each stop string must have 1 to {MAX_STOP_STRING_CHARS} characters", "stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise BadRequest(f"stop_token_ids has over {MAX_STOP_TOKEN_IDS} entries", "stop_token_ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise BadRequest(f"logit_bias must map at most {MAX_LOGIT_BIAS} token ids to numbers", "logit_bias")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -100.0, 100.0)

    @property
    def is_greedy(self) -> bool:
        """Temperature 0: the argmax of the processed logits."""
        return self.temperature == 0.0

    @property
    def rule(self) -> AcceptanceRule:
        """The acceptance rule in force. At temperature 0 both rules are the same rule."""
        if self.acceptance is not None:
            return self.acceptance
        return AcceptanceRule.RATIO if self.seed is None else AcceptanceRule.COUPLED

    @property
    def is_exact(self) -> bool:
        """A draft is accepted exactly when it is the target's own token: greedy and coupled requests, whose text no draft can change."""
        return self.is_greedy or self.rule is AcceptanceRule.COUPLED

    def child(self, index: int) -> SamplingParams:
        """The parameters of choice ``index`` of ``n``: n = 1, and its own seed when one is given."""
        seed = None if self.seed is None else (self.seed + index + SEED_LIMIT) % (2 * SEED_LIMIT) - SEED_LIMIT
        return dataclasses.replace(self, n=1, seed=seed)


def _number(name: str, value: Any, low: float, high: float, exclusive_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRequest(f"{name} must be a number, not {value!r}", name)
    if value < low or value > high or (exclusive_low and value == low):
        raise BadRequest(f"{name} must be {'over' if exclusive_low else 'at least'} {low:g} and at most {high:g}, not {value!r}", name)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{name} must be a whole number, not {value!r}", name)
    if not low <= value <= high:
        raise BadRequest(f"{name} must be from {low} to {high}, not {value}", name)
