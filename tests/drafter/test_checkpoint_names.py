"""Names and keys of DeepSpec's dialect, written out: what released checkpoints hold, what ours hold, and what vLLM 0.26 reads of them.

vLLM's loader puts ``model.`` before every name but ``lm_head``'s, skips ``confidence_head``, merges q, k, v and gate, up, shares the
target's embedding and head where a checkpoint has none, and sizes ``fc`` from ``dflash_config.target_layer_ids``; without
``dflash_config.mask_token_id`` it does not know what stands for a token to be drafted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.draft_modules import tiny_head, tiny_module
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.deploy.default_model import default_drafter
from dspark.workers.drafter.dialects import load_drafter
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.module_config import LayerStyle
from dspark.workers.drafter.saving import save_drafter

CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 32}
SIZES |= {"num_key_value_heads": 2, "markov_rank": 6}
QWEN3 = SIZES | {
    "architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "block_size": 4, "mask_token_id": 29, "target_layer_ids": [0, 2],
    "num_target_layers": 3, "num_anchors": 512, "markov_head_type": "vanilla", "enable_confidence_head": True, "hidden_act": "silu",
    "confidence_head_with_markov": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "rope_theta": 10000.0,
    "attention_bias": False, "layer_types": ["full_attention"] * 2, "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
GEMMA4 = QWEN3 | {
    "architectures": ["Gemma4DSparkModel"], "model_type": "gemma4_text", "global_head_dim": 8, "num_global_key_value_heads": 2,
    "attention_k_eq_v": True, "hidden_activation": "gelu_pytorch_tanh", "rope_parameters": {"full_attention": {"rope_theta": 10000.0}},
    "final_logit_softcapping": None, "enable_moe_block": False, "hidden_size_per_layer_input": 0,
}  # fmt: skip


def released_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight of a released checkpoint but the target's own ends."""
    d, mlp, vocab, rank = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "markov_rank"))
    heads, kv_heads = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (d, len(config["target_layer_ids"]) * d),
        "hidden_norm.weight": (d,),
        "norm.weight": (d,),
        "markov_head.markov_w1.weight": (vocab, rank),
        "markov_head.markov_w2.weight": (vocab, rank),
        "confidence_head.proj.weight": (1, d + rank),
        "confidence_head.proj.bias": (1,),
    }
    for layer in range(config["num_hidden_layers"]):
        p = f"layers.{layer}."
        shapes |= {f"{p}self_attn.q_proj.weight": (heads, d), f"{p}self_attn.o_proj.weight": (d, heads)}
        has_values = not config.get("attention_k_eq_v", False)
        shapes |= {f"{p}self_attn.{name}_proj.weight": (kv_heads, d) for name in ("kv" if has_values else "k")}
        shapes |= {f"{p}self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}
        shapes |= {f"{p}mlp.gate_proj.weight": (mlp, d), f"{p}mlp.up_proj.weight": (mlp, d), f"{p}mlp.down_proj.weight": (d, mlp)}
        shapes |= {f"{p}{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
        if config["architectures"] == ["Gemma4DSparkModel"]:
            shapes |= {f"{p}{name}_feedforward_layernorm.weight": (d,) for name in ("pre", "post")} | {f"{p}layer_scalar": (1,)}
    return shapes


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def check_for_vllm(config: dict[str, Any]) -> None:
    """The keys that its loader and its attention read."""
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["model_type"] == "qwen3"
    assert config["dflash_config"] == {name: config[name] for name in ("target_layer_ids", "mask_token_id")}
    assert config["layer_types"] == ["full_attention"] * config["num_hidden_layers"], "all layers attend both ways"
    assert config["rope_parameters"]["rope_theta"] > 0
    assert not config["attention_bias"]
    assert not {"draft_vocab_size", "dspark_block_size", "eagle_aux_hidden_state_layer_ids"} & config.keys(), "would be read otherwise"


@pytest.mark.parametrize("config", [QWEN3, GEMMA4], ids=["qwen3", "gemma4"])
def test_a_released_checkpoint_loads(tmp_path: Path, config: dict[str, Any]) -> None:
    draws = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draws) for name, shape in released_shapes(config).items()}
    ends = {name: torch.randn(32, 16, generator=draws) for name in ("embed_tokens.weight", "lm_head.weight")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors | ends, tmp_path / "model.safetensors")
    module = load_drafter(tmp_path, tiny_head(), torch.float32, CPU)
    assert isinstance(module, DSparkModule)
    loaded: dict[str, Tensor] = module.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("style", list(LayerStyle))
def test_ours_hold_what_released_ones_hold(tmp_path: Path, style: LayerStyle) -> None:
    save_drafter(tmp_path, tiny_module(style=style, keys_are_values=style is LayerStyle.GEMMA4))
    config = json.loads((tmp_path / "config.json").read_text())
    assert shapes_in(tmp_path) == released_shapes(config)
    if style is LayerStyle.QWEN3:
        check_for_vllm(config)


def test_the_embedded_drafter_is_one_that_vllm_loads() -> None:
    folder = default_drafter()
    assert folder is not None
    config = json.loads((folder / "config.json").read_text())
    check_for_vllm(config)
    assert shapes_in(folder) == released_shapes(config)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= 40e6, "it lives in the repository"
