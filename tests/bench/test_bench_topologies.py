"""Arrangements of processes, and what is made of their counters; cohorts and their trace."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspark.bench.cli import main
from dspark.bench.http_client import Answer, Ask
from dspark.bench.load import Measured
from dspark.bench.metrics import Timeline
from dspark.bench.round_trace import RoundTrace, Span
from dspark.bench.topologies import GENERATED, WAITED, WIRE_BYTES, Topology, Turn, arrange, sum_counters, summarize_turns
from dspark.bench.traffic import Job
from dspark.errors import ConfigError


def test_all_arrangements_have_as_many_processes() -> None:
    topologies = arrange(4, 1, "auto", "adaptive")
    assert [(topology.name, topology.num_processes, str(topology)) for topology in topologies] == [
        ("colocated", 4, "4"),
        ("disaggregated", 4, "3 + 1"),
        ("plain", 4, "4"),
    ]
    flags = " ".join(topologies[1].settings)
    assert "--num-verifiers 3 --topology disaggregated --num-draft-workers 1" in flags
    for processes, workers in ((1, 1), (2, 2)):
        with pytest.raises(ConfigError, match="leaves 0 verifiers"):
            arrange(processes, workers, "auto", "adaptive")


def measured(tokens: int, seconds: float) -> Measured:
    timeline = Timeline(0.0, (0.5, seconds), tokens)
    return Measured((Job(Ask("m", 1), "p"),), (Answer(timeline=timeline),), seconds)


def test_figures_are_medians_and_per_process_and_per_token() -> None:
    grown = {WIRE_BYTES[0]: 900.0, WIRE_BYTES[1]: 100.0, WAITED: 0.5, GENERATED: 100.0}
    turns = [Turn(measured(count, 2.0), grown) for count in (100, 300, 200)]
    record = summarize_turns(Topology("disaggregated", 3, 1, ()), turns)
    assert record["tokens_per_s"] == 100.0
    assert record["tokens_per_s_per_process"] == 25.0
    assert record["wire_bytes_per_token"] == 10.0
    assert record["draft_wait_ms_per_token"] == 5.0
    plain = summarize_turns(Topology("plain", 2, 0, ()), [Turn(measured(100, 2.0), {GENERATED: 100.0})])
    assert (plain["wire_bytes_per_token"], plain["draft_wait_ms_per_token"]) == (None, None)


def test_counters_are_summed_over_verifiers() -> None:
    text = '# HELP a_total x\na_total{replica="1"} 2.0\na_total{replica="2"} 3.5\nb_total 1\naa_total 9\n'
    assert sum_counters(text, ("a_total", "b_total", "c_total")) == {"a_total": 5.5, "b_total": 1.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare-topologies", "--rate", "2"], "--rate cannot be used with --compare-topologies"),
        (["--compare-topologies", "--url", "http://x"], "starts its own"),
        (["--compare-in-process", "--processes", "2"], "--processes cannot be used with --compare-in-process"),
        (["--url", "http://x", "--draft-workers", "1"], "--draft-workers can only be used with"),
    ],
)
def test_flags_of_other_kinds_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["online", *flags])


def step(begin: float, drafted: float, judged: float) -> tuple[Any, Any]:
    plan = SimpleNamespace(rows=[SimpleNamespace(request_id="a")], num_tokens=5)
    return plan, SimpleNamespace(begin_s=begin, drafted_s=drafted, judged_s=judged)


def test_a_trace_shows_what_lies_under_what(tmp_path: Path) -> None:
    engine = SimpleNamespace(on_step=None, drafter=SimpleNamespace(on_round=None))
    trace = RoundTrace()
    trace.attach(engine)
    engine.on_step(*step(10.0, 10.0, 14.0))
    engine.on_step(*step(14.0, 15.0, 17.0))
    engine.drafter.on_round(SimpleNamespace(worker_id="w", num_drafting=2, sent_s=12.0, answered_s=15.5, worker_s=3.0))
    engine.drafter.on_round(SimpleNamespace(worker_id="w", num_drafting=0, sent_s=16.0, answered_s=17.0, worker_s=1.0))
    trace.detach(engine)
    assert engine.on_step is engine.drafter.on_round is None
    assert Span("draft worker w", "draft", 12.5, 15.5, {"requests": 2}) in trace.spans
    assert trace.hidden_share() == pytest.approx((1.5 + 0.5) / 3.0)
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    drawn = [(event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert drawn == [
        ("verify", 0.0, 4e6),
        ("wait for drafts", 4e6, 1e6),
        ("verify", 5e6, 2e6),
        ("round", 2e6, 3.5e6),
        ("draft", 2.5e6, 3e6),
        ("round", 6e6, 1e6),
    ]
    assert len({event["tid"] for event in events if event["ph"] == "X"}) == 3
    assert RoundTrace().hidden_share() == 0.0


@pytest.mark.slow
def test_cohorts_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model and its drafter, in two processes."""
    arguments = ["--sets", "chat", "--concurrency", "4", "--max-tokens", "12", "--repeats", "1", "--dtype", "float32"]
    outputs = ["--trace", str(tmp_path / "trace.json"), "--json", str(tmp_path / "out.jsonl")]
    assert main(["cohorts", *arguments, *outputs]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["mode"] for record in records] == ["plain", "together", "cohorts", "auto"]
    by_mode = {record["mode"]: record for record in records}
    assert by_mode["plain"]["waited_ms_per_token"] == 0
    assert by_mode["cohorts"]["hidden_share"] > by_mode["together"]["hidden_share"]
    assert by_mode["together"]["bytes_per_token"] > 576 * 4
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"verify", "draft", "round"} <= names
    assert "cohorts" in capsys.readouterr().out
