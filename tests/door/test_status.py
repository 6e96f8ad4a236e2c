"""``dspark status`` against a server of a few lines: what is printed, what is said when nothing answers."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dspark import status
from dspark.cli import main
from dspark.status import INACTIVE, RED, local_url, render

ANSWER: dict[str, Any] = {
    "status": "ok",
    "model": "tiny",
    "version": "0.1.0",
    "max_model_len": 512,
    "routers": {"count": 2, "in_flight": 7},
    "verifiers": [
        {
            "id": "v0",
            "address": "127.0.0.1:1",
            "state": "ok",
            "age_s": 0.1,
            "settings": {"tensor_parallel": 2, "expert_parallel": 2},
            "requests": {"running": 3, "waiting": 1, "places": 8, "queued_tokens": 90},
            "kv": {"blocks": 200, "free_blocks": 150},
            "generated_tokens": 1000,
            "tokens_per_round": 2.25,
            "acceptance": {"rate": 0.5, "length": 2.5},
            "speculation": {"state": "active", "limit": 0.5},
            "budgets": {"met": 97, "missed": 3, "share": 0.97},
            "predicted": {"ttft_ms": 80.0, "tpot_ms": 12.5},
        },
        {
            "id": "v1",
            "address": "127.0.0.1:2",
            "state": "no progress",
            "age_s": 0.1,
            "settings": {},
            "requests": {"running": 0, "waiting": 0, "places": 8, "queued_tokens": 0},
            "kv": {"blocks": 200, "free_blocks": 200},
            "generated_tokens": 0,
            "tokens_per_round": 1.0,
            "acceptance": {"rate": None, "length": None},
            "speculation": {"state": "inactive", "limit": 1.0},
            "budgets": {"met": 0, "missed": 0, "share": None},
            "predicted": None,
        },
    ],
    "draft_workers": [{"id": "d0", "state": "ready", "verifiers": 2, "requests": 4, "blocks": 100, "free_blocks": 40, "busy": 0.3}],
    "scaling": {"state": "steady", "wanted_verifiers": 2, "speculation_limit": 0.5, "budgets_met": 0.97, "reason": "all is well"},
    "service_classes": [
        {
            "name": "chat",
            "is_default": True,
            "ttft_ms": 500.0,
            "tpot_ms": None,
            "ttft": {"met": 9, "missed": 1, "share": 0.9},
            "tpot": {"met": 0, "missed": 0, "share": None},
            "goodput_requests": 9,
            "late_rejections": 2,
        }
    ],
}


class Handler(BaseHTTPRequestHandler):
    key: str | None = None
    answer: Any = ANSWER
    paths: list[str] = []  # noqa: RUF012 - set anew by the fixture

    def do_GET(self) -> None:
        self.paths.append(self.path)
        allowed = self.key is None or self.headers.get("authorization") == f"Bearer {self.key}"
        body = json.dumps(self.answer).encode() if allowed and self.path == "/status" else b"{}"
        self.send_response(200 if allowed and self.path == "/status" else 404 if allowed else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(Handler, "paths", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def words(line: str) -> list[str]:
    return line.split()


def test_tables_show_load_kv_acceptance_budgets_and_speculation(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--port", str(port)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny: ok"
    assert "2 routers, 7 in flight" in lines[1]
    rows = {words(line)[0]: words(line) for line in lines if line}
    assert rows["v0"] == ["v0", "ok", "4", "3/8", "1", "25%", "-", "2.25", "50%", "97%", "12.5", "ms", "active", "at", "50%"]
    assert rows["v1"][-3:] == INACTIVE.split()
    assert rows["d0"] == ["d0", "ready", "2", "4", "60%", "30%"]
    assert rows["chat"] == ["chat", "(default)", "500", "ms", "90%", "-", "-", "9", "2"]
    assert lines[-1] == "scaling: steady, 2 verifiers wanted, speculation limited to 50%; all is well"
    assert "\033" not in "".join(lines), "no colours in a pipe"


def test_json_is_the_servers_own(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", f"127.0.0.1:{port}/v1/", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ANSWER
    assert Handler.paths == ["/status"]


def test_what_is_wrong_is_red_on_a_terminal() -> None:
    text = render(ANSWER, None, 0.0, True)
    for wrong in (INACTIVE, "no progress"):
        assert f"{RED}{wrong}" in text
    assert text.count(RED) == 2
    draining = copy.deepcopy(ANSWER) | {"status": "draining", "verifiers": [], "draft_workers": [], "scaling": None, "service_classes": []}
    assert render(draining, None, 0.0, True).startswith(f"{RED}tiny: draining")


def test_watching_shows_tokens_a_second(port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    looks = iter([None, None])

    def sleep(seconds: float) -> None:
        later = copy.deepcopy(ANSWER)
        later["verifiers"][0]["generated_tokens"] = 1_000_000_000
        monkeypatch.setattr(Handler, "answer", later)
        try:
            next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert main(["status", "--port", str(port), "--watch"]) == 130
    shown = [words(line)[6] for line in capsys.readouterr().out.splitlines() if line.startswith("v0")]
    assert shown[0] == "-"
    assert int(shown[1]) > 1_000_000
    assert shown[2] == "0"


def test_the_key_comes_from_the_usual_places(port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Handler, "key", "secret")
    assert main(["status", "--port", str(port)]) == 2
    assert "wants an API key" in capsys.readouterr().err
    monkeypatch.setenv("DSPARK_API_KEY", "secret")
    monkeypatch.setenv("DSPARK_PORT", str(port))
    assert main(["status"]) == 0


def test_nothing_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--port", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no server answers at http://127.0.0.1:1")
    assert "dspark serve" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("answer", [[], {}, "x"])
def test_another_server_answers(port: int, answer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Handler, "answer", answer)
    assert main(["status", "--port", str(port)]) == 2
    assert "no DSpark server" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://x", "http://", "://"])
def test_bad_addresses(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", url]) == 2
    assert "is not an address" in capsys.readouterr().err


def test_addresses_of_this_machine() -> None:
    assert local_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert local_url("::", 80) == "http://[::1]:80"
    assert local_url("node", 80) == "http://node:80"
