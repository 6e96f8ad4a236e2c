"""One streamed request to an OpenAI-compatible server, timed chunk by chunk."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark.bench.metrics import Limits, Timeline

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked for with every prompt. ``is_chat`` chooses /chat/completions over /completions.

    ``service_class`` and ``budget`` tell the server what the request was promised; ``cache_salt`` keeps it from prefixes that
    were cached under another one.
    """

    model: str
    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = False
    is_chat: bool = True
    service_class: str = ""
    budget: Limits | None = None
    cache_salt: str = ""

    @property
    def path(self) -> str:
        return "chat/completions" if self.is_chat else "completions"

    def body(self, prompt: str) -> dict[str, Any]:
        """The JSON of one request; what OpenAI itself does not know is sent only when it is set."""
        text = {"messages": [{"role": "user", "content": prompt}]} if self.is_chat else {"prompt": prompt}
        budget = {name: ms for name, ms in dataclasses.asdict(self.budget).items() if ms is not None} if self.budget else {}
        ours = {
            "ignore_eos": self.ignore_eos,
            "service_class": self.service_class,
            "latency_budget": budget,
            "cache_salt": self.cache_salt,
        }
        return {
            "model": self.model,
            **text,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in ours.items() if value},
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request went: a timeline, or an error.

    ``drafted_rounds`` and ``accepted`` are what the server says of its drafting; None if it says nothing.
    """

    timeline: Timeline | None
    error: str | None = None
    drafted_rounds: int | None = None
    accepted: int | None = None


class StreamFailure(Exception):
    """The stream broke a rule of the protocol, or carried an error."""


async def send(client: httpx.AsyncClient, ask: Ask, prompt: str, sent_s: float | None = None) -> Answer:
    """Send one prompt and read its stream to the end; failures become the answer's ``error``.

    ``sent_s`` (on ``time.perf_counter``) is when the request was due; None: now.
    """
    import httpx

    start = time.perf_counter() if sent_s is None else sent_s
    try:
        async with client.stream("POST", ask.path, json=ask.body(prompt)) as response:
            if response.status_code != 200:
                await response.aread()
                return Answer(None, f"HTTP {response.status_code}")
            return await read_stream(response.aiter_lines(), start)
    except (httpx.HTTPError, StreamFailure) as error:
        return Answer(None, str(error) or type(error).__name__)


async def read_stream(lines: AsyncIterator[str], sent_s: float) -> Answer:
    """The answer that a stream of server-sent events brings; StreamFailure if it is not whole.

    Chunks count when they carry text. An answer without any text counts with the chunk that ended it.
    """
    arrivals: list[float] = []
    finished_s: float | None = None
    num_tokens: int | None = None
    speculation: Mapping[str, Any] = {}
    async for line in lines:
        if not line.startswith("data:"):
            continue
        now = time.perf_counter()
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            break
        event = _parse(data)
        if event.get("usage"):
            num_tokens = event["usage"].get("completion_tokens")
        if event.get("metrics"):
            speculation = event["metrics"].get("speculative_decoding") or {}
        for choice in event.get("choices", ()):
            if _text(choice):
                arrivals.append(now)
            if choice.get("finish_reason"):
                finished_s = now
    else:
        raise StreamFailure("the stream ended without [DONE]")
    if finished_s is None:
        raise StreamFailure("the stream has no finish_reason")
    if num_tokens is None:
        raise StreamFailure("the server sent no usage, so its tokens cannot be counted")
    timeline = Timeline(sent_s, tuple(arrivals or [finished_s]), max(num_tokens, 1))
    return Answer(timeline, None, speculation.get("num_spec_steps"), speculation.get("num_accepted_draft_tokens"))


def _parse(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except json.JSONDecodeError as error:
        raise StreamFailure(f"a chunk is not JSON: {error}") from error
    if not isinstance(event, dict):
        raise StreamFailure("a chunk is not a JSON object")
    if (error_body := event.get("error")) is not None:
        message = error_body.get("message") if isinstance(error_body, dict) else error_body
        raise StreamFailure(f"error in the stream: {message}")
    return event


def _text(choice: Mapping[str, Any]) -> str:
    """The text of a chunk, of either endpoint; reasoning is text too."""
    delta = choice.get("delta") or {}
    return delta.get("content") or delta.get("reasoning_content") or choice.get("text") or ""
