"""``dspark bench router``: real decisions over made-up replicas, no measurement worth reading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark.bench import router
from dspark.bench.cli import main


@pytest.mark.parametrize("replicas", [3, 200])
def test_every_case_is_measured(replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(router, "NUM_ASKS", 300)
    out = tmp_path / "out.jsonl"
    assert main(["router", "--replicas", str(replicas), "--seconds", "0.01", "--repeats", "2", "--json", str(out)]) == 0
    records = {record["case"]: record for record in map(json.loads, out.read_text().splitlines())}
    printed = capsys.readouterr().out
    assert all(name in printed for name in records)
    assert len(records) == 5
    assert all(record["decisions_per_s"] > 0 and len(record["rates"]) == 2 for record in records.values())
    if replicas == 3:
        assert {record["views_read"] for record in records.values()} == {3.0}
    else:
        assert records["load only"]["views_read"] < records["budgets and prefixes"]["views_read"] < 6
        assert records["and no replica keeps the budget"]["views_read"] > 32
