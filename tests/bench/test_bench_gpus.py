"""Several devices in one call: gloo between CPU processes stands for NCCL between GPUs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import save_tiny_drafter, save_tiny_model

from dspark.bench.cli import main
from dspark.bench.gpu_child import Child
from dspark.bench.prompt_sets import DEFAULT_FOLDER
from dspark.bench.several_gpus import PARTS, GpusPlan, Part, devices, run_gpus
from dspark.bench.tables import Column
from dspark.errors import ConfigError, DSparkError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_len=2048)


def plan(*parts: str, **changes: Any) -> GpusPlan:
    values: dict[str, Any] = {
        "kind": "cpu",
        "count": 2,
        "parts": parts,
        "model": None,
        "drafter": "none",
        "speculation": "static:3",
        "dtype": "float32",
        "streams": (2,),
        "tokens": 8,
        "requests": 4,
        "kv_tokens": 64,
        "repeats": 1,
        "prompts": DEFAULT_FOLDER,
        "sets": ("chat",),
        "threads": 1,
        "sizes": (1 << 16, 1 << 20),
    }
    return GpusPlan(**(values | changes))


def records(made: GpusPlan) -> tuple[int, list[dict[str, Any]]]:
    out = io.StringIO()
    failed = run_gpus(made, out)
    return failed, [json.loads(line) for line in out.getvalue().splitlines()]


def test_bytes_and_kv_go_between_two_processes(model: Path) -> None:
    failed, found = records(plan("transport", "kv", model=str(model)))
    assert failed == 0
    assert [record["part"] for record in found] == ["transport", "transport", "kv", "kv"]
    assert [record.get("size_bytes") for record in found[:2]] == [1 << 16, 1 << 20]
    assert all(record["gb_per_s"] > 0 and record["backend"] == "gloo on CPUs" for record in found)
    grpc, collective = found[2:]
    assert (grpc["transport"], collective["transport"]) == ("grpc", "collective")
    assert grpc["bytes"] == collective["bytes"] == 64 * 2 * 2 * 2 * 16 * 4, "tokens, layers, keys and values, heads, their size, bytes"


def test_a_part_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(_: GpusPlan) -> Iterator[dict[str, Any]]:
        yield {"n": 1}
        raise DSparkError("no memory")

    def works(_: GpusPlan) -> Iterator[dict[str, Any]]:
        yield {"n": 2}
        yield {"what": "4 ranks", "skipped": "needs 4 devices"}

    for name, run in (("kv", breaks), ("transport", works)):
        monkeypatch.setitem(PARTS, name, Part(name, run, (Column("n", 3),), lambda record: (record["n"],)))  # type: ignore[misc]
    failed, found = records(plan("kv", "transport"))
    assert failed == 1
    assert [(record["part"], record.get("n"), record.get("failed"), record.get("skipped")) for record in found] == [
        ("kv", 1, None, None),
        ("kv", None, "no memory", None),
        ("transport", 2, None, None),
        ("transport", None, None, "needs 4 devices"),
    ]
    said = capsys.readouterr().out
    assert "FAILED: no memory" in said
    assert "4 ranks: not run: needs 4 devices" in said
    assert said.endswith("failed: kv\n")


def test_one_device_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    failed, found = records(plan("transport", "kv", count=1))
    assert failed == 0
    assert [record["skipped"] for record in found] == ["needs 2 devices"] * 2
    assert capsys.readouterr().out.count("not run: needs 2 devices") == 2


def test_parts_and_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="--parts: magic is none of transport, tensor, experts, kv, drafting"):
        main(["gpus", "--devices", "cpu", "--parts", "magic"])
    assert devices("cpu", None) == ("cpu", 2)
    assert devices("cpu", 4) == ("cpu", 4)
    assert set(PARTS) == {"transport", "tensor", "experts", "kv", "drafting"}


def test_a_process_that_ends_is_an_error() -> None:
    with Child("no such job") as child, pytest.raises(DSparkError, match="KeyError"):
        child.hear()
    with Child("pair", rank=0, store="127.0.0.1:1", device="cpu", sizes=[], repeats=1) as child:
        child._process.kill()
        with pytest.raises(DSparkError, match="ended with exit code -9"):
            child.hear()


@pytest.mark.slow
def test_a_model_that_cannot_be_split_is_named(model: Path) -> None:
    """It has 4 heads."""
    failed, found = records(plan("tensor", model=str(model), count=8))
    assert failed == 0
    assert [record["tensor_parallel"] for record in found] == [1, 2, 4, 8]
    assert "8 does not divide its 4 attention heads" in found[3]["skipped"]
    for record in found[:3]:
        assert record["agreement"] == 1.0
        assert record["forced_tokens"] == 8 * 8


@pytest.mark.slow
def test_all_parts_run_from_the_command_line(model: Path, tmp_path: Path) -> None:
    drafter, out = save_tiny_drafter(model, tmp_path / "drafter"), tmp_path / "out.jsonl"
    small = ["--devices", "cpu", "--ranks", "2", "--dtype", "float32", "--concurrency", "2", "--max-tokens", "8", "--requests", "4"]
    small += ["--repeats", "1", "--kv-request", "64", "--threads", "1", "--sets", "chat", "--speculation", "static:3", "--json", str(out)]
    command = [sys.executable, "-m", "dspark", "bench", "gpus", *small, "--model", str(model), "--drafter", str(drafter)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["part"] for record in found} == set(PARTS)
    parts = {name: [record for record in found if record["part"] == name and "skipped" not in record] for name in PARTS}
    assert [record["expert_parallel"] for record in parts["experts"]] == [1, 2]
    assert all(record["agreement"] == 1.0 for record in parts["experts"] + parts["tensor"])
    assert sorted((record["topology"], record["num_devices"], record["streams"]) for record in parts["drafting"]) == [
        ("colocated", 1, 2),
        ("colocated", 2, 4),
        ("disaggregated", 2, 4),
    ]
    for record in parts["drafting"]:
        assert record["tokens_per_s_per_device"] == pytest.approx(record["tokens_per_s"] / record["num_devices"])
        assert record["tpot_p50_ms"] > 0
        if record["topology"] == "colocated":  # a draft worker may be late on a busy machine
            assert record["accepted_length"] is not None, "drafts were verified"
