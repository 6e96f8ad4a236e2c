"""Acceptance by width of the draft law: against laws written out in full, and never falling with the width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.training_runs import BLOCK, make_run, prompt_of, run_config

from dspark.errors import ConfigError
from dspark.training import widths as room
from dspark.training.shards import Sample, read_corpus, write_shard
from dspark.training.trainer import train
from dspark.training.widths import measure_widths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its samples are the tiny target's greedy answers; they pass for sampled ones."""
    out = make_run(tmp_path_factory.mktemp("widths"))
    corpus = read_corpus(out / "data")
    rows = [corpus.sample(i).tolist() for i in range(len(corpus))]
    samples = [Sample(row[: len(prompt_of(i))], row[len(prompt_of(i)) :], 1.0, i) for i, row in enumerate(rows)]
    write_shard(out / "sampled", 0, samples, 2**16)
    return out


@pytest.mark.parametrize("size", [None, 264])
@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_wider_laws_are_accepted_more(folder: Path, kind: str, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "WIDTHS", (1, 2, 8, 64))
    drafter = {"kind": kind, "draft_vocab_size": size}
    config = run_config(folder, f"{kind}-{size}", drafter, max_steps=25, held_out=3).model_copy(update={"data_folder": folder / "sampled"})
    assert train(config, lambda _: None)
    said: list[str] = []
    rows = measure_widths(config, said.append)
    assert [row["width"] for row in rows] == [1, 2, 8, 64, size or 265]
    assert json.loads((config.out / room.RESULTS).read_text()) == rows
    assert said[-1].count("\n") == 6
    metrics = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["acceptance_length"] == pytest.approx(metrics[-1]["held_out"]["acceptance_length"], rel=0.02), "as training measures"
    means = [sum(row["overlap"]) for row in rows]
    assert means[0] < means[2] < means[4]
    assert all(len(row["overlap"]) == BLOCK and row["num_blocks"] == rows[0]["num_blocks"] for row in rows)


def test_overlap_by_hand() -> None:
    law = room._target_law(torch.tensor([[1.0, 0.0]]), room.TargetHead(torch.eye(2), torch.eye(2), 2, 2, 1, "x"))
    assert law.tolist()[0] == pytest.approx([0.7311, 0.2689], abs=1e-4)


def test_greedy_answers_say_nothing_of_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no held-out answer was sampled"):
        measure_widths(run_config(folder, "greedy"), lambda _: None)
