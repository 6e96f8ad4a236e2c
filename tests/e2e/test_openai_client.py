"""The official client, unchanged, against a running server."""

from __future__ import annotations

import asyncio

import openai
import pytest
from helpers.servers import Server

MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "tiny"


def test_chat_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=40, temperature=0)
    assert whole.usage.completion_tokens == 40
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 40
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=40, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 40)
    assert "num_spec_steps" in chunks[-1].model_extra["metrics"]["speculative_decoding"]
    assert "num_spec_steps" in whole.model_extra["metrics"]["speculative_decoding"]


def test_a_repeated_prompt_is_cached(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "the same long prompt " * 10}]
    usages = [client.chat.completions.create(model="tiny", messages=messages, max_tokens=2).usage for _ in range(3)]
    assert usages[-1].prompt_tokens_details.cached_tokens >= 128, "prefix affinity sends it where its blocks are"


def test_completions_with_everything(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt=["one", "two"],
        n=2,
        max_tokens=6,
        seed=3,
        temperature=0.8,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100},
        logprobs=2,
        echo=True,
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 6, "ignore_eos": True, "acceptance": "coupled"},
    )
    assert len(answer.choices) == 4
    again = client.completions.create(
        model="tiny", prompt="one", n=2, max_tokens=6, seed=3, temperature=0.8, extra_body={"ignore_eos": True}
    )
    once_more = client.completions.create(
        model="tiny", prompt="one", n=2, max_tokens=6, seed=3, temperature=0.8, extra_body={"ignore_eos": True, "speculation": "off"}
    )
    assert [c.text for c in again.choices] == [c.text for c in once_more.choices], "a seed fixes the text, drafting or not"
    for choice in answer.choices:
        assert choice.text.startswith(("one", "two"))
        assert len(choice.logprobs.tokens) == 9
        assert choice.logprobs.token_logprobs[0] is None


def test_stop_strings_end_the_text(client: openai.OpenAI) -> None:
    text = client.completions.create(model="tiny", prompt="abc", max_tokens=60, temperature=0).choices[0].text
    plain = [c for c in text if c.isascii() and c.isprintable()]
    stop = plain[len(plain) // 2]
    cut = client.completions.create(model="tiny", prompt="abc", max_tokens=60, temperature=0, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")
    assert cut.model_extra["stop_reason"] == stop


def test_chat_logprobs(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    ).choices[0]
    assert len(choice.logprobs.content) == 5
    for entry in choice.logprobs.content:
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-4), "greedy takes the most likely token"
        assert len(entry.top_logprobs) == 3


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-3)
    assert bad.value.param == "temperature"


def test_sixteen_streams_at_once(server: Server) -> None:
    async def one(client: openai.AsyncOpenAI, index: int) -> tuple[str, int]:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"number {index % 4}"}],
            max_tokens=64,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        text, tokens = "", 0
        async for chunk in stream:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return text, tokens

    async def test() -> list[tuple[str, int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(16)))

    results = asyncio.run(test())
    assert [tokens for _, tokens in results] == [64] * 16
    for index in range(4):
        assert len({text for text, _ in results[index::4]}) == 1, "the same greedy prompt gives the same text"
