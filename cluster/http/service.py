"""One API request from token ids to deltas: ``Service`` starts a ``Job``, whose choices turn outcomes into text."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dspark.cluster.dispatch import Dispatcher, Generation
from dspark.cluster.http.budgets import Ledger, Stopwatch, shown
from dspark.cluster.http.logprobs import TokenTexts
from dspark.cluster.http.metering import Meter, Timing
from dspark.cluster.http.protocol import GenerationBody
from dspark.errors import BadRequest, DSparkError, UnknownModel
from dspark.prompting import encode, render_chat
from dspark.router.admission import BudgetOutOfReach
from dspark.router.classes import Classes, Terms
from dspark.sampling import SamplingParams
from dspark.types import Finish, Request, StepOutcome, TokenLogprob
from dspark.workers.verifier.text import TextStream
from dspark.workers.wire.codec import TOKEN_LIMIT

INLINE_CHARS: Final = 8192  # tokenised on the event loop (about a millisecond); longer text goes to a thread
MAX_CHOICES: Final = 128  # of one HTTP request: prompts times n


@dataclass(frozen=True, slots=True)
class Delta:
    """What one verify round adds to one choice."""

    index: int
    text: str
    tokens: tuple[int, ...]
    is_first: bool
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish: Finish | None
    stop_reason: str | int | None


class Choice:
    """One choice of a response: its text so far and how its drafts fared."""

    def __init__(self, index: int, prompt: Sequence[int], generation: Generation, text: TextStream, watch: Stopwatch) -> None:
        self.index = index
        self.prompt = prompt
        self.generation = generation
        self.finish: Finish | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.has_failed = False
        self.watch = watch
        self.accepted_counts: list[int] = []  # [j]: rounds in which exactly j drafted tokens were accepted
        self.num_drafted = 0
        self.max_drafted = 0
        self._text = text

    def take(self, outcome: StepOutcome) -> Delta:
        """The delta of one outcome."""
        is_first = self.num_tokens == 0 and self.watch.first_s is None
        if is_first:
            self.num_cached_tokens = outcome.num_cached_tokens
        self.num_tokens += len(outcome.tokens)
        self.finish = outcome.finish
        if outcome.drafted:
            self.num_drafted += outcome.drafted
            self.max_drafted = max(self.max_drafted, outcome.drafted)
            self.accepted_counts += [0] * (outcome.accepted + 1 - len(self.accepted_counts))
            self.accepted_counts[outcome.accepted] += 1
        text = self._text.take(outcome)
        return Delta(
            self.index, text, outcome.tokens, is_first, outcome.logprobs, outcome.prompt_logprobs, outcome.finish, outcome.stop_reason
        )


class Job:
    """All choices of one HTTP request. ``close`` must be called in the end; it cancels what still runs."""

    def __init__(self, request_id: str, service: Service, choices: Sequence[Choice], timing: Timing) -> None:
        self.id = request_id
        self.created = int(time.time())
        self.choices = choices
        self.service = service
        self._timing = timing
        self._is_closed = False

    async def deltas(self) -> AsyncIterator[Delta]:
        """Deltas of all choices as they come; each choice's are in order."""
        if len(self.choices) == 1:
            (choice,) = self.choices
            try:
                async for outcome in choice.generation:
                    yield self._note(choice, choice.take(outcome))
            except DSparkError:
                choice.has_failed = True
                raise
            return
        queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        pumps = [asyncio.create_task(self._pump(choice, queue)) for choice in self.choices]
        try:
            running = len(pumps)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for pump in pumps:
                pump.cancel()

    def usage(self) -> dict[str, Any]:
        """Token counts as OpenAI gives them; each prompt counts once, however many choices it has."""
        prompts = {id(choice.prompt): choice for choice in reversed(self.choices)}.values()
        prompt_tokens = sum(len(choice.prompt) for choice in prompts)
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in prompts)},
        }

    def metrics(self) -> dict[str, Any]:
        """How drafting went, and how the latency budget, if there is one, was kept."""
        return self._speculation() | shown([choice.watch for choice in self.choices])

    def _speculation(self) -> dict[str, Any]:
        """How drafting went, in the shape of vLLM's ``metrics.speculative_decoding``; only rounds with drafts count."""
        longest = max(len(choice.accepted_counts) for choice in self.choices)
        histogram = [sum(c.accepted_counts[j] for c in self.choices if j < len(c.accepted_counts)) for j in range(longest)]
        steps = sum(histogram)
        accepted = sum(j * count for j, count in enumerate(histogram))
        drafted = sum(choice.num_drafted for choice in self.choices)
        return {
            "speculative_decoding": {
                "mean_acceptance_length": 1.0 + accepted / steps if steps else 1.0,
                "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
                "acceptance_histogram": histogram,
                "num_spec_steps": steps,
                "num_accepted_draft_tokens": accepted,
                "num_draft_tokens": drafted,
                "num_spec_tokens": max(choice.max_drafted for choice in self.choices),
            }
        }

    def close(self) -> None:
        """End every choice, here and at its verifier; safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        for choice in self.choices:
            choice.generation.close()
        finishes = [choice.finish or Finish.ABORT for choice in self.choices]
        replays = sum(choice.generation.num_replays for choice in self.choices)
        moves = sum(choice.generation.num_moves for choice in self.choices)
        now = time.monotonic()
        self.service.meter.ended(self._timing, now, finishes, replays, moves)
        for choice in self.choices:
            self.service.ledger.closed(choice.watch, now, choice.finish is not None, choice.has_failed)

    async def _pump(self, choice: Choice, queue: asyncio.Queue[Delta | BaseException | None]) -> None:
        try:
            async for outcome in choice.generation:
                queue.put_nowait(self._note(choice, choice.take(outcome)))
            queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - handed on to the reader of the queue, which raises it
            choice.has_failed = True
            queue.put_nowait(error)

    def _note(self, choice: Choice, delta: Delta) -> Delta:
        if delta.tokens:
            now = time.monotonic()
            self.service.meter.chunk(self._timing, now, choice.watch.last_s, len(delta.tokens))
            choice.watch.chunk(now, len(delta.tokens))
        return delta


class Service:
    """The served model: its name, its tokenizer, and the dispatcher in front of its verifiers."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        tokenizer: Any,
        model_name: str,
        fingerprint: str,
        max_model_len: int,
        classes: Classes = Classes({}),  # noqa: B008 - frozen
    ) -> None:
        self.dispatcher = dispatcher
        self.classes = classes
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.fingerprint = fingerprint
        self.max_model_len = max_model_len
        self.texts = TokenTexts(tokenizer)
        self.meter = Meter(model_name)
        self.ledger = Ledger(self.meter.registry, model_name)
        self.meter.follow("in_flight", "Choices that are generated for this router's clients.", lambda: dispatcher.in_flight)
        self.started = int(time.time())

    def check_model(self, name: str | None) -> None:
        """``UnknownModel`` unless the name, if any is given, is the served one."""
        if name is not None and name != self.model_name:
            raise UnknownModel(f"the model {name!r} does not exist; this server has {self.model_name!r}", "model", "model_not_found")

    async def tokens_of_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The prompt of a chat, through the model's own template."""
        contents = [message.get("content") for message in messages]
        if all(isinstance(content, str) for content in contents) and sum(map(len, contents)) <= INLINE_CHARS:  # type: ignore[arg-type]
            return render_chat(self.tokenizer, messages)
        return await asyncio.to_thread(render_chat, self.tokenizer, messages)

    async def tokens_of_text(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a completion's prompt."""
        if not isinstance(prompt, str):
            if not 0 <= min(prompt) <= max(prompt) < TOKEN_LIMIT:
                raise BadRequest("a prompt token id is out of range", "prompt")
            return prompt
        if len(prompt) <= INLINE_CHARS:
            return encode(self.tokenizer, prompt)
        return await asyncio.to_thread(encode, self.tokenizer, prompt)

    async def begin(self, kind: str, body: GenerationBody, prompts: Sequence[Sequence[int]], params: SamplingParams, arrived: float) -> Job:
        """Queue every choice of every prompt at a verifier; raises what ``Dispatcher.start`` raises."""
        if len(prompts) * params.n > MAX_CHOICES:
            raise BadRequest(f"{len(prompts)} prompts with n = {params.n}: at most {MAX_CHOICES} choices a request", "n")
        terms = self.classes.terms(body.service_class, body.budget(), body.priority)
        request_id = f"{kind}-{uuid.uuid4().hex}"
        children = [params.child(i) for i in range(params.n)]
        wanted = [(prompt, child) for prompt in prompts for child in children]
        requests = [
            Request(
                id=f"{request_id}-{index}",
                prompt_token_ids=tuple(prompt),
                sampling=child,
                latency_budget=terms.budget,
                speculation=body.speculation_mode(),
                priority=terms.priority,
                cache_salt=body.cache_salt or "",
                service_class=terms.service_class,
            )
            for index, (prompt, child) in enumerate(wanted)
        ]
        texts = [TextStream(self.tokenizer, child) for _, child in wanted]
        generations = await self._start(requests, terms)
        for prompt in prompts:
            self.meter.took(len(prompt))
        choices = [
            Choice(index, prompt, generation, text, Stopwatch(terms, arrived))
            for index, ((prompt, _), generation, text) in enumerate(zip(wanted, generations, texts, strict=True))
        ]
        for choice in choices:
            self.ledger.opened(choice.watch, choice.generation)
        return Job(request_id, self, choices, Timing(arrived))

    async def _start(self, requests: Sequence[Request], terms: Terms) -> list[Generation]:
        try:
            return await self.dispatcher.start(requests, terms.reject_when_late)
        except BudgetOutOfReach:
            self.ledger.refused_late(terms.service_class)
            raise
