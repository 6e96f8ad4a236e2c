"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from dspark.cluster.http.connection import DONE, event
from dspark.cluster.http.errors import body_of
from dspark.cluster.http.logprobs import completion_logprobs, prompt_logprobs
from dspark.cluster.http.protocol import CompletionBody
from dspark.cluster.http.service import Choice, Delta, Job, Service
from dspark.errors import DSparkError
from dspark.types import TokenLogprob


class Echo:
    """What a choice shows: its deltas, and the prompt before them if the request says ``echo``."""

    def __init__(self, body: CompletionBody, job: Job) -> None:
        self._body = body
        self._job = job
        self._offsets = [0] * len(job.choices)  # characters of each choice sent so far

    def part(self, delta: Delta) -> dict[str, Any]:
        """Text and log-probabilities of one delta, as a choice object."""
        choice = self._job.choices[delta.index]
        output = () if self._body.scores_only else delta.tokens
        text = "" if self._body.scores_only else delta.text
        entries: list[TokenLogprob | None] = list((delta.logprobs or ())[: len(output)])
        tokens = list(output)
        if self._body.echo and delta.is_first:
            text = self._text_of(choice) + text
            if delta.prompt_logprobs is not None:
                entries = [*delta.prompt_logprobs, *entries]
                tokens = [*choice.prompt, *tokens]
        shown: dict[str, Any] = {"index": delta.index, "text": text, "logprobs": None, "finish_reason": delta.finish}
        if self._body.logprobs is not None:
            shown["logprobs"] = completion_logprobs(entries, tokens, self._job.service.texts, self._offsets[delta.index])
            self._offsets[delta.index] += sum(len(name) for name in shown["logprobs"]["tokens"])
        if delta.finish is not None:
            shown["stop_reason"] = delta.stop_reason
        if self._body.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            shown["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, self._job.service.texts)
        return shown

    def usage(self) -> dict[str, Any]:
        """Usage; tokens that were only computed to score the prompt are not the client's."""
        usage = self._job.usage()
        if self._body.scores_only:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _text_of(self, choice: Choice) -> str:
        prompts = self._body.prompts()
        prompt = prompts[choice.index // (self._body.n or 1)]
        if isinstance(prompt, str):
            return prompt
        return b"".join(self._job.service.texts.bytes_of(token) for token in prompt).decode("utf-8", "replace")


async def begin(service: Service, body: CompletionBody, arrived: float) -> Job:
    """Queue the request; everything that can be wrong with it raises here, before the response starts."""
    service.check_model(body.model)
    params = body.params()
    prompts = await asyncio.gather(*(service.tokens_of_text(prompt) for prompt in body.prompts()))
    return await service.begin("cmpl", body, prompts, params, arrived)


async def collect(job: Job, body: CompletionBody) -> dict[str, Any]:
    """The whole response."""
    echo = Echo(body, job)
    parts: list[list[dict[str, Any]]] = [[] for _ in job.choices]
    async for delta in job.deltas():
        parts[delta.index].append(echo.part(delta))
    choices = [_joined(of_choice) for of_choice in parts]
    return _head(job) | {"choices": choices, "usage": echo.usage(), "metrics": job.metrics()}


async def events(job: Job, body: CompletionBody) -> AsyncGenerator[bytes, None]:
    """The response as server-sent events: one a verify round and choice; an error after the start is an event, too."""
    head = _head(job)
    echo = Echo(body, job)
    no_usage = {"usage": None} if body.wants_usage else {}
    left = len(job.choices)
    try:
        async for delta in job.deltas():
            left -= delta.finish is not None
            part = echo.part(delta)
            if not (part["text"] or delta.finish or delta.logprobs):
                continue
            metrics = {"metrics": job.metrics()} if not left and not body.wants_usage else {}
            yield event(head | {"choices": [part]} | no_usage | metrics)
        if body.wants_usage:
            yield event(head | {"choices": [], "usage": echo.usage(), "metrics": job.metrics()})
    except DSparkError as error:
        yield event(body_of(error))
    yield DONE


def _head(job: Job) -> dict[str, Any]:
    service = job.service
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": service.model_name,
        "system_fingerprint": service.fingerprint,
    }


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One choice object from those of its deltas."""
    whole = dict(parts[-1])
    whole["text"] = "".join(part["text"] for part in parts)
    if whole["logprobs"] is not None:
        whole["logprobs"] = {key: [entry for part in parts for entry in part["logprobs"][key]] for key in whole["logprobs"]}
    if "prompt_logprobs" in parts[0]:
        whole["prompt_logprobs"] = parts[0]["prompt_logprobs"]
    return whole
