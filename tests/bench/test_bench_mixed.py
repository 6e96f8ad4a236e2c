"""Mixed traffic: what arrives, where the knee is, and three servings against each other on scripted servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.scripted_streams import Server, chunk, usage

from dspark.bench.cli import main
from dspark.bench.http_client import Answer, Ask
from dspark.bench.load import Measured
from dspark.bench.metrics import Limits, Timeline
from dspark.bench.mixed import find_knee, ratio_lines, relative_classes
from dspark.bench.traffic import Job, ServiceClass, assign, mix
from dspark.errors import ConfigError, DSparkError

INTERACTIVE = ServiceClass("interactive", Limits(500, 50), 0.5)
ASK = Ask("tiny", 8)


def test_classes_are_read() -> None:
    assert ServiceClass.parse("interactive:ttft_ms=500,tpot_ms=50,share=0.5") == INTERACTIVE
    assert ServiceClass.parse("batch:tpot_ms=200") == ServiceClass("batch", Limits(None, 200), 1.0)
    assert ServiceClass.parse(str(INTERACTIVE)) == INTERACTIVE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one of the two"),
        (":ttft_ms=1", "use NAME"),
        ("a:share=1", "at least one of the two"),
        ("a:ttft=1", "'ttft' must be"),
        ("a:ttft_ms=1,ttft_ms=2", "each once"),
        ("a:ttft_ms=soon", "must be a number, not 'soon'"),
        ("a:tpot_ms=0", "over 0"),
        ("a:tpot_ms=inf", "over 0"),
    ],
)
def test_bad_classes(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServiceClass.parse(text)


def test_a_mix_takes_all_sets_alike() -> None:
    sets = [[f"{name}{i}" for i in range(3)] for name in ("a", "b", "c")]
    prompts = mix(sets, 3000, 7)
    assert prompts == mix(sets, 3000, 7) != mix(sets, 3000, 8)
    assert all(900 < count < 1100 for count in Counter(prompt[0] for prompt in prompts).values())
    assert [prompt for prompt in prompts if prompt[0] == "b"][:5] == ["b0", "b1", "b2", "b0", "b1"]


def test_classes_come_by_their_shares() -> None:
    classes = (ServiceClass("rare", Limits(1), 1.0), ServiceClass("often", Limits(2), 3.0))
    jobs = assign(ASK, ["x"] * 4000, classes, 3, tells_budgets=True)
    assert jobs == assign(ASK, ["x"] * 4000, classes, 3, tells_budgets=True)
    assert 2850 < sum(job.class_name == "often" for job in jobs) < 3150
    assert all((job.ask.service_class, job.ask.budget) == (job.class_name, job.limits) for job in jobs)
    hidden = assign(ASK, ["x"] * 4000, classes, 3, tells_budgets=False)
    assert [(job.class_name, job.limits) for job in hidden] == [(job.class_name, job.limits) for job in jobs]
    assert {job.ask for job in hidden} == {ASK}


@pytest.mark.parametrize("capacity", [0.3, 1.0, 2.7, 9.0])
def test_the_knee_is_found_from_either_side(capacity: float) -> None:
    """Goodput follows the rate up to the capacity and collapses beyond: the answer is the last rate that was kept."""
    asked: list[float] = []

    def goodput(rate: float) -> float:
        asked.append(rate)
        return rate if rate <= capacity else max(0.0, 3 * capacity - 2 * rate)

    assert capacity / 1.25 < find_knee(goodput, 1.0) < capacity * 1.125
    assert len(set(asked)) == len(asked) <= 15


def test_a_search_without_any_goodput_ends() -> None:
    asked: list[float] = []

    def goodput(rate: float) -> float:
        asked.append(rate)
        return 0.0

    assert find_knee(goodput, 1.0) == 1.0
    assert len(asked) <= 14


def test_ratios() -> None:
    shares = {"adaptive+budgets": [0.9, 0.7], "adaptive": [0.5, 0.5], "plain": [0.0, 0.4]}
    assert ratio_lines(2.0, shares) == [
        "goodput at 2/s: adaptive+budgets 1.6/s (80%), adaptive 1/s (50%), plain 0.4/s (20%)",
        "adaptive+budgets / adaptive: 1.60x (turns: 1.80x, 1.40x)",
        "adaptive+budgets / plain: 4.00x (turns: - (nothing met its budgets), 1.75x)",
    ]


def test_budgets_from_a_calm_server() -> None:
    calm = Measured((Job(ASK, "x"),), (Answer(Timeline(0.0, (0.1, 0.5), 11)),), 1.0)
    assert [str(one) for one in relative_classes(calm)] == [
        "interactive:ttft_ms=800,tpot_ms=80,share=1",
        "batch:ttft_ms=4000,tpot_ms=240,share=1",
    ]
    with pytest.raises(DSparkError, match="answered nothing"):
        relative_classes(Measured((Job(ASK, "x"),), (Answer(None, "HTTP 503"),), 1.0))


class Fleet:
    """Scripted servers in the place of ``dspark serve``, each with an event loop of its own."""

    def __init__(self) -> None:
        self.servers: list[tuple[list[str], Server]] = []
        self.refuses = False  # requests that say a budget

    @contextlib.contextmanager
    def running(self, command: Sequence[str], url: str, start_s: float) -> Iterator[None]:
        is_plain = command[command.index("--speculation") + 1] == "off"
        lines = [chunk("a"), *[chunk("b")] * (8 if is_plain else 2), chunk("", "stop"), usage(9), "data: [DONE]"]
        server = Server(lambda prompt: (503 if self.refuses and "latency_budget" in server.bodies[-1] else 200, lines))
        self.servers.append((list(command), server))
        loop = asyncio.new_event_loop()
        listener = loop.run_until_complete(asyncio.start_server(server.serve, "127.0.0.1", int(url.rpartition(":")[2])))
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        yield
        loop.call_soon_threadsafe(listener.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    fleet = Fleet()
    monkeypatch.setattr("dspark.bench.cli.running", fleet.running)
    return fleet


FLAGS = ["mixed", "--model", "tiny", "--drafter", "ngram", "--requests", "12", "--max-tokens", "9", "--server-flags", "--kv-tokens 512"]


def test_three_servings_take_turns(fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal requests for all three, budgets told to one, no cached prefix shared; the faster server wins on a tight TPOT."""
    out = tmp_path / "out.jsonl"
    tight = ["--class", "interactive:ttft_ms=5000,tpot_ms=3.9", "--class", "batch:ttft_ms=5000"]
    assert main([*FLAGS, *tight, "--rates", "40", "--repeats", "2", "--trace", "chat,code", "--json", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    order = [(r["serving"], r["repeat"]) for r in records]
    names = ["adaptive+budgets", "adaptive", "plain"]
    assert order == [(name, 0) for name in names] + [(name, 1) for name in (*names[1:], names[0])]
    assert [r["classes"]["interactive"]["requests"] for r in records[:3]] == [records[0]["classes"]["interactive"]["requests"]] * 3
    (adaptive_command, adaptive), (plain_command, plain) = fleet.servers
    classes = json.dumps({"interactive": {}, "batch": {}})  # a server refuses classes that it does not know
    common = ["--service-classes", classes, "--dtype", "bfloat16", "--kv-tokens", "512"]
    assert adaptive_command[7:] == ["--speculation", "adaptive", "--drafter", "ngram", *common]
    assert plain_command[7:] == ["--speculation", "off", "--drafter", "none", *common]
    assert not any("latency_budget" in body for body in plain.bodies)
    told = [body for body in adaptive.bodies if "latency_budget" in body]
    assert Counter(body["service_class"] for body in told).total() == 24
    assert {body["service_class"] for body in told} == {"interactive", "batch"}
    by_salt: dict[str, list[Any]] = {}
    for body in [*adaptive.bodies, *plain.bodies]:
        by_salt.setdefault(body["cache_salt"], []).append(body["messages"][0]["content"])
    assert sorted(map(len, by_salt.values())) == [8, 8, *[12] * 6]
    turns = [tuple(sorted(prompts)) for prompts in by_salt.values() if len(prompts) == 12]
    assert sorted(Counter(turns).values()) == [3, 3]
    printed = capsys.readouterr().out
    assert "adaptive+budgets / plain: " in printed
    assert records[0]["classes"]["interactive"]["goodput_share"] > records[2]["classes"]["interactive"]["goodput_share"]


@pytest.mark.parametrize("asked", [True, False])
def test_refusals_keep_nothing_and_fail_only_who_did_not_ask_for_them(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: bool
) -> None:
    fleet.refuses = True
    out = tmp_path / "out.jsonl"
    loose = ["--class", "interactive:ttft_ms=5000", *(["--refuse"] if asked else [])]
    assert main([*FLAGS, *loose, "--rates", "40", "--repeats", "1", "--json", str(out)]) == (0 if asked else 1)
    told, *others = (json.loads(line) for line in out.read_text().splitlines())
    assert (told["serving"], told["refuses"], told["goodput_share"], told["errors"]) == ("adaptive+budgets", asked, 0.0, 12)
    assert [(one["goodput_share"], one["errors"]) for one in others] == [(1.0, 0)] * 2
    settings = {"reject_when_late": True} if asked else {}
    assert all(json.dumps({"interactive": settings}) in command for command, _ in fleet.servers)
    assert "12 x HTTP 503" in capsys.readouterr().out


def test_without_rates_the_knee_is_searched(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Budgets come from the calm plain server, the rate from its knee."""
    monkeypatch.setattr("dspark.bench.mixed.find_knee", lambda goodput, start: start * (1 + (goodput(start) > 0)))
    assert main([*FLAGS, "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert [line.partition(":")[0] for line in printed.splitlines()[:2]] == ["--class interactive", "--class batch"]
    assert printed.count("plain, search") == 2
    assert "knee: goodput of plain is highest at" in printed
