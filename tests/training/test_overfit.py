"""The whole way: a tiny target's answers are learnt by heart, and the serving engine accepts nearly every draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.training_runs import BLOCK, NUM_ANSWERS, make_run, request, run_config

from dspark.training.evaluate import acceptance
from dspark.training.served import drafting_engine, run_requests
from dspark.training.target import load_target
from dspark.training.trainer import train

HELD_OUT = 1
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {"num_layers": 2, "head": "vanilla"},
    "gated": {"num_layers": 2, "head": "gated"},
    "rnn": {"num_layers": 2, "head": "rnn"},
    "dflash": {"num_layers": 2, "kind": "dflash"},
    "eagle3": {"kind": "eagle3"},
    "eagle3-small": {"kind": "eagle3", "draft_vocab_size": 200},
}
SLOW = ("gated", "rnn", "eagle3-small")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("overfit"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in KINDS])
def test_learnt_answers_are_accepted_by_the_engine(folder: Path, name: str) -> None:
    config = run_config(folder, name, KINDS[name], max_steps=150 if "eagle3" in name else 80)
    assert train(config, lambda _: None)
    target, tokenizer = load_target(config)
    engine = drafting_engine(target, tokenizer, str(config.drafter_folder), NUM_ANSWERS)
    records = run_requests(engine, [request(i) for i in range(NUM_ANSWERS)])
    lengths = sorted(acceptance([record], BLOCK)[0] for record in records)[HELD_OUT:]
    assert sum(lengths) / len(lengths) > 0.95 * (BLOCK + 1)
