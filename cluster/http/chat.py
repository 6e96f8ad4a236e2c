"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from dspark.cluster.http.connection import DONE, event
from dspark.cluster.http.errors import body_of
from dspark.cluster.http.logprobs import chat_logprobs, prompt_logprobs
from dspark.cluster.http.protocol import ChatBody
from dspark.cluster.http.service import Delta, Job, Service
from dspark.errors import DSparkError
from dspark.types import TokenLogprob


async def begin(service: Service, body: ChatBody, arrived: float) -> Job:
    """Queue the request; everything that can be wrong with it raises here, before the response starts."""
    service.check_model(body.model)
    params = body.params()
    prompt = await service.tokens_of_chat(body.messages)
    return await service.begin("chatcmpl", body, [prompt], params, arrived)


async def collect(job: Job) -> dict[str, Any]:
    """The whole response."""
    texts = [""] * len(job.choices)
    logprobs: list[list[TokenLogprob] | None] = [None] * len(job.choices)
    lasts: list[Delta | None] = [None] * len(job.choices)
    of_prompt: list[dict[str, Any] | None] | None = None
    async for delta in job.deltas():
        texts[delta.index] += delta.text
        lasts[delta.index] = delta
        if delta.logprobs is not None:
            logprobs[delta.index] = [*(logprobs[delta.index] or ()), *delta.logprobs]
        if delta.prompt_logprobs is not None:
            of_prompt = prompt_logprobs(delta.prompt_logprobs, job.service.texts)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if entries is None else chat_logprobs(entries, job.service.texts),
            "finish_reason": last.finish if last else None,
            "stop_reason": last.stop_reason if last else None,
        }
        for index, (text, entries, last) in enumerate(zip(texts, logprobs, lasts, strict=True))
    ]
    more = {} if of_prompt is None else {"prompt_logprobs": of_prompt}
    return _head(job, "chat.completion") | {"choices": choices, "usage": job.usage(), "metrics": job.metrics()} | more


async def events(job: Job, wants_usage: bool) -> AsyncGenerator[bytes, None]:
    """The response as server-sent events: one a verify round and choice; an error after the start is an event, too."""
    head = _head(job, "chat.completion.chunk")
    no_usage = {"usage": None} if wants_usage else {}
    left = len(job.choices)
    try:
        async for delta in job.deltas():
            left -= delta.finish is not None
            if not (delta.text or delta.is_first or delta.finish or delta.logprobs):
                continue  # text held back: half a character, or what may become a stop string
            metrics = {"metrics": job.metrics()} if not left and not wants_usage else {}
            yield event(head | {"choices": [_chunk(delta, job)]} | no_usage | metrics)
        if wants_usage:
            yield event(head | {"choices": [], "usage": job.usage(), "metrics": job.metrics()})
    except DSparkError as error:
        yield event(body_of(error))
    yield DONE


def _head(job: Job, kind: str) -> dict[str, Any]:
    service = job.service
    return {"id": job.id, "object": kind, "created": job.created, "model": service.model_name, "system_fingerprint": service.fingerprint}


def _chunk(delta: Delta, job: Job) -> dict[str, Any]:
    content: dict[str, Any] = {"content": delta.text} if delta.text or delta.is_first or delta.logprobs else {}
    chunk: dict[str, Any] = {
        "index": delta.index,
        "delta": ({"role": "assistant"} if delta.is_first else {}) | content,
        "logprobs": None if delta.logprobs is None else chat_logprobs(delta.logprobs, job.service.texts),
        "finish_reason": delta.finish,
    }
    if delta.finish is not None:
        chunk["stop_reason"] = delta.stop_reason
    if delta.prompt_logprobs is not None:
        chunk["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, job.service.texts)
    return chunk
