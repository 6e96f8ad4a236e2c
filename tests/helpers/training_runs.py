"""Small training runs: a tiny target, its own answers as data, and settings that learn them in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.tiny_model import save_tiny_model

from dspark.sampling import SamplingParams
from dspark.training.config import TrainConfig
from dspark.training.served import drafting_engine, run_requests
from dspark.training.shards import Sample, check_manifest, write_shard
from dspark.training.target import load_target
from dspark.types import Request

BLOCK = 4
ANSWER = 40
NUM_ANSWERS = 8


def prompt_of(number: int) -> tuple[int, ...]:
    draws = torch.Generator().manual_seed(number)
    return tuple(torch.randint(3, 250, (6 + number,), generator=draws).tolist())


def request(number: int) -> Request:
    return Request(f"r{number}", prompt_of(number), SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True))


def make_run(out: Path) -> Path:
    """A folder with a tiny target in ``model`` and its greedy answers in ``data``."""
    save_tiny_model(out / "model")
    target, tokenizer = load_target(run_config(out, "data-only"))
    answers = run_requests(drafting_engine(target, tokenizer, "none", NUM_ANSWERS), [request(i) for i in range(NUM_ANSWERS)])
    samples = [Sample(prompt_of(i), answer.tokens, 0.0, i) for i, answer in enumerate(answers)]
    write_shard(out / "data", 0, samples, target.vocab_size)
    check_manifest(out / "data", {})
    return out


def run_config(folder: Path, name: str, drafter: dict[str, Any] | None = None, **trainer: Any) -> TrainConfig:
    """Settings of a run of its own over the data of ``folder``."""
    (folder / name).mkdir(exist_ok=True)
    return TrainConfig.model_validate(
        {
            "model": str(folder / "model"),
            "out": folder / name,
            "data_folder": folder / "data",
            "device": "cpu",
            "dtype": "float32",
            "drafter": {"num_taps": 2, "block_size": BLOCK, "markov_rank": 16} | (drafter or {}),
            "loss": {"decay": 100.0, "cross_entropy": 1.0},
            "trainer": {
                "max_steps": 80,
                "batch_tokens": 4096,
                "anchors": 16,
                "lr": 5e-3,
                "held_out": 1,
                "log_every": 50,
                "eval_every": 1000,
            }
            | trainer,
        }
    )
