"""Where a round's time goes: traces made by hand, and a real one of a tiny model on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import save_tiny_model

from dspark.bench.cli import main
from dspark.bench.profile import print_parts
from dspark.bench.profile_trace import read_parts
from dspark.errors import ConfigError

Event = dict[str, Any]


def event(cat: str, name: str, ts: float, dur: float, **args: object) -> Event:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def mark(verb: str, ts: float, dur: float) -> Event:
    return event("user_annotation", f"dspark.{verb}", ts, dur)


def launch(correlation: int, ts: float) -> Event:
    return event("cuda_runtime", "cudaGraphLaunch", ts, 1.0, correlation=correlation)


def kernel(correlation: int, name: str, ts: float, dur: float) -> Event:
    return event("kernel", name, ts, dur, correlation=correlation)


def gpu_step(at: float, order: int) -> list[Event]:
    """A step of 100 us: 5 us of planning, a graph of the forward, a judge, and a draft whose kernel outlasts its host work."""
    layers = [("nvjet_hsh_128x64", 10.0), ("attend", 5.0), ("_rms_norm_kernel", 2.0)] * 3
    graph, begin = [], at + 12.0
    for name, dur in [*layers, ("sm90_xmma_gemm_head", 8.0), ("splitKreduce_kernel", 1.0)]:
        graph.append(kernel(order, name, begin, dur))
        begin += dur
    return [
        mark("step", at, 100.0),
        mark("plan", at, 5.0),
        launch(order, at + 10.0),
        *graph,  # ends at 72
        mark("judge", at + 20.0, 60.0),
        launch(order + 1, at + 21.0),
        kernel(order + 1, "_judge_kernel", at + 72.0, 3.0),
        mark("draft", at + 82.0, 10.0),
        launch(order + 2, at + 84.0),
        kernel(order + 2, "nvjet_draft_gemm", at + 85.0, 12.0),
    ]


def test_parts_of_a_gpu_trace() -> None:
    events = gpu_step(1000.0, 10) + gpu_step(1100.0, 20) + [kernel(99, "before_everything", 10.0, 5.0), {"ph": "M", "name": "process_name"}]
    parts = read_parts(events)
    assert (parts.steps, parts.total) == (2, 200.0)
    assert parts.busy == {
        "GEMM": 2 * (30.0 + 1.0),
        "head": 2 * 8.0,
        "attention": 2 * 15.0,
        "norms, rotary, pointwise, copies": 2 * 6.0,
        "judge": 2 * 3.0,
        "draft": 2 * 12.0,
    }
    assert parts.records["GEMM"] == 8
    assert parts.records["head"] == 2
    # A step is idle from 0 to 12, 75 to 85 and 97 to 100.
    assert parts.idle == {
        "idle: planning": 2 * 5.0,
        "idle: other host work of a step": 2 * (7.0 + 2.0 + 3.0),
        "idle: judging's host work": 2 * 5.0,
        "idle: drafting's host work": 2 * 3.0,
    }
    assert sum(parts.busy.values()) + sum(parts.idle.values()) == pytest.approx(parts.total)


def test_work_at_the_same_time_is_not_counted_twice() -> None:
    events = [mark("step", 0.0, 50.0), launch(1, 1.0), kernel(1, "gemm", 10.0, 20.0), launch(2, 2.0), kernel(2, "copy", 20.0, 20.0)]
    parts = read_parts(events)
    assert sum(parts.busy.values()) == pytest.approx(30.0)
    assert sum(parts.idle.values()) == pytest.approx(20.0)


def test_time_between_steps_and_work_that_outlasts_them() -> None:
    events = [mark("step", 0.0, 10.0), mark("step", 30.0, 10.0), launch(1, 35.0), kernel(1, "gemm", 36.0, 10.0)]
    parts = read_parts(events)
    assert parts.total == 46.0
    assert parts.idle == {"idle: other host work of a step": 16.0, "idle: between steps": 20.0}


def test_parts_of_a_cpu_trace() -> None:
    """Products and attention count whole, with what they call; of other operators the innermost."""
    events = [
        mark("step", 0.0, 100.0),
        event("cpu_op", "aten::linear", 10.0, 20.0),
        event("cpu_op", "aten::t", 10.0, 1.0),
        event("cpu_op", "aten::mm", 12.0, 17.0),
        event("cpu_op", "aten::scaled_dot_product_attention", 40.0, 10.0),
        event("cpu_op", "aten::mul", 42.0, 3.0),
        event("cpu_op", "aten::silu", 50.0, 10.0),
        event("cpu_op", "aten::empty", 51.0, 2.0),
        event("cpu_op", "aten::addmm", 70.0, 5.0),
    ]
    parts = read_parts(events)
    assert parts.busy == {"GEMM": 20.0, "attention": 10.0, "norms, rotary, pointwise, copies": 2.0, "head": 5.0}


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no marked step"):
        read_parts([kernel(1, "gemm", 0.0, 1.0)])


def test_the_largest_gap_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "step_ms": 6.5,
        "profiled_step_ms": 7.0,
        "parts_ms": {"GEMM": 5.5, "idle: planning": 1.0, "attention": 0.5},
        "limits_ms": {"GEMM": 5.0, "attention": 0.2},
        "records": {"GEMM": 144.0, "attention": 36.0},
    }
    print_parts(record)
    printed = capsys.readouterr().out
    assert "a step takes 6.500 ms without the profiler, 1.25 x the limit of 5.200 ms" in printed
    assert "largest gap to the limit: idle: planning, 1.000 ms of 1.000 ms a step" in printed


@pytest.mark.parametrize("mode", ["plain", "static:2"])
def test_end_to_end(tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "tiny.jsonl").write_text('{"turns": ["one two one two"]}\n')
    out = tmp_path / "out.jsonl"
    command = ["profile", "--model", str(model), "--drafter", "ngram", "--prompts", str(tmp_path), "--sets", "tiny", "--dtype", "float32"]
    assert main([*command, "--kv-tokens", "4096", "--mode", mode, "--concurrency", "3", "--steps", "4", "--json", str(out)]) == 0
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["rows"] == 3
    assert record["tokens"] == 3 if mode == "plain" else record["tokens"] >= 3
    assert set(record["parts_ms"]) >= {"GEMM", "attention", "head", "judge", "idle: planning"}
    assert record["records"]["head"] == 1
    assert record["records"]["GEMM"] == 8  # two fused layers of four products
    assert sum(record["parts_ms"].values()) == pytest.approx(record["profiled_step_ms"], rel=0.01)
    assert "largest gap to the limit" in capsys.readouterr().out


def test_prompts_must_leave_room(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "tiny.jsonl").write_text('{"turns": ["one"]}\n')
    command = ["profile", "--model", str(model), "--mode", "plain", "--prompts", str(tmp_path), "--sets", "tiny", "--dtype", "float32"]
    with pytest.raises(ConfigError, match="use fewer --steps"):
        main([*command, "--kv-tokens", "4096", "--steps", "600"])
    with pytest.raises(ConfigError, match="raise --kv-tokens"):
        main([*command, "--kv-tokens", "512", "--steps", "4", "--concurrency", "16"])
