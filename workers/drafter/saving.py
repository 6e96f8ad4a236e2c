"""Save our drafters in the dialects that other engines load, without the target's embedding.

DSpark in DeepSpec's, DFlash in its own, EAGLE-3 in EAGLE's (which carries the rows of the output head that it predicts with).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.errors import ConfigError
from dspark.workers.drafter import checkpoint
from dspark.workers.drafter.dialect_configs import DEEPSPEC_GEMMA4, DEEPSPEC_QWEN3, DFLASH, EAGLE3_LLAMA
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.grafted import GraftedModule
from dspark.workers.drafter.module_config import HeadType, LayerMask, LayerStyle, ModuleConfig

NUM_ANCHORS = 512  # a training setting that DeepSpec's own loader insists on


def save_drafter(folder: Path, module: DSparkModule | Eagle3Module) -> None:
    """Write ``module`` in the dialect of its kind; ConfigError for what that cannot express."""
    config = module.config
    if isinstance(module, Eagle3Module):
        _require(folder, "EAGLE-3", config, not config.qk_norm and not config.norm_before_residual)
        checkpoint.write(folder, _eagle3_config(module), {**module.state_dict(), **_own_head(module)})
        return
    windows = {mask.window for mask in config.layer_masks if mask.window is not None}
    is_plain = all(mask == LayerMask(mask.window) for mask in config.layer_masks) and len(windows) <= 1
    is_whole = config.draft_vocab_size == config.vocab_size
    if not config.sample_from_anchor:
        is_headless = config.head_type is HeadType.NONE and not config.has_confidence
        _require(folder, "DFlash", config, is_plain and is_whole and is_headless and config.style is LayerStyle.QWEN3)
        raw = _qwen3_config(module, max(windows, default=None)) | _dflash_keys(config)
    elif config.style is LayerStyle.GEMMA4:
        _require(folder, "DeepSpec", config, is_whole and config.qk_norm and all(mask == LayerMask() for mask in config.layer_masks))
        raw = _gemma4_config(module) | _dspark_keys(config)
    else:
        _require(folder, "DeepSpec", config, is_plain and is_whole)
        raw = _qwen3_config(module, max(windows, default=None)) | _dspark_keys(config)
    checkpoint.write(folder, raw, module.state_dict())


def _require(folder: Path, dialect: str, config: ModuleConfig, can_express: bool) -> None:
    if not can_express:
        raise ConfigError(f"drafter: {folder}: {dialect}'s dialect cannot express {config}")


def _sizes(module: GraftedModule) -> dict[str, Any]:
    config = module.config
    return {
        "dtype": str(module.fc.weight.dtype).removeprefix("torch."),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": False,
        "num_target_layers": module.num_target_layers,
    }


def _qwen3_config(module: DSparkModule, window: int | None) -> dict[str, Any]:
    config = module.config
    return _sizes(module) | {
        "model_type": "qwen3",
        "rope_parameters": dict(config.rope),
        "hidden_act": config.activation,
        "layer_types": ["full_attention" if mask.window is None else "sliding_attention" for mask in config.layer_masks],
        "sliding_window": window,
        "use_sliding_window": window is not None,
    }


def _gemma4_config(module: DSparkModule) -> dict[str, Any]:
    config = module.config
    return _sizes(module) | {
        "model_type": "gemma4_text",
        "global_head_dim": config.head_dim,
        "num_global_key_value_heads": config.num_kv_heads,
        "attention_k_eq_v": config.keys_are_values,
        "rope_parameters": {"full_attention": dict(config.rope)},
        "hidden_activation": config.activation,
        "layer_types": ["full_attention"] * config.num_layers,
        "final_logit_softcapping": module.softcap,
        "enable_moe_block": False,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
    }


def _dspark_keys(config: ModuleConfig) -> dict[str, Any]:
    taps = list(config.target_layer_ids)
    has_head = config.head_type is not HeadType.NONE
    return {
        "architectures": [DEEPSPEC_GEMMA4 if config.style is LayerStyle.GEMMA4 else DEEPSPEC_QWEN3],
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": taps,
        "num_anchors": NUM_ANCHORS,
        "markov_rank": config.markov_rank if has_head else 0,
        "markov_head_type": str(config.head_type) if has_head else "vanilla",
        "enable_confidence_head": config.has_confidence,
        "confidence_head_with_markov": config.confidence_with_markov,
        # vLLM sizes ``fc`` from this key.
        "dflash_config": {"target_layer_ids": taps, "mask_token_id": config.mask_token_id},
    }


def _dflash_keys(config: ModuleConfig) -> dict[str, Any]:
    return {
        "architectures": [DFLASH],
        "block_size": config.num_slots,
        "dflash_config": {"target_layer_ids": list(config.target_layer_ids), "mask_token_id": config.mask_token_id},
    }


def _eagle3_config(module: Eagle3Module) -> dict[str, Any]:
    config = module.config
    taps = list(config.target_layer_ids)
    return _sizes(module) | {
        "architectures": [EAGLE3_LLAMA],
        "model_type": "llama",
        "rope_parameters": dict(config.rope),
        "hidden_act": config.activation,
        "draft_vocab_size": len(module.draft_lm_head),
        "block_size": config.block_size,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": taps, "use_aux_hidden_state": True},
        "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in taps],  # as vLLM counts
    }


def _own_head(module: Eagle3Module) -> Mapping[str, Tensor]:
    """The head's rows, the offset from each draft id to its target id, and which target ids those are."""
    head = module.draft_lm_head
    ids = module.draft_target_ids
    own = torch.arange(len(head), device=head.device)
    ids = own if ids is None else ids
    is_drafted = torch.zeros(module.config.vocab_size, dtype=torch.bool, device=head.device).index_fill_(0, ids, True)
    return {"lm_head.weight": head.to(module.fc.weight.dtype), "d2t": ids - own, "t2d": is_drafted}
