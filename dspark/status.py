"""``dspark status``: what a running cluster says of itself over HTTP (``GET /status``), as tables or as JSON. Needs no Ray."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from dspark.errors import ConfigError

TIMEOUT_S: Final = 10.0
RED, BOLD, PLAIN, CLEAR = "\033[31m", "\033[1m", "\033[0m", "\033[H\033[2J"
INACTIVE: Final = "requested but inactive"

VERIFIER_COLUMNS: Final = (
    *("verifier", "state", "ranks", "running", "waiting", "KV used"),
    *("tok/s", "tok/round", "accepted", "kept", "TPOT", "speculation"),
)

Table = Sequence[tuple[str, ...]]


def local_url(host: str, port: int) -> str:
    """Where a server of this machine is found that binds to ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def fetch(url: str, api_key: str | None) -> dict[str, Any]:
    """What the server at ``url`` says; ConfigError with what to do when it says nothing, or is no server of ours."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url} is not an address like http://127.0.0.1:8000")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=TIMEOUT_S)
    path = parts.path.rstrip("/").removesuffix("/v1") + "/status"
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
        response = connection.getresponse()
        status, body = response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        hint = "start one with dspark serve, or name another with --url or DSPARK_PORT"
        raise ConfigError(f"no server answers at {url} ({error}); {hint}") from error
    finally:
        connection.close()
    if status == 401:
        raise ConfigError(f"the server at {url} wants an API key: --api-key-file FILE or DSPARK_API_KEY")
    try:
        answer = json.loads(body) if status == 200 else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or "verifiers" not in answer:
        raise ConfigError(f"what answers at {url} is no DSpark server with GET /status (it says {status})")
    return answer


def show(url: str, api_key: str | None, as_json: bool) -> int:
    """Print the status once."""
    answer = fetch(url, api_key)
    print(json.dumps(answer, indent=2, ensure_ascii=False) if as_json else render(answer, None, 0.0, has_color(sys.stdout)))
    return 0


def watch(url: str, api_key: str | None, as_json: bool, interval_s: float) -> int:
    """Print it again and again until Ctrl-C: over itself on a terminal, else one after the other (JSON: a line each)."""
    before: dict[str, Any] | None = None
    before_s = 0.0
    while True:
        answer, now_s = fetch(url, api_key), time.monotonic()
        if as_json:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
        else:
            start = CLEAR if sys.stdout.isatty() else ""
            print(start + render(answer, before, now_s - before_s, has_color(sys.stdout)), flush=True)
        before, before_s = answer, now_s
        time.sleep(interval_s)


def has_color(stream: Any) -> bool:
    """Whether colours are wanted: on a terminal, unless NO_COLOR is set."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR")


def render(answer: Mapping[str, Any], before: Mapping[str, Any] | None, seconds: float, color: bool) -> str:
    """The status for people. With ``before``, a status of ``seconds`` ago, verifiers show their tokens a second."""
    paint = _paint if color else _leave
    lines = [paint(f"{answer['model']}: {answer['status']}", BOLD if answer["status"] == "ok" else RED)]
    routers = answer["routers"]
    lines.append(f"DSpark {answer['version']}, {_count(routers['count'], 'router')}, {routers['in_flight']} in flight")
    lines += ["", *_table(_verifier_rows(answer["verifiers"], before, seconds), paint)]
    if answer.get("draft_workers"):
        lines += ["", *_table(_draft_worker_rows(answer["draft_workers"]), paint)]
    if answer["service_classes"]:
        lines += ["", *_table(_class_rows(answer["service_classes"]), paint)]
    if answer["scaling"] is not None:
        scaling = answer["scaling"]
        limit = f", speculation limited to {scaling['speculation_limit']:.0%}" if scaling["speculation_limit"] < 1 else ""
        lines += ["", f"scaling: {scaling['state']}, {_count(scaling['wanted_verifiers'], 'verifier')} wanted{limit}; {scaling['reason']}"]
    return "\n".join(lines)


def _verifier_rows(verifiers: Sequence[Mapping[str, Any]], before: Mapping[str, Any] | None, seconds: float) -> Table:
    earlier = {entry["id"]: entry for entry in before["verifiers"]} if before is not None else {}
    rows: list[tuple[str, ...]] = [VERIFIER_COLUMNS]
    for entry in verifiers:
        requests, kv, speculation = entry["requests"], entry["kv"], entry["speculation"]
        last = earlier.get(entry["id"])
        rate = (entry["generated_tokens"] - last["generated_tokens"]) / seconds if last is not None and seconds > 0 else None
        rows.append(
            (
                entry["id"],
                entry["state"],
                str(_ranks(entry["settings"])),
                f"{requests['running']}/{requests['places']}",
                str(requests["waiting"]),
                _percent(1.0 - kv["free_blocks"] / kv["blocks"] if kv["blocks"] else None),
                "-" if rate is None else f"{rate:.0f}",
                f"{entry['tokens_per_round']:.2f}",
                _percent(entry["acceptance"]["rate"]),
                _percent(entry["budgets"]["share"]),
                "-" if entry["predicted"] is None else f"{entry['predicted']['tpot_ms']:.1f} ms",
                _speculation(speculation),
            )
        )
    return rows


def _ranks(settings: Mapping[str, Any]) -> int:
    return int(settings.get("tensor_parallel", 1)) * int(settings.get("expert_parallel", 1))


def _speculation(speculation: Mapping[str, Any]) -> str:
    if speculation["state"] == "inactive":
        return INACTIVE
    return str(speculation["state"]) + (f" at {speculation['limit']:.0%}" if speculation["limit"] < 1 else "")


def _draft_worker_rows(workers: Sequence[Mapping[str, Any]]) -> Table:
    rows = [("draft worker", "state", "verifiers", "requests", "KV used", "busy")]
    for entry in workers:
        used = 1.0 - entry["free_blocks"] / entry["blocks"] if entry["blocks"] else None
        rows.append((entry["id"], entry["state"], str(entry["verifiers"]), str(entry["requests"]), _percent(used), _percent(entry["busy"])))
    return rows


def _class_rows(classes: Sequence[Mapping[str, Any]]) -> Table:
    rows = [("service class", "TTFT budget", "kept", "TPOT budget", "kept", "all kept", "refused as late")]
    for entry in classes:
        name = (entry["name"] or "(none)") + (" (default)" if entry["is_default"] else "")
        ttft, tpot = _percent(entry["ttft"]["share"]), _percent(entry["tpot"]["share"])
        refused, good = str(entry["late_rejections"]), str(entry["goodput_requests"])
        rows.append((name, _ms(entry["ttft_ms"]), ttft, _ms(entry["tpot_ms"]), tpot, good, refused))
    return rows


def _table(rows: Table, paint: Any) -> list[str]:
    """Columns of equal width; what is wrong is red."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        if number:
            cells = [paint(cell, RED) if cell.strip() in (INACTIVE, "no progress", "lost") else cell for cell in cells]
        line = "  ".join(cells).rstrip()
        lines.append(paint(line, BOLD) if number == 0 else line)
    return lines


def _paint(text: str, code: str) -> str:
    return f"{code}{text}{PLAIN}"


def _leave(text: str, code: str) -> str:
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:g} ms"
