"""What ``LLM`` returns: frozen results, and the collector that makes one out of step outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspark.errors import WorkerLost
from dspark.types import Finish, Request, StepOutcome, TokenLogprob

if TYPE_CHECKING:
    from dspark.workers.verifier.text import TextStream


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the ``n`` answers to a prompt.

    ``finish_reason`` is stop, length or abort; ``stop_reason`` the stop string or stop token id behind stop (None: EOS).
    ``arrivals_s`` has the seconds from submission to each round that brought tokens. ``rounds`` counts those rounds,
    ``drafted_rounds`` those that verified a draft, ``drafted`` and ``accepted`` tokens.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprob, ...] | None
    arrivals_s: tuple[float, ...]
    rounds: int
    drafted_rounds: int
    drafted: int
    accepted: int

    @property
    def acceptance_length(self) -> float:
        """Tokens that a round with drafts committed on average, the target's own included (tau); 1 when nothing was drafted."""
        return 1.0 + self.accepted / self.drafted_rounds if self.drafted_rounds else 1.0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Everything about one prompt. Fields of an answer, such as ``text``, are those of the first choice.

    ``submitted_at`` is on the clock of ``time.perf_counter``. ``prompt_logprobs`` begins with None: nothing predicts
    the first token.
    """

    prompt_token_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    num_cached_tokens: int
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    submitted_at: float

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.choices[0].logprobs

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def acceptance_length(self) -> float:
        """Tokens that a round with drafts committed on average, over all choices."""
        rounds = sum(choice.drafted_rounds for choice in self.choices)
        return 1.0 + sum(choice.accepted for choice in self.choices) / rounds if rounds else 1.0

    @property
    def ttft_s(self) -> float:
        """Seconds from submission to the first tokens, waiting included; 0 if there were none."""
        return min((choice.arrivals_s[0] for choice in self.choices if choice.arrivals_s), default=0.0)

    @property
    def latency_s(self) -> float:
        """Seconds from submission to the last tokens of the last choice."""
        return max((choice.arrivals_s[-1] for choice in self.choices if choice.arrivals_s), default=0.0)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one round added to a stream. ``text`` may lag behind ``token_ids``; the last delta of a choice has a finish reason."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[TokenLogprob, ...] | None


class Collector:
    """Gathers the outcomes of one choice: in lists of plain values, because a crowd of objects that live as long as their request makes
    Python's garbage collector walk over all of them again and again."""

    def __init__(self, index: int, request: Request, text: TextStream) -> None:
        self.index = index
        self.request = request
        self.finish: Finish | None = None
        self.num_cached_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.submitted_at = 0.0  # on the clock of time.perf_counter
        self._text = text
        self._texts: list[str] = []
        self._num_told = 0  # tokens whose text is in ``_texts``
        self._is_behind = False  # rounds were noted whose text is not
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._arrivals_s: list[float] = []
        self._last: StepOutcome | None = None
        self._drafted_rounds = self._drafted = self._accepted = 0

    def take(self, outcome: StepOutcome, arrived_at: float) -> Delta:
        """Add one round and return what it brought; WorkerLost when the engine failed."""
        self.note(outcome, arrived_at)
        return Delta(self.index, self._text_so_far(), outcome.tokens, self.finish and self.finish.value, outcome.logprobs)

    def note(self, outcome: StepOutcome, arrived_at: float) -> None:
        """Add one round, whose text can wait; WorkerLost when the engine failed."""
        if outcome.finish is not None:
            if outcome.finish is Finish.ERROR:
                raise WorkerLost(f"the engine failed: {outcome.error}")
            self.finish = outcome.finish
        self._last, self._is_behind = outcome, True
        self.num_cached_tokens = max(self.num_cached_tokens, outcome.num_cached_tokens)
        if outcome.prompt_logprobs is not None:
            self.prompt_logprobs = outcome.prompt_logprobs
        if not outcome.tokens:
            return
        self._arrivals_s.append(arrived_at - self.submitted_at)
        self._tokens.extend(outcome.tokens)
        if outcome.drafted:
            self._drafted_rounds += 1
            self._drafted += outcome.drafted
            self._accepted += outcome.accepted
        if outcome.logprobs is not None:
            self._logprobs.extend(outcome.logprobs)

    def _text_so_far(self) -> str:
        """The text of the rounds that were only noted: how tokens are grouped does not matter to it."""
        if self._last is None or not self._is_behind:
            return ""
        new = tuple(self._tokens[self._num_told :])
        self._num_told, self._is_behind = len(self._tokens), False
        self._texts.append(self._text.take(self._last._replace(tokens=new)))
        return self._texts[-1]

    def choice(self) -> Choice:
        """The whole answer; call it once the request has ended."""
        self._text_so_far()
        return Choice(
            index=self.index,
            text="".join(self._texts),
            token_ids=tuple(self._tokens),
            finish_reason=(self.finish or Finish.ABORT).value,
            stop_reason=None if self._last is None else self._last.stop_reason,
            logprobs=None if self.request.sampling.logprobs is None else tuple(self._logprobs),
            arrivals_s=tuple(self._arrivals_s),
            rounds=len(self._arrivals_s),
            drafted_rounds=self._drafted_rounds,
            drafted=self._drafted,
            accepted=self._accepted,
        )


def make_output(collectors: Sequence[Collector]) -> RequestOutput:
    """Join the choices of one prompt."""
    first = collectors[0]
    return RequestOutput(
        prompt_token_ids=first.request.prompt_token_ids,
        choices=tuple(collector.choice() for collector in collectors),
        num_cached_tokens=first.num_cached_tokens,
        prompt_logprobs=next((c.prompt_logprobs for c in collectors if c.prompt_logprobs is not None), None),
        submitted_at=first.submitted_at,
    )
