"""The whole way: a tiny target's answers are learnt by heart, and the serving engine accepts nearly every draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_model import save_tiny_model

from dspark.sampling import SamplingParams
from dspark.training.config import TrainConfig
from dspark.training.evaluate import acceptance
from dspark.training.served import drafting_engine, run_requests
from dspark.training.shards import Sample, check_manifest, read_corpus, write_shard
from dspark.training.target import load_target
from dspark.training.trainer import train
from dspark.types import Request

BLOCK = 4
ANSWER = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target, and its greedy answers to eight prompts as training data."""
    out = tmp_path_factory.mktemp("overfit")
    save_tiny_model(out / "model")
    config = make_config(out, "data-only")
    target, tokenizer = load_target(config)
    engine = drafting_engine(target, tokenizer, "none", 8)
    requests = [request(i) for i in range(8)]
    answers = run_requests(engine, requests)
    samples = [Sample(one.prompt_token_ids, answer.tokens, 0.0, i) for i, (one, answer) in enumerate(zip(requests, answers, strict=True))]
    write_shard(out / "data", 0, samples, target.vocab_size)
    check_manifest(out / "data", {})
    return out


def request(number: int) -> Request:
    draws = torch.Generator().manual_seed(number)
    prompt = torch.randint(3, 250, (6 + number,), generator=draws).tolist()
    return Request(f"r{number}", tuple(prompt), SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True))


def make_config(out: Path, name: str, **drafter: Any) -> TrainConfig:
    (out / name).mkdir(exist_ok=True)
    if not (out / name / "data").exists() and (out / "data").exists():
        (out / name / "data").symlink_to(out / "data")
    return TrainConfig.model_validate(
        {
            "model": str(out / "model"),
            "out": out / name,
            "device": "cpu",
            "dtype": "float32",
            "drafter": {"num_layers": 2, "num_taps": 2, "block_size": BLOCK, "markov_rank": 16, **drafter},
            "loss": {"decay": 100.0, "cross_entropy": 1.0},
            "trainer": {
                "max_steps": 150,
                "batch_tokens": 4096,
                "anchors": 40,
                "lr": 3e-3,
                "held_out": 1,
                "log_every": 50,
                "eval_every": 100,
            },
        }
    )


KINDS = {
    "vanilla": {"head": "vanilla"},
    "gated": {"head": "gated"},
    "rnn": {"head": "rnn"},
    "dflash": {"kind": "dflash"},
    "eagle3": {"kind": "eagle3", "num_layers": 1},
}


@pytest.mark.parametrize("name", KINDS)
def test_learnt_answers_are_accepted_by_the_engine(folder: Path, name: str) -> None:
    config = make_config(folder, name, **KINDS[name])
    assert train(config, lambda _: None)
    assert len(read_corpus(config.data)) == 8
    target, tokenizer = load_target(config)
    engine = drafting_engine(target, tokenizer, str(config.drafter_folder), 8)
    held_out = 1
    records = run_requests(engine, [request(i) for i in range(8)])
    lengths = sorted(acceptance([record], BLOCK)[0] for record in records)[held_out:]
    print(name, lengths)
    assert sum(lengths) / len(lengths) > 0.95 * (BLOCK + 1)
