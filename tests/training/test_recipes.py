"""Every recipe trains a step on a tiny random model of its target's architecture, and what it saves is what was released."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import dspark.training
from dspark.training.config import TrainConfig, read_config
from dspark.training.shards import Sample, check_manifest, write_shard
from dspark.training.target import load_target
from dspark.training.trainer import train
from dspark.workers.build import target_head
from dspark.workers.drafter.dialects import load_drafter
from dspark.workers.drafter.dspark_module import DSparkModule

RECIPES = Path(dspark.training.__file__).parent / "recipes"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
QWEN = SMALL | {"vocab_size": 151936}
GEMMA = SMALL | {"vocab_size": 8192, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
GEMMA |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 32}
LAYERS_OF_GEMMA = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(48)]
QWEN_NAMES = {"architectures": ["Qwen3DSparkModel"], "model_type": "qwen3"}
GEMMA_NAMES = {"architectures": ["Gemma4DSparkModel"], "model_type": "gemma4_text"}
RELEASED = {"block_size": 7, "num_hidden_layers": 5, "markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True}
RELEASED |= {"confidence_head_with_markov": True}
TINY: dict[str, Callable[[], Any]] = {
    "smollm2-135m": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, vocab_size=49152, num_hidden_layers=30)),
    "qwen3-4b": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**QWEN, num_hidden_layers=36)),
    "qwen3-8b": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**QWEN, num_hidden_layers=36)),
    "qwen3-14b": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**QWEN, num_hidden_layers=40)),
    "gemma4-12b": lambda: tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**GEMMA, num_hidden_layers=48, layer_types=LAYERS_OF_GEMMA)),
}
SAVED: dict[str, dict[str, Any]] = {
    "smollm2-135m": QWEN_NAMES | RELEASED | {"num_hidden_layers": 4, "markov_rank": 64, "target_layer_ids": [1, 8, 14, 20, 27]},
    "qwen3-4b": QWEN_NAMES | RELEASED | {"target_layer_ids": [1, 9, 17, 25, 33], "mask_token_id": 151669},
    "qwen3-8b": QWEN_NAMES | RELEASED | {"target_layer_ids": [1, 9, 17, 25, 33], "mask_token_id": 151669},
    "qwen3-14b": QWEN_NAMES | RELEASED | {"target_layer_ids": [1, 10, 19, 28, 37], "mask_token_id": 151669},
    "gemma4-12b": GEMMA_NAMES | RELEASED | {"target_layer_ids": [5, 17, 29, 41, 46], "mask_token_id": 4},
}
SLOW = ("qwen3-4b", "qwen3-8b", "qwen3-14b")
FEW = {
    "trainer.max_steps": 1, "trainer.batch_tokens": 512, "trainer.accumulate": 1, "trainer.anchors": 2, "trainer.held_out": 1,
    "trainer.compile": False, "loss.chunk_rows": 16, "device": "cpu", "dtype": "float32",
}  # fmt: skip


def run_of(name: str, folder: Path) -> TrainConfig:
    config = read_config(RECIPES / f"{name}.yaml", FEW | {"model": str(folder / "model"), "out": str(folder / "out")})
    torch.manual_seed(0)
    TINY[name]().save_pretrained(config.model)
    draws = torch.Generator().manual_seed(0)
    samples = [
        Sample(torch.randint(5, 5000, (6,), generator=draws).tolist(), torch.randint(5, 5000, (24,), generator=draws).tolist(), 0.0, i)
        for i in range(3)
    ]
    write_shard(config.data, 0, samples, 8192)
    check_manifest(config.data, {})
    return config


def test_every_recipe_is_tried() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(TINY) == set(SAVED)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TINY])
def test_a_recipe_makes_the_drafter_that_was_released(name: str, tmp_path: Path) -> None:
    config = run_of(name, tmp_path)
    assert train(config, lambda _: None)
    saved = json.loads((config.drafter_folder / "config.json").read_text())
    assert {key: saved.get(key) for key in SAVED[name]} == SAVED[name]
    target, _ = load_target(config)
    module = load_drafter(config.drafter_folder, target_head(target), torch.float32, torch.device("cpu"))
    assert isinstance(module, DSparkModule)
    assert module.config.target_layer_ids == tuple(SAVED[name]["target_layer_ids"])
    assert module.markov_head is not None
