"""From settings and a target to an untrained drafter module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dspark.errors import ConfigError
from dspark.training.config import DrafterConfig
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.layers import RMSNorm
from dspark.workers.drafter.module_config import HeadType, LayerMask, LayerStyle, ModuleConfig
from dspark.workers.drafter.target_head import TargetHead
from dspark.workers.verifier.targets import Target

INITIAL_STD = 0.02
NUM_LAYERS = {"dspark": 3, "dflash": 3, "eagle3": 1}
NUM_TAPS = {"dspark": 5, "dflash": 5, "eagle3": 3}
Module = DSparkModule | Eagle3Module


def module_config(settings: DrafterConfig, target: Target, tokenizer: Any) -> ModuleConfig:
    """The drafter's sizes; what the settings leave open is the target's."""
    text = target.model.config.get_text_config(decoder=True)
    is_dspark = settings.kind == "dspark"
    head = HeadType(settings.head) if is_dspark else HeadType.NONE
    taps = spread_taps(settings.num_taps or NUM_TAPS[settings.kind], target.num_layers) if settings.taps is None else settings.taps
    mask = LayerMask(window=settings.window, causal=settings.kind == "eagle3")
    return ModuleConfig(
        **_attention(settings, target, text),
        hidden_size=target.hidden_size,
        intermediate_size=settings.intermediate_size or int(text.intermediate_size),
        layer_masks=(mask,) * (settings.num_layers or NUM_LAYERS[settings.kind]),
        target_layer_ids=taps,
        block_size=settings.block_size,
        mask_token_id=_mask_token(settings, target, tokenizer),
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        rms_norm_eps=float(getattr(text, "rms_norm_eps", 1e-6)),
        rope=_rope(text),
        max_positions=target.max_position,
        sample_from_anchor=settings.kind != "dflash",
        head_type=head,
        markov_rank=0 if head is HeadType.NONE else settings.markov_rank,
        has_confidence=is_dspark if settings.confidence is None else settings.confidence,
        confidence_with_markov=head is not HeadType.NONE,
        qk_norm=settings.kind != "eagle3",
        is_autoregressive=settings.kind == "eagle3",
    )


def spread_taps(count: int, num_layers: int) -> tuple[int, ...]:
    """``count`` layers from the second to the third last, evenly; ConfigError if there are not so many."""
    first, last = min(1, num_layers - 1), max(num_layers - 3, min(1, num_layers - 1))
    if count > last - first + 1 and count > num_layers:
        raise ConfigError(f"drafter.num_taps {count} is more than the target's {num_layers} layers")
    if count > last - first + 1:
        first, last = 0, num_layers - 1
    if count == 1:
        return (last,)
    return tuple(round(first + (last - first) * i / (count - 1)) for i in range(count))


def new_module(config: ModuleConfig, head: TargetHead, device: torch.device, seed: int) -> Module:
    """A module in fp32 with initial weights of the seed; the Markov bias starts at zero."""
    draws = torch.Generator().manual_seed(seed)
    module: Module = Eagle3Module(config, head) if config.is_autoregressive else DSparkModule(config, head)
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=INITIAL_STD, generator=draws)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, RMSNorm) and part.weight is not None:
            nn.init.ones_(part.weight)
    if isinstance(module, DSparkModule) and module.markov_head is not None:
        nn.init.zeros_(module.markov_head.markov_w2.weight)
    return module.to(device=device, dtype=torch.float32)


def _attention(settings: DrafterConfig, target: Target, text: Any) -> dict[str, Any]:
    """Heads, activation and arrangement of the layers; those of Gemma 4 are shaped as the target's layers of full attention."""
    kind = str(target.model.config.model_type)
    is_gemma = settings.style == "gemma4" or (settings.style == "auto" and settings.kind == "dspark" and kind.startswith("gemma4"))
    if is_gemma and not kind.startswith("gemma4"):
        raise ConfigError(f"drafter.style: gemma4 layers are shaped by a Gemma 4 target, and this one is {kind}")
    if is_gemma and settings.window is not None:
        raise ConfigError("drafter.window: draft layers of Gemma 4 attend to the whole context")
    num_heads = settings.num_heads or int(text.num_attention_heads)
    own_kv, own_dim = _own_heads(target, text)
    num_kv_heads = settings.num_kv_heads or min(num_heads, int(own_kv or num_heads))
    if num_heads % num_kv_heads:
        raise ConfigError(f"drafter.num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}")
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": settings.head_dim or int(own_dim or target.hidden_size // num_heads),
        "style": LayerStyle.GEMMA4 if is_gemma else LayerStyle.QWEN3,
        "keys_are_values": is_gemma and bool(getattr(text, "attention_k_eq_v", False)),
        "activation": str(text.hidden_activation) if is_gemma else "silu",
    }


def _own_heads(target: Target, text: Any) -> tuple[int | None, int | None]:
    """The target's key-value heads and their size; None where its configuration does not say."""
    if str(target.model.config.model_type).startswith("gemma4"):  # whose layers differ; the drafter is like those of full attention
        shape = target.layers[list(text.layer_types).index("full_attention")]
        return shape.kv_heads, shape.key_dim
    return getattr(text, "num_key_value_heads", None), getattr(text, "head_dim", None)


def _mask_token(settings: DrafterConfig, target: Target, tokenizer: Any) -> int:
    """The id set, or the last special token that no text uses, or the last of the vocabulary."""
    if settings.mask_token_id is not None:
        if settings.mask_token_id >= target.vocab_size:
            raise ConfigError(f"drafter.mask_token_id {settings.mask_token_id} is not among the target's {target.vocab_size} tokens")
        return settings.mask_token_id
    special = set() if tokenizer is None else {int(token) for token in tokenizer.all_special_ids}
    used = {*target.eos_ids, getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "pad_token_id", None)}
    unused = [token for token in special - used if token < target.vocab_size]
    return max(unused, default=target.vocab_size - 1)


def _rope(text: Any) -> dict[str, Any]:
    """The target's rotary parameters; those of its full attention where layers differ."""
    found = dict(getattr(text, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0})
    nested = found.get("full_attention")
    return dict(nested) if isinstance(nested, dict) else found
