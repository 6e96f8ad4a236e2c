"""The configurations of drafter checkpoints in the wild, read into one ``ModuleConfig``.

=============  ==========================================  ==================================================
dialect        marker                                      conventions
=============  ==========================================  ==================================================
DeepSpec       architectures: Qwen3DSparkModel or          flat keys; tap L is the output of layer L; the anchor
               Gemma4DSparkModel                           predicts the first draft
speculators    speculators_model_type: dspark or dflash    layers under transformer_layer_config; id L counts layers,
                                                           so its tap is L - 1; sample_from_anchor; d2t
SpecForge      architectures: DSparkDraftModel             keys under dflash_config; taps as DeepSpec
DFlash         architectures: DFlashDraftModel             as SpecForge, without heads; only the masks predict, so a block of
                                                           block_size inputs drafts one token less
EAGLE-3        see ``eagle3_configs.py``
DeepSeek-V4    dspark_* keys on the target's own config    refused: the drafter's layers are the target's own MoE
=============  ==========================================  ==================================================

A wrong tap or anchor convention raises no error anywhere: acceptance just falls. So each is taken from one place and
anything unclear is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.errors import ConfigError
from dspark.workers.drafter.module_config import HeadType, LayerMask, LayerStyle, ModuleConfig

BUNDLED_KEYS = ("dspark_block_size", "dspark_target_layer_ids", "dspark_noise_token_id")
DEEPSPEC_QWEN3, DEEPSPEC_GEMMA4, SPECFORGE, DFLASH = "Qwen3DSparkModel", "Gemma4DSparkModel", "DSparkDraftModel", "DFlashDraftModel"
EAGLE3_LLAMA, EAGLE3_DEEPSPEC = "LlamaForCausalLMEagle3", "Qwen3Eagle3Model"
EAGLE3_ARCHITECTURES = (EAGLE3_LLAMA, EAGLE3_DEEPSPEC)


@dataclass(frozen=True, slots=True)
class Fields:
    """Keys of a configuration, looked up in several dicts in order; errors name the folder and the key."""

    folder: Path
    places: tuple[Mapping[str, Any], ...]

    def get(self, name: str, default: Any = None) -> Any:
        """The first place's value of ``name`` that is not null."""
        return next((place[name] for place in self.places if place.get(name) is not None), default)

    def integer(self, name: str, low: int = 0, default: int | None = None) -> int:
        """A whole number of at least ``low``; ConfigError if it is missing (without default) or something else."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"drafter: {self.folder}: {name} must be a whole number of at least {low}, not {value!r}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers with at least one entry."""
        value = self.get(name)
        if not isinstance(value, list) or not value or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise ConfigError(f"drafter: {self.folder}: {name} must be a list of whole numbers, not {value!r}")
        return tuple(value)

    def refuse(self, reason: str) -> ConfigError:
        return ConfigError(f"drafter: {self.folder}: {reason}")


def read_module_config(folder: Path, raw: Mapping[str, Any], has_qk_norm: bool) -> ModuleConfig:
    """The module that a checkpoint's configuration describes; ConfigError naming the dialect, architecture or key that is not served."""
    for key in BUNDLED_KEYS:
        if key in raw:
            raise ConfigError(
                f"drafter: {folder}: {key} marks a drafter bundled with a DeepSeek-V4 target (weights under mtp.*); "
                "it is built from that model's own mixture-of-experts layers, which this drafter does not have"
            )
    kind = raw.get("speculators_model_type")
    if kind is not None:
        if kind not in ("dspark", "dflash"):
            known = "dspark, dflash and eagle3"
            raise ConfigError(f"drafter: {folder}: speculators_model_type {kind!r} is not supported; supported are {known}")
        return _speculators(folder, raw, has_qk_norm)
    name = architecture(raw)
    readers: dict[str, Callable[[Path, Mapping[str, Any], bool], ModuleConfig]] = {
        DEEPSPEC_QWEN3: _deepspec,
        DEEPSPEC_GEMMA4: _deepspec_gemma4,
        SPECFORGE: _specforge,
        DFLASH: _dflash,
    }
    if name not in readers:
        known = ", ".join((*readers, *EAGLE3_ARCHITECTURES))
        raise ConfigError(f"drafter: {folder}: architectures {raw.get('architectures')!r} is no drafter; supported are {known}")
    return readers[name](folder, raw, has_qk_norm)


def architecture(raw: Mapping[str, Any]) -> str | None:
    """The first of the configuration's ``architectures``."""
    names = raw.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _deepspec(folder: Path, raw: Mapping[str, Any], has_qk_norm: bool) -> ModuleConfig:
    fields = Fields(folder, (raw, section_of(folder, raw, "dflash_config")))
    shape = shape_of(fields)
    masks = tuple(LayerMask(window) for window in _windows(fields))
    return ModuleConfig(
        **shape,
        **_heads(fields, "vanilla", default_rank=None),
        layer_masks=masks,
        target_layer_ids=fields.integers("target_layer_ids"),
        block_size=fields.integer("block_size", 1),
        draft_vocab_size=shape["vocab_size"],
        qk_norm=has_qk_norm,
    )


def _deepspec_gemma4(folder: Path, raw: Mapping[str, Any], has_qk_norm: bool) -> ModuleConfig:
    fields = Fields(folder, (raw, section_of(folder, raw, "dflash_config")))
    shares = bool(fields.get("attention_k_eq_v", False))
    if fields.get("enable_moe_block", False) or fields.get("hidden_size_per_layer_input", 0):
        raise fields.refuse("enable_moe_block and hidden_size_per_layer_input are not supported in draft layers")
    shape = shape_of(fields) | {
        "head_dim": fields.integer("global_head_dim", 1),
        "num_kv_heads": fields.integer("num_global_key_value_heads" if shares else "num_key_value_heads", 1),
        "activation": fields.get("hidden_activation", "gelu_pytorch_tanh"),
    }
    return ModuleConfig(
        **shape,
        **_heads(fields, "vanilla", default_rank=None),
        layer_masks=tuple(LayerMask() for _ in range(fields.integer("num_hidden_layers", 1))),
        target_layer_ids=fields.integers("target_layer_ids"),
        block_size=fields.integer("block_size", 1),
        draft_vocab_size=shape["vocab_size"],
        qk_norm=has_qk_norm,
        style=LayerStyle.GEMMA4,
        keys_are_values=shares,
    )


def _specforge(folder: Path, raw: Mapping[str, Any], has_qk_norm: bool) -> ModuleConfig:
    fields = Fields(folder, (section_of(folder, raw, "dflash_config"), section_of(folder, raw, "dspark_config"), raw))
    if (projector := fields.get("projector_type", "dspark")) != "dspark":
        raise fields.refuse(f"dflash_config.projector_type {projector!r} is not supported; supported is dspark")
    modes = set(fields.get("attention_modes", [])) | {fields.get("attention_mode", "gqa")}
    if not modes <= {"gqa", "mha"}:
        raise fields.refuse(f"dflash_config.attention_mode {sorted(modes)} is not supported; supported are gqa and mha")
    causal = fields.get("causal", fields.get("is_causal"))
    masks = tuple(LayerMask(window, causal=bool(window is not None if causal is None else causal)) for window in _windows(fields))
    from_anchor = bool(fields.get("shift_label", True))
    shape = shape_of(fields)
    return ModuleConfig(
        **shape,
        **_heads(fields, "vanilla", default_rank=0),
        layer_masks=masks,
        target_layer_ids=fields.integers("target_layer_ids"),
        block_size=fields.integer("block_size", 1 if from_anchor else 2) - (not from_anchor),
        sample_from_anchor=from_anchor,
        draft_vocab_size=shape["vocab_size"],
        qk_norm=has_qk_norm,
    )


def _dflash(folder: Path, raw: Mapping[str, Any], has_qk_norm: bool) -> ModuleConfig:
    fields = Fields(folder, (section_of(folder, raw, "dflash_config"), raw))
    if (projector := fields.get("projector_type", "dflash")) != "dflash":
        raise fields.refuse(f"dflash_config.projector_type {projector!r} does not belong to a {DFLASH}")
    causal = bool(fields.get("causal", fields.get("is_causal", False)))
    shape = shape_of(fields)
    return ModuleConfig(
        **shape,
        head_type=HeadType.NONE,
        markov_rank=0,
        has_confidence=False,
        confidence_with_markov=False,
        layer_masks=tuple(LayerMask(window, causal=causal) for window in _windows(fields)),
        target_layer_ids=fields.integers("target_layer_ids"),
        block_size=fields.integer("block_size", 2) - 1,
        sample_from_anchor=False,
        draft_vocab_size=shape["vocab_size"],
        qk_norm=has_qk_norm,
    )


def _speculators(folder: Path, raw: Mapping[str, Any], has_qk_norm: bool) -> ModuleConfig:
    layers = section_of(folder, raw, "transformer_layer_config")
    fields, inner = Fields(folder, (raw,)), Fields(folder, (layers, raw))
    non_causal = bool(fields.get("sliding_window_non_causal", False))
    masks = tuple(LayerMask(w, from_anchor=True, causal=not non_causal) if w is not None else LayerMask() for w in _windows(inner))
    from_anchor = _samples_from_anchor(fields)
    has_heads = raw["speculators_model_type"] == "dspark"
    shape = shape_of(inner)
    return ModuleConfig(
        **shape,
        **_heads(fields, "vanilla", default_rank=256 if has_heads else 0, default_confidence=has_heads),
        layer_masks=masks,
        # These ids count executed layers: id L is the residual stream before layer L, which is our tap L - 1.
        target_layer_ids=tuple(layer - 1 for layer in fields.integers("aux_hidden_state_layer_ids")),
        block_size=fields.integer("block_size", 1 if from_anchor else 2) - (not from_anchor),
        sample_from_anchor=from_anchor,
        draft_vocab_size=fields.integer("draft_vocab_size", 1, default=shape["vocab_size"]),
        qk_norm=has_qk_norm,
    )


def _samples_from_anchor(fields: Fields) -> bool:
    """Whether the anchor's slot predicts; where the key is missing the number of proposed tokens tells."""
    said = fields.get("sample_from_anchor")
    if said is not None:
        return bool(said)
    methods = section_of(fields.folder, fields.places[0], "speculators_config").get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else {}
    proposed, block = first.get("speculative_tokens") if isinstance(first, Mapping) else None, fields.integer("block_size", 1)
    if proposed not in (block, block - 1):
        raise fields.refuse(
            f"sample_from_anchor is missing and speculators_config proposes {proposed!r} tokens for block_size {block}: "
            "set sample_from_anchor true if the anchor's slot predicts the first draft, false if only the masks predict"
        )
    return bool(proposed == block)


def section_of(folder: Path, raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The nested configuration ``name``; empty if there is none, ConfigError if it is no object."""
    section = raw.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"drafter: {folder}: {name} must be an object, not {section!r}")
    return section


def shape_of(fields: Fields, mask_token_id: int | None = None) -> dict[str, Any]:
    """The sizes that all dialects take from a transformers configuration; ``mask_token_id`` is for those that have none."""
    hidden, heads = fields.integer("hidden_size", 1), fields.integer("num_attention_heads", 1)
    return {
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size", 1),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", 1, default=heads),
        "head_dim": fields.integer("head_dim", 2, default=hidden // heads),
        "mask_token_id": fields.integer("mask_token_id", default=mask_token_id),
        "vocab_size": fields.integer("vocab_size", 1),
        "rms_norm_eps": float(fields.get("rms_norm_eps", 1e-6)),
        "rope": _rope(fields),
        "max_positions": fields.integer("max_position_embeddings", 1, default=32768),
        "attention_bias": bool(fields.get("attention_bias", False)),
        "activation": fields.get("hidden_act", "silu"),
    }


def _heads(fields: Fields, default_type: str, default_rank: int | None, default_confidence: bool = False) -> dict[str, Any]:
    rank = fields.integer("markov_rank", 0, default=default_rank)
    name = fields.get("markov_head_type", default_type) if rank else HeadType.NONE
    if name not in tuple(HeadType):
        raise fields.refuse(f"markov_head_type {name!r} is not supported; supported are vanilla, gated and rnn")
    has_confidence = bool(fields.get("enable_confidence_head", default_confidence))
    with_markov = bool(fields.get("confidence_head_with_markov", default_confidence))
    if has_confidence and with_markov and not rank:
        raise fields.refuse("confidence_head_with_markov needs a markov_rank above 0")
    return {
        "head_type": HeadType(name),
        "markov_rank": rank,
        "has_confidence": has_confidence,
        "confidence_with_markov": has_confidence and with_markov,
    }


def _rope(fields: Fields) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5, or the older ``rope_theta`` with ``rope_scaling``."""
    rope = fields.get("rope_parameters")
    if isinstance(rope, Mapping) and "full_attention" in rope:
        rope = rope["full_attention"]
    if rope is None:
        scaling = dict(fields.get("rope_scaling") or {})
        rope = {"rope_type": scaling.pop("type", "default")} | scaling
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    if theta is None:
        raise fields.refuse("neither rope_parameters.rope_theta nor rope_theta is set")
    return {"rope_type": "default"} | dict(rope) | {"rope_theta": float(theta)}


def _windows(fields: Fields) -> list[int | None]:
    """The sliding window of each draft layer, None where it attends to everything."""
    count = fields.integer("num_hidden_layers", 1)
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", 0, default=0) if fields.get("use_sliding_window", False) else count
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(count)]
    if len(kinds) != count or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise fields.refuse(f"layer_types must name full_attention or sliding_attention for each of {count} layers, not {kinds!r}")
    return [fields.integer("sliding_window", 1) if kind == "sliding_attention" else None for kind in kinds]
