"""The configurations of EAGLE-3 checkpoints in the wild, read into one ``ModuleConfig``.

=============  ===========================================  =================================================================
dialect        marker                                       taps
=============  ===========================================  =================================================================
EAGLE          architectures: LlamaForCausalLMEagle3        eagle_config.eagle_aux_hidden_state_layer_ids: L is the output of
                                                            layer L; none: layers 1, n / 2 - 1 and n - 4 of n
DeepSpec       architectures: Qwen3Eagle3Model              target_layer_ids: L is the output of layer L
speculators    speculators_model_type: eagle3               eagle_aux_hidden_state_layer_ids: L counts layers, its tap is L - 1
=============  ===========================================  =================================================================

At the top level ``eagle_aux_hidden_state_layer_ids`` counts layers in every dialect, as vLLM reads it. How many tokens to draft
is no property of such a drafter: ``block_size`` or ``ttt_length`` (as it was trained) say it, then what speculators proposes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark.errors import ConfigError
from dspark.workers.drafter.dialect_configs import EAGLE3_ARCHITECTURES, Fields, architecture, section_of, shape_of
from dspark.workers.drafter.module_config import HeadType, LayerMask, ModuleConfig

DEFAULT_STEPS = 7  # the unrolled steps of the released training recipes
LLAMA_DEFAULTS = {"rope_theta": 10000.0}  # of transformers' LlamaConfig, on which EAGLE's own checkpoints rely
OTHER_VARIANTS = ("norm_before_fc", "fc_norm", "norm_output", "use_mtp_layernorm")


def is_eagle3(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration is of one of these dialects."""
    return raw.get("speculators_model_type") == "eagle3" or architecture(raw) in EAGLE3_ARCHITECTURES


def read_eagle3_config(folder: Path, raw: Mapping[str, Any], has_qk_norm: bool, num_target_layers: int) -> ModuleConfig:
    """The module that the configuration describes; ConfigError naming the key that is missing, contradictory or not served."""
    nested = section_of(folder, raw, "eagle_config")
    fields = Fields(folder, (raw, section_of(folder, raw, "transformer_layer_config"), nested, LLAMA_DEFAULTS))
    for name in OTHER_VARIANTS:
        if fields.get(name, False):
            raise fields.refuse(f"{name} is not supported in EAGLE-3 drafters")
    if (layers := fields.integer("num_hidden_layers", 1, default=1)) != 1:
        raise fields.refuse(f"num_hidden_layers is {layers}; an EAGLE-3 drafter has one layer")
    if not fields.get("use_aux_hidden_state", True):
        raise fields.refuse("use_aux_hidden_state must not be false: the drafter is fed with features of target layers")
    shape = shape_of(fields, mask_token_id=0)
    return ModuleConfig(
        **shape,
        head_type=HeadType.NONE,
        markov_rank=0,
        has_confidence=False,
        confidence_with_markov=False,
        layer_masks=(LayerMask(causal=True),),
        target_layer_ids=_taps(fields, raw, nested, num_target_layers),
        block_size=_num_steps(fields, raw),
        draft_vocab_size=fields.integer("draft_vocab_size", 1, default=shape["vocab_size"]),
        qk_norm=has_qk_norm,
        is_autoregressive=True,
        norm_before_residual=_norm_before_residual(fields, raw),
    )


def default_taps(num_target_layers: int) -> tuple[int, ...]:
    """The layers that EAGLE-3 taps when a checkpoint names none: a low, a middle and a high one."""
    return (1, num_target_layers // 2 - 1, num_target_layers - 4)


def _taps(fields: Fields, raw: Mapping[str, Any], nested: Mapping[str, Any], num_target_layers: int) -> tuple[int, ...]:
    found: dict[str, tuple[int, ...]] = {}
    if nested.get("eagle_aux_hidden_state_layer_ids"):
        inner = Fields(fields.folder, (nested,))
        found["eagle_config.eagle_aux_hidden_state_layer_ids"] = inner.integers("eagle_aux_hidden_state_layer_ids")
    outer = Fields(fields.folder, (raw,))
    for name, first in (("eagle_aux_hidden_state_layer_ids", 1), ("aux_hidden_state_layer_ids", 1), ("target_layer_ids", 0)):
        if raw.get(name):
            found[name] = tuple(layer - first for layer in outer.integers(name))
    if len(set(found.values())) > 1:
        raise fields.refuse("; ".join(f"{name} taps the outputs of layers {list(taps)}" for name, taps in found.items()))
    return next(iter(found.values()), default_taps(num_target_layers))


def _num_steps(fields: Fields, raw: Mapping[str, Any]) -> int:
    proposals = section_of(fields.folder, raw, "speculators_config").get("proposal_methods")
    first = proposals[0] if isinstance(proposals, list) and proposals and isinstance(proposals[0], Mapping) else {}
    name = "block_size" if fields.get("block_size") is not None else "ttt_length"
    return fields.integer(name, 1, default=first.get("speculative_tokens") or DEFAULT_STEPS)


def _norm_before_residual(fields: Fields, raw: Mapping[str, Any]) -> bool:
    """EAGLE's own checkpoints add to the feature as it is; those of speculators say what theirs do."""
    said = fields.get("norm_before_residual")
    if said is None and raw.get("speculators_model_type") == "eagle3":
        raise ConfigError(f"drafter: {fields.folder}: norm_before_residual is missing: does the layer add to the normed feature or not?")
    return bool(said)
