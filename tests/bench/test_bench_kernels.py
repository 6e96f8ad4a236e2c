"""`dspark bench kernels` without a GPU: references at small shapes, labelled so; and what a line says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark.bench.cli import main
from dspark.bench.kernel_cases import SMALL, Maker, all_cases
from dspark.bench.kernel_time import COLUMNS, KernelRecord, PlainTimer, show
from dspark.bench.tables import Table
from dspark.errors import ConfigError

CPU = Maker(torch.device("cpu"), torch.float32)
KERNELS = {
    "attention",
    "gather_taps",
    "judge_chains",
    "kv_store",
    "draft_rows",
    "edit_logits",
    "best_of_groups",
    "markov_sample",
    "pack_blocks",
    "rms_norm + residual",
    "rotary + head norms",
    "rotary + kv_store",
    "sample",
    "small_linear",
    "swiglu",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU prints")
def test_every_kernel_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.jsonl"
    assert main(["kernels", "--repeats", "2", "--json", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["kernel"] for record in records} == KERNELS
    assert all(record["ours_us"] is None and record["reference_us"] > 0 for record in records)
    shown = capsys.readouterr().out
    assert "references only, at small shapes" in shown
    assert len(shown.splitlines()) == len(records) + 5
    assert main(["kernels", "--repeats", "1", "--kernels", "swi,kv_"]) == 0
    assert "rms_norm" not in capsys.readouterr().out


def test_torchs_own_is_equivalent() -> None:
    """Where both are deterministic: a ratio between different things would say nothing."""
    compared = 0
    for case in all_cases(CPU, SMALL):
        calls = case.make(3)
        if calls.own is None or (case.kernel == "sample" and "greedy" not in case.shape) or case.kernel in ("pack_blocks", "small_linear"):
            continue
        own: Any = calls.own()
        reference: Any = calls.reference()
        if case.kernel == "attention":
            own = own.transpose(1, 2).reshape(reference.shape)
        torch.testing.assert_close(own, reference[0] if isinstance(reference, tuple) else reference, atol=1e-5, rtol=1e-5)
        compared += 1
    assert compared >= 8


def test_a_line_says_how_near_the_ceiling_is(capsys: pytest.CaptureFixture[str]) -> None:
    record = KernelRecord("k", "s", 10.0, 30.0, 20.0, 10_000_000, 0, 2e12, 1e15, "m", "c")
    show(Table(COLUMNS), record)
    cells = capsys.readouterr().out.splitlines()[-1].split()
    assert cells == ["k", "s", "10.00", "1,000", "-", "50.00", "3.00", "2.00"]
    show(Table(COLUMNS), KernelRecord("k", "s", 10.0, 30.0, None, 1, 4_000_000_000, 2e12, 1e15, "m", "c"))
    assert capsys.readouterr().out.splitlines()[-1].split()[4:] == ["400", "40.00", "3.00", "-"]


def test_a_case_that_fails_is_named_and_the_others_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(gate_up: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("dspark.kernels.swiglu.reference", fail)
    assert main(["kernels", "--repeats", "1", "--kernels", "swiglu,gather"]) == 1
    shown = capsys.readouterr().out
    assert "swiglu, 1 x 96: OutOfMemoryError: no room" in shown
    assert "gather_taps" in shown


def test_inputs_take_turns_and_the_first_turn_does_not_count() -> None:
    seen: list[int] = []
    PlainTimer(4).seconds([lambda: seen.append(0), lambda: seen.append(1)])
    assert seen == [0, 1, 0, 1, 0, 1]


def test_no_kernel_of_that_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--kernels"):
        main(["kernels", "--kernels", "attn"])
