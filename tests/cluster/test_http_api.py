"""The API's shapes, without Ray and without a model: the scripted verifier's tokens are visible characters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from helpers.apis import CHAT, TOKENIZER, api, run
from helpers.scripted import ScriptedHost, continuation

from dspark.cluster.http.connection import event, while_connected
from dspark.errors import Overloaded

TEXT = {"model": "tiny", "prompt": "hello", "max_tokens": 7, "temperature": 0}


def text_after(prompt: str, count: int) -> str:
    return TOKENIZER.decode(continuation(TOKENIZER(prompt)["input_ids"], count))  # type: ignore[no-any-return]


CHAT_TEXT = text_after("user: hi\nassistant: ", 7)


def test_chat_whole() -> None:
    async def test() -> None:
        async with api() as setup:
            answer = (await setup.post("/v1/chat/completions", CHAT)).json()
            (choice,) = answer["choices"]
            assert choice["message"] == {"role": "assistant", "content": CHAT_TEXT, "refusal": None}
            assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
            assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
            assert answer["usage"]["completion_tokens"] == 7
            assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
            # rounds of 2, 2, 2 and 1 tokens: 1, 1, 1 and 0 drafts accepted of 2 each
            assert answer["metrics"]["speculative_decoding"] == {
                "mean_acceptance_length": 1.75,
                "draft_acceptance_rate": 0.375,
                "acceptance_histogram": [1, 3],
                "num_spec_steps": 4,
                "num_accepted_draft_tokens": 3,
                "num_draft_tokens": 8,
                "num_spec_tokens": 2,
            }

    run(test)


def test_chat_streams_one_chunk_a_round() -> None:
    async def test() -> None:
        async with api() as setup:
            chunks = await setup.stream("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}})
            *content, last = chunks
            assert len(content) == 4
            assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in content) == CHAT_TEXT
            assert [chunk["choices"][0]["delta"].get("role") for chunk in content] == ["assistant", None, None, None]
            assert [chunk["choices"][0]["finish_reason"] for chunk in content] == [None, None, None, "length"]
            assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in content)
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 7
            assert last["metrics"]["speculative_decoding"]["num_spec_steps"] == 4
            plain = await setup.stream("/v1/chat/completions", CHAT)
            assert len(plain) == 4
            assert "usage" not in plain[0]
            assert ["metrics" in chunk for chunk in plain] == [False, False, False, True]

    run(test)


def test_n_choices_share_one_prompt_in_usage() -> None:
    async def test() -> None:
        async with api() as setup:
            answer = (await setup.post("/v1/chat/completions", CHAT | {"n": 3})).json()
            assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
            assert {choice["message"]["content"] for choice in answer["choices"]} == {CHAT_TEXT}
            one = (await setup.post("/v1/chat/completions", CHAT)).json()["usage"]
            assert answer["usage"]["prompt_tokens"] == one["prompt_tokens"]
            assert answer["usage"]["completion_tokens"] == 21
            chunks = await setup.stream("/v1/chat/completions", CHAT | {"n": 3})
            for index in range(3):
                mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
                assert "".join(c["delta"].get("content", "") for c in mine) == CHAT_TEXT
                assert [c["finish_reason"] for c in mine][-1] == "length"

    run(test)


def test_seeds_and_fields_reach_the_engine() -> None:
    async def test() -> None:
        async with api() as setup:
            more = {
                "seed": 5,
                "n": 2,
                "top_k": 3,
                "min_p": 0.1,
                "repetition_penalty": 1.2,
                "min_tokens": 1,
                "ignore_eos": True,
                "stop_token_ids": [9],
                "acceptance": "ratio",
                "cache_salt": "tenant",
                "priority": -1,
                "skip_special_tokens": False,
                "logit_bias": {"7": -2},
                "speculation": {"mode": "static", "max_draft_tokens": 3},
                "latency_budget": {"ttft_ms": 100, "tpot_ms": 20.5},
                "stop": "zz",
            }
            assert (await setup.post("/v1/chat/completions", CHAT | more)).status_code == 200
            one, other = setup.hosts.hosts["v0"].seen
            sampling = one.sampling
            assert (sampling.seed, other.sampling.seed, one.noise_seed) == (5, 6, 5)
            assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (3, 0.1, 1.2, 1)
            assert (sampling.ignore_eos, sampling.stop_token_ids, sampling.acceptance, sampling.stop) == (True, (9,), "ratio", ("zz",))
            assert (sampling.skip_special_tokens, sampling.logit_bias, sampling.n) == (False, {7: -2}, 1)
            assert (one.cache_salt, one.priority, str(one.speculation)) == ("tenant", -1, "static:3")
            assert (one.latency_budget.ttft_ms, one.latency_budget.tpot_ms) == (100, 20.5)
            await setup.post("/v1/chat/completions", CHAT | {"max_completion_tokens": 2, "speculation": "off"})
            last = setup.hosts.hosts["v0"].seen[-1]
            assert (last.sampling.max_tokens, str(last.speculation)) == (2, "off")
            for asked, understood in (
                ({"mode": "adaptive", "tree": True}, "tree:16"),
                ({"mode": "adaptive", "tree": 9, "max_draft_tokens": 4}, "tree:9:4"),
                ({"mode": "adaptive", "tree": False}, "adaptive"),
                ({"mode": "static", "tree": 0, "max_draft_tokens": 2}, "static:2"),
                ("tree:8", "tree:8"),
            ):
                await setup.post("/v1/chat/completions", CHAT | {"speculation": asked})
                assert str(setup.hosts.hosts["v0"].seen[-1].speculation) == understood

    run(test)


def test_chat_logprobs() -> None:
    async def test() -> None:
        async with api() as setup:
            body = CHAT | {"logprobs": True, "top_logprobs": 2}
            (choice,) = (await setup.post("/v1/chat/completions", body)).json()["choices"]
            content = choice["logprobs"]["content"]
            assert "".join(entry["token"] for entry in content) == CHAT_TEXT
            assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == CHAT_TEXT
            assert content[0]["logprob"] == -0.5
            assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-1.0, -2.0]
            chunks = await setup.stream("/v1/chat/completions", body)
            assert [len(chunk["choices"][0]["logprobs"]["content"]) for chunk in chunks] == [2, 2, 2, 1]

    run(test)


def test_prompt_logprobs() -> None:
    async def test() -> None:
        async with api() as setup:
            answer = (await setup.post("/v1/chat/completions", CHAT | {"prompt_logprobs": 1})).json()
            first, second, *_ = answer["prompt_logprobs"]
            assert first is None
            assert {"logprob": -2.0, "rank": 3, "decoded_token": "s"} in second.values()
            assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
            chunks = await setup.stream("/v1/completions", TEXT | {"prompt_logprobs": 0})
            assert [len(chunk["choices"][0].get("prompt_logprobs", ())) for chunk in chunks] == [5, 0, 0, 0]

    run(test)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hello", ["hello"]),
        (["hello", "you"], ["hello", "you"]),
        (TOKENIZER("hello")["input_ids"], ["hello"]),
        ([TOKENIZER("hello")["input_ids"], TOKENIZER("you")["input_ids"]], ["hello", "you"]),
    ],
)
def test_completion_prompts(prompt: object, texts: list[str]) -> None:
    async def test() -> None:
        async with api() as setup:
            for n in (1, 2):
                answer = (await setup.post("/v1/completions", TEXT | {"prompt": prompt, "n": n})).json()
                expected = [text_after(text, 7) for text in texts for _ in range(n)]
                assert [choice["text"] for choice in answer["choices"]] == expected
                assert answer["usage"]["prompt_tokens"] == sum(len(text) for text in texts)
                echoed = (await setup.post("/v1/completions", TEXT | {"prompt": prompt, "n": n, "echo": True})).json()
                assert [choice["text"] for choice in echoed["choices"]] == [t + text_after(t, 7) for t in texts for _ in range(n)]

    run(test)


def test_completion_logprobs_and_echo() -> None:
    async def test() -> None:
        async with api() as setup:
            body = TEXT | {"logprobs": 2, "echo": True}
            (choice,) = (await setup.post("/v1/completions", body)).json()["choices"]
            shown = choice["logprobs"]
            whole = "hello" + text_after("hello", 7)
            assert choice["text"] == whole == "".join(shown["tokens"])
            assert shown["text_offset"] == list(range(12))
            assert shown["token_logprobs"] == [None] + [-2.0] * 4 + [-0.5] * 7
            assert shown["top_logprobs"][0] is None
            assert len(shown["top_logprobs"][1]) == 2
            chunks = [chunk["choices"][0] for chunk in await setup.stream("/v1/completions", body)]
            assert "".join(chunk["text"] for chunk in chunks) == whole
            assert [offset for chunk in chunks for offset in chunk["logprobs"]["text_offset"]] == list(range(12))

    run(test)


def test_scoring_a_prompt_generates_nothing() -> None:
    async def test() -> None:
        async with api() as setup:
            answer = (await setup.post("/v1/completions", TEXT | {"logprobs": 1, "echo": True, "max_tokens": 0})).json()
            (choice,) = answer["choices"]
            assert choice["text"] == "hello"
            assert len(choice["logprobs"]["tokens"]) == 5
            assert answer["usage"]["completion_tokens"] == 0
            refused = await setup.post("/v1/completions", TEXT | {"max_tokens": 0})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")

    run(test)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": "hi"}, "messages"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ("chat/completions", {"temperature": -1}, "temperature"),
        ("chat/completions", {"temperature": "hot"}, "temperature"),
        ("chat/completions", {"temperature": True}, "temperature"),
        ("chat/completions", {"max_tokens": -5}, "max_tokens"),
        ("chat/completions", {"max_tokens": 1.5}, "max_tokens"),
        ("chat/completions", {"max_tokens": 10**30}, "max_tokens"),
        ("chat/completions", {"n": 1000}, "n"),
        ("chat/completions", {"n": 0}, "n"),
        ("chat/completions", {"top_p": 2}, "top_p"),
        ("chat/completions", {"seed": 2**70}, "seed"),
        ("chat/completions", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("chat/completions", {"logit_bias": {"-1": 1}}, "logit_bias"),
        ("chat/completions", {"stop": ["a"] * 17}, "stop"),
        ("chat/completions", {"stop": 5}, "stop"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"speculation": "sometimes"}, "speculation"),
        ("chat/completions", {"speculation": {"mode": "static"}}, "speculation"),
        ("chat/completions", {"speculation": {"mode": "static", "max_draft_tokens": 3, "tree": True}}, "speculation"),
        ("chat/completions", {"speculation": {"mode": "adaptive", "tree": 65}}, "speculation"),
        ("chat/completions", {"speculation": {"mode": "adaptive", "tree": -1}}, "speculation"),
        ("chat/completions", {"latency_budget": {"ttft_ms": -1}}, "latency_budget.ttft_ms"),
        ("chat/completions", {"service_class": "gold"}, "service_class"),
        ("chat/completions", {"service_class": ""}, "service_class"),
        ("chat/completions", {"service_class": 5}, "service_class"),
        ("chat/completions", {"cache_salt": "x" * 257}, "cache_salt"),
        ("chat/completions", {"priority": 2**31}, "priority"),
        ("chat/completions", {"acceptance": "always"}, "acceptance"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": None}, "prompt"),
        ("completions", {"prompt": [1, "a"]}, "prompt"),
        ("completions", {"prompt": [[-1]]}, "prompt"),
        ("completions", {"prompt": [2**40]}, "prompt"),
        ("completions", {"prompt": ["a"] * 65}, "prompt"),
        ("completions", {"prompt": ["a"] * 64, "n": 64}, "n"),
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"best_of": 5}, "best_of"),
    ],
)
def test_bad_fields_are_named(path: str, body: dict[str, Any], param: str) -> None:
    async def test() -> None:
        async with api() as setup:
            response = await setup.post(f"/v1/{path}", (CHAT if path.startswith("chat") else TEXT) | body)
            error = response.json()["error"]
            assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
            assert error["message"]
            assert setup.hosts.hosts["v0"].seen == []

    run(test)


def test_missing_field_and_unknown_fields() -> None:
    async def test() -> None:
        async with api() as setup:
            missing = await setup.post("/v1/chat/completions", {"model": "tiny"})
            assert (missing.status_code, missing.json()["error"]["param"]) == (400, "messages")
            extra = await setup.post("/v1/chat/completions", CHAT | {"user": "me", "made_up": {"deep": [1]}})
            assert extra.status_code == 200

    run(test)


def test_unknown_model_route_and_method() -> None:
    async def test() -> None:
        async with api() as setup:
            for response in (
                await setup.post("/v1/chat/completions", CHAT | {"model": "gpt-9"}),
                await setup.client.get("/v1/models/gpt-9"),
            ):
                assert response.status_code == 404
                assert response.json()["error"]["code"] == "model_not_found"
            nowhere = await setup.client.get("/v1/nothing")
            assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "not_found_error")
            assert (await setup.client.get("/v1/completions")).status_code == 405

    run(test)


@pytest.mark.parametrize(
    ("raw", "status"),
    [(b"{", 400), (b"", 400), (b"[]", 400), (b'{"model": "\xff\xfe"}', 400), (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", 400)],
    ids=["cut", "empty", "list", "utf-8", "deep"],
)
def test_bad_bodies(raw: bytes, status: int) -> None:
    async def test() -> None:
        async with api(max_body_bytes=50_000) as setup:
            response = await setup.client.post("/v1/chat/completions", content=raw)
            assert response.status_code == status
            assert response.json()["error"]["message"]

    run(test)


def test_large_bodies_are_refused_before_parsing() -> None:
    async def test() -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b"x" * 1000

        async with api(max_body_bytes=10_000) as setup:
            declared = await setup.client.post("/v1/chat/completions", content=b"x" * 20_000)
            chunked = await setup.client.post("/v1/chat/completions", content=chunks())
            for response in (declared, chunked):
                assert response.status_code == 413
                assert response.json()["error"]["code"] == "body_too_large"

    run(test)


def test_the_key_guards_everything_but_health() -> None:
    async def test() -> None:
        async with api(api_key="secret-Key") as setup:
            paths = ("/v1/models", "/metrics", "/status", "/docs", "/openapi.json", "/v1/nothing")
            for headers in ({}, {"Authorization": "Bearer secret-key"}, {"Authorization": "Basic secret-Key"}, {"Authorization": "Bearer"}):
                for path in paths:
                    refused = await setup.client.get(path, headers=headers)
                    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
                assert (await setup.post("/v1/completions", TEXT, headers=headers)).status_code == 401
            good = {"Authorization": "Bearer secret-Key"}
            assert (await setup.client.get("/v1/models", headers=good)).status_code == 200
            assert (await setup.post("/v1/completions", TEXT, headers=good)).status_code == 200
            assert (await setup.client.get("/health")).status_code == 200

    run(test)


@pytest.mark.parametrize("name", ["x-request-timeout-seconds", "X-Request-Disconnect-Disabled", "serve_multiplexed_model_id"])
def test_headers_that_the_proxy_should_have_taken_out_are_refused(name: str) -> None:
    async def test() -> None:
        async with api() as setup:
            response = await setup.post("/v1/completions", TEXT, headers={name: "?1"})
            assert response.status_code == 400
            assert setup.hosts.hosts["v0"].seen == []

    run(test)


def test_overload_says_when_to_come_back() -> None:
    async def test() -> None:
        host = ScriptedHost(vocab=1000)
        host.fail_with = Overloaded("full", 3.2)
        async with api(host) as setup:
            for stream in (False, True):
                response = await setup.post("/v1/chat/completions", CHAT | {"stream": stream})
                assert (response.status_code, response.headers["retry-after"]) == (503, "4")
                assert response.json()["error"]["code"] == "overloaded"

    run(test)


def test_an_internal_error_tells_nothing() -> None:
    async def test() -> None:
        host = ScriptedHost(vocab=1000)
        async with api(host) as setup:
            host.fail_with = RuntimeError("secret path /etc")
            response = await setup.post("/v1/chat/completions", CHAT)
            assert response.status_code == 500
            assert "secret" not in response.text

    run(test)


def test_a_stream_whose_verifier_is_lost_for_good_ends_with_an_error_event() -> None:
    async def test() -> None:
        host = ScriptedHost(vocab=1000, step_s=0.02)
        async with api(host) as setup:
            task = asyncio.create_task(setup.stream("/v1/chat/completions", CHAT | {"max_tokens": 500}))
            while not host.seen:
                await asyncio.sleep(0.01)
            setup.hosts.kill("v0")
            events = await task
            assert events[-1]["error"]["type"] == "service_unavailable_error"
            assert setup.dispatcher.in_flight == 0

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_verifier(stream: bool) -> None:
    async def test() -> None:
        host = ScriptedHost(vocab=1000, step_s=0.02)
        async with api(host) as setup:
            body = json.dumps(CHAT | {"max_tokens": 1000, "stream": stream}).encode()
            left = asyncio.Event()
            messages = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive() -> dict[str, Any]:
                if messages:
                    return messages.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                return None

            path = "/v1/chat/completions"
            scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "asgi": {"version": "3.0"}}
            task = asyncio.create_task(setup.app(scope, receive, send))
            while not host.stats()["running"]:
                await asyncio.sleep(0.01)
            left.set()
            await asyncio.wait_for(task, 1)
            assert host.stats() == {"running": 0.0, "free_blocks": 256.0}
            assert setup.dispatcher.in_flight == 0

    run(test)


def test_a_result_nobody_takes_is_discarded() -> None:
    """The server cancels a handler just when its work is done: the work must not stay in flight for ever."""
    discarded: list[str] = []

    async def test() -> None:
        done = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(10)
            return {"type": "http.disconnect"}

        async def work() -> str:
            await done.wait()
            return "job"

        handler = asyncio.create_task(while_connected(receive, work(), discarded.append))
        await asyncio.sleep(0.01)
        done.set()
        handler.cancel()  # both before the loop runs again
        with pytest.raises(asyncio.CancelledError):
            await handler

    run(test)
    assert discarded == ["job"]


def test_a_client_that_leaves_during_begin_leaves_nothing_in_flight() -> None:
    async def test() -> None:
        host = ScriptedHost(vocab=1000, step_s=0.02)
        async with api(host) as setup:
            body = json.dumps(CHAT | {"max_tokens": 1000}).encode()
            scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
            for spins in range(40):
                messages = [{"type": "http.request", "body": body, "more_body": False}]

                async def receive(messages: list[dict[str, Any]] = messages) -> dict[str, Any]:
                    if messages:
                        return messages.pop()
                    await asyncio.sleep(10)
                    return {"type": "http.disconnect"}

                async def send(message: Any) -> None:
                    return None

                task = asyncio.create_task(setup.app(dict(scope), receive, send))
                for _ in range(spins):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            assert setup.dispatcher.in_flight == 0
            assert host.stats()["running"] == 0

    run(test)


def test_health_follows_the_verifiers() -> None:
    async def test() -> None:
        host = ScriptedHost(vocab=1000)
        async with api(host) as setup:
            assert (await setup.client.get("/health")).json() == {"status": "ok", "verifiers": 1, "healthy": 1}
            host.healthy = False
            async with asyncio.timeout(2):
                while (await setup.client.get("/health")).status_code != 503:
                    await asyncio.sleep(0.02)
            host.healthy = True
            setup.dispatcher.is_draining = True
            draining = await setup.client.get("/health")
            assert (draining.status_code, draining.json()["status"]) == (503, "draining")

    run(test)


def test_events_are_single_lines_for_every_reader() -> None:
    body = {"text": "a\x85b\u2028c\u2029d\ne\x0bf\x1cgµ"}
    data, *rest = event(body).decode().splitlines()
    assert rest == [""]
    assert json.loads(data.removeprefix("data: ")) == body


def test_models_and_docs() -> None:
    async def test() -> None:
        async with api() as setup:
            (card,) = (await setup.client.get("/v1/models")).json()["data"]
            assert (card["id"], card["max_model_len"]) == ("tiny", 512)
            assert (await setup.client.get("/v1/models/tiny")).json() == card
            paths = (await setup.client.get("/openapi.json")).json()["paths"]
            schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert "messages" in schema["required"]
            assert "$ref" not in json.dumps(schema)
            assert (await setup.client.get("/docs")).status_code == 200
        async with api(show_docs=False) as setup:
            assert (await setup.client.get("/docs")).status_code == 404

    run(test)
