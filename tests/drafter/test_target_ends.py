"""The ends of a target read from its folder are those of the loaded model; fingerprints tell checkpoints apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import families
from helpers.draft_modules import random_module
from helpers.engines import tiny_target
from transformers import PreTrainedModel

from dspark.errors import ConfigError
from dspark.workers.build import target_head
from dspark.workers.drafter import checkpoint
from dspark.workers.drafter.dialects import load_drafter, load_projection
from dspark.workers.drafter.saving import save_drafter
from dspark.workers.drafter.target_ends import fingerprint, load_target_head
from dspark.workers.verifier.targets import as_target

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_the_ends_are_those_of_the_model(name: str, max_shard_size: str, tmp_path: Path) -> None:
    model: PreTrainedModel = families.make(name)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    expected = target_head(as_target(model, name))
    found = load_target_head(str(tmp_path), torch.float32, CPU)
    assert torch.equal(found.embed, expected.embed)
    assert torch.equal(found.lm_head, expected.lm_head)
    plain = {"embed": None, "lm_head": None}
    assert dataclasses.replace(found, **plain) == dataclasses.replace(expected, **plain)  # type: ignore[arg-type]
    assert fingerprint(found) == fingerprint(expected)
    assert fingerprint(load_target_head(str(tmp_path), torch.bfloat16, CPU)) != fingerprint(expected)


def test_fingerprints_see_other_weights_and_shapes() -> None:
    head = target_head(tiny_target())
    assert fingerprint(head) == fingerprint(target_head(tiny_target()))
    assert fingerprint(head) != fingerprint(target_head(tiny_target(seed=1)))
    assert fingerprint(head) != fingerprint(dataclasses.replace(head, num_layers=head.num_layers + 1))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_target_head(str(tmp_path), torch.float32, CPU)
    families.make("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="has neither"):
        load_target_head(str(tmp_path), torch.float32, CPU)


def test_a_projection_is_the_drafter_s_own(tmp_path: Path) -> None:
    target = tiny_target()
    save_drafter(tmp_path, random_module(target, target_layer_ids=(0, 2)))
    head = target_head(target)
    module, projection = load_drafter(tmp_path, head, torch.float32, CPU), load_projection(tmp_path, head, torch.float32, CPU)
    taps = torch.randn(5, 2 * target.hidden_size)
    assert torch.equal(projection.project(taps), module.project(taps))
    assert sum(p.numel() for p in projection.parameters()) < sum(p.numel() for p in module.parameters()) / 2
    with pytest.raises(ConfigError, match="made for another target"):
        load_projection(tmp_path, dataclasses.replace(head, vocab_size=head.vocab_size + 1), torch.float32, CPU)


def test_checkpoint_fingerprints(tmp_path: Path) -> None:
    target = tiny_target()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_drafter(tmp_path / name, random_module(target, seed, target_layer_ids=(0, 2)))
    a, b, c = (checkpoint.fingerprint(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps(config | {"block_size": 3}))
    assert checkpoint.fingerprint(tmp_path / "b") != a
