"""From settings and a target to an untrained drafter module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dspark.errors import ConfigError
from dspark.training.config import DrafterConfig
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.layers import RMSNorm
from dspark.workers.drafter.module_config import HeadType, LayerMask, ModuleConfig
from dspark.workers.drafter.target_head import TargetHead
from dspark.workers.verifier.targets import Target

INITIAL_STD = 0.02


def module_config(settings: DrafterConfig, target: Target, tokenizer: Any) -> ModuleConfig:
    """The drafter's sizes; what the settings leave open is the target's."""
    text = target.model.config.get_text_config(decoder=True)
    num_heads = settings.num_heads or int(text.num_attention_heads)
    num_kv_heads = settings.num_kv_heads or min(num_heads, int(getattr(text, "num_key_value_heads", None) or num_heads))
    if num_heads % num_kv_heads:
        raise ConfigError(f"drafter.num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}")
    is_dflash = settings.kind == "dflash"
    head = HeadType.NONE if is_dflash else HeadType(settings.head)
    return ModuleConfig(
        hidden_size=target.hidden_size,
        intermediate_size=settings.intermediate_size or int(text.intermediate_size),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=settings.head_dim or int(getattr(text, "head_dim", None) or target.hidden_size // num_heads),
        layer_masks=(LayerMask(window=settings.window),) * settings.num_layers,
        target_layer_ids=settings.taps if settings.taps is not None else spread_taps(settings.num_taps, target.num_layers),
        block_size=settings.block_size,
        mask_token_id=_mask_token(settings, target, tokenizer),
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        rms_norm_eps=float(getattr(text, "rms_norm_eps", 1e-6)),
        rope=_rope(text),
        max_positions=target.max_position,
        sample_from_anchor=not is_dflash,
        head_type=head,
        markov_rank=settings.markov_rank,
        has_confidence=settings.confidence,
        confidence_with_markov=head is not HeadType.NONE,
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


def new_module(config: ModuleConfig, head: TargetHead, device: torch.device, seed: int) -> DSparkModule:
    """A module in fp32 with initial weights of the seed; the Markov bias starts at zero."""
    draws = torch.Generator().manual_seed(seed)
    module = DSparkModule(config, head)
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=INITIAL_STD, generator=draws)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, RMSNorm) and part.weight is not None:
            nn.init.ones_(part.weight)
    if module.markov_head is not None:
        nn.init.zeros_(module.markov_head.markov_w2.weight)
    return module.to(device=device, dtype=torch.float32)


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
