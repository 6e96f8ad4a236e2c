"""Bad input over the wire: each is refused for what it is, and the server goes on."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from helpers.servers import Server

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "unknown"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "emperor", "content": "x"}]}, 400, "messages[0].role"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 10**40}, 400, "max_tokens"),
        ({"top_p": 1e308}, 400, "top_p"),
        ({"stop": {"a": 1}}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"n": 1000}, 400, "n"),
        ({"logit_bias": {"999999": 5}}, 400, "logit_bias"),
    ],
)
def test_fields(server: Server, change: dict[str, Any], status: int, param: str) -> None:
    assert refused(server.post("/v1/chat/completions", CHAT | change), status)["param"] == param


def test_a_prompt_over_the_context_names_both_lengths(server: Server) -> None:
    error = refused(server.post("/v1/completions", {"model": "tiny", "prompt": "x" * 3000}), 400)
    assert "3000" in error["message"]
    assert "2047" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_token_ids_outside_the_vocabulary(server: Server) -> None:
    for tokens in ([5, 70_000], [-3], [2**50]):
        assert refused(server.post("/v1/completions", {"model": "tiny", "prompt": tokens}), 400)["param"] == "prompt"


@pytest.mark.parametrize("raw", [b'{"model": "tiny", "messages": "\xff\xfe"}', b'{"model": ', b"\x00\x01", b""])
def test_bodies_that_are_not_json(server: Server, raw: bytes) -> None:
    refused(server.post("/v1/chat/completions", content=raw), 400)


def test_a_ten_megabyte_body(server: Server) -> None:
    body = b'{"model": "tiny", "prompt": "' + b"x" * 10_000_000 + b'"}'
    assert refused(server.post("/v1/completions", content=body), 413)["code"] == "body_too_large"


def test_unknown_fields_are_ignored(server: Server) -> None:
    assert server.post("/v1/chat/completions", CHAT | {"from_the_future": {"a": [1]}}).status_code == 200


def test_unknown_routes(server: Server) -> None:
    refused(httpx.get(f"{server.url}/v1/nothing"), 404)
    refused(httpx.get(f"{server.url}/v1/completions"), 405)


def test_request_ids_are_echoed_or_made(server: Server) -> None:
    def sent(value: str) -> str:
        return server.post("/v1/chat/completions", CHAT, headers={"x-request-id": value}).headers["x-request-id"]

    assert sent("mine-1") == "mine-1"
    assert sent("bad id <>") != "bad id <>"
    assert len(sent("y" * 500)) < 128
