"""The drafter of a small model, grafted onto the inflated one: the same drafts, at the cost of a drafter of that size."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.bench.inflate import (
    Inflated,
    Progress,
    check_fits,
    make_widener,
    shape_of,
    sizes_in_config,
    widen_attention,
    widen_mlp,
    widen_norms,
)
from dspark.bench.widen import Axis, Places, Shape, Widener
from dspark.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

COPIED = ("calibration.json", "draft_vocabulary.json")
TAPS = "target_layer_ids"


@dataclass(frozen=True, slots=True)
class DrafterPlan:
    """What to make of the drafter in ``source``; ``shape`` is that of its own layers."""

    source: Path
    out: Path
    shape: Shape
    dtype: str
    seed: int = 1


def inflate_drafter(plan: DrafterPlan, target: Inflated, num_layers: int, progress: Progress) -> None:
    """Write the drafter for an inflated target of ``num_layers``.

    ConfigError if it is no drafter of DeepSpec's dialect with a plain Markov head, or the shape cannot hold it.
    """
    import torch

    from dspark.workers.drafter import checkpoint

    config = checkpoint.read_config(plan.source)
    _check(plan.source, config, target)
    layout = Inflated(Places(shape_of(config), plan.shape), target.layer_of)
    check_fits(layout.places.small, plan.shape, config)
    tensors = checkpoint.read_tensors(plan.source, torch.float32, torch.device("cpu"))
    wide = _wide_tensors(layout, make_widener(plan.dtype, plan.seed), tensors, len(config[TAPS]), int(config["num_hidden_layers"]))
    checkpoint.write(plan.out, _wide_config(config, layout, num_layers, plan.dtype), {name: tensor.cpu() for name, tensor in wide.items()})
    for name in COPIED:
        if (plan.source / name).is_file():
            shutil.copy(plan.source / name, plan.out / name)
    progress(f"wrote {plan.out}: a drafter of {sum(tensor.numel() for tensor in wide.values()) / 1e9:.2f} billion parameters")


def drafter_shape(source: Path, large: Shape) -> Shape:
    """The shape of a drafter that keeps its own heads and MLP, in a stream as wide as that of ``large``."""
    from dspark.workers.drafter import checkpoint

    return dataclasses.replace(shape_of(checkpoint.read_config(source)), hidden=large.hidden)


def _check(source: Path, config: dict[str, Any], target: Inflated) -> None:
    if config.get("architectures") != ["Qwen3DSparkModel"] or config.get("markov_head_type", "vanilla") != "vanilla":
        raise ConfigError(f"drafter: {source}: only DeepSpec's dialect for Qwen3 with a vanilla Markov head can be inflated")
    if config["hidden_size"] != target.places.small.hidden or config["num_target_layers"] != len(target.layer_of):
        raise ConfigError(f"drafter: {source} was made for another target than the one that is inflated")


def _wide_config(config: dict[str, Any], layout: Inflated, num_layers: int, dtype: str) -> dict[str, Any]:
    taps = [layer if layer < 0 else layout.layer_of[layer] for layer in config[TAPS]]
    return {
        **config,
        **sizes_in_config(layout.places.large),
        TAPS: taps,
        "num_target_layers": num_layers,
        "rms_norm_eps": float(config["rms_norm_eps"]) * layout.eps_gain,
        "dtype": dtype,
        "dflash_config": {**config.get("dflash_config", {}), TAPS: taps},
    }


def _wide_tensors(layout: Inflated, widener: Widener, source: dict[str, Tensor], num_taps: int, layers: int) -> dict[str, Tensor]:
    small, large = layout.places.small, layout.places.large
    taps = [tap * large.hidden + place for tap in range(num_taps) for place in range(small.hidden)]
    wide = {"fc.weight": widener.matrix(source["fc.weight"], layout.places.stream_out, Axis(taps, num_taps * large.hidden, taps))}
    wide |= widen_norms(layout, widener, source, ("hidden_norm.weight", "norm.weight"))
    for prefix in (f"layers.{layer}" for layer in range(layers)):
        wide |= widen_norms(layout, widener, source, (f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight"))
        wide |= widen_mlp(layout.places, widener, source, prefix) | _attention(layout, widener, source, prefix)
    wide |= {name: widener.kept(tensor) for name, tensor in source.items() if name.startswith("markov_head.")}
    if (confidence := source.get("confidence_head.proj.weight")) is not None:
        wide |= _confidence(layout, widener, confidence, source["confidence_head.proj.bias"])
    return wide


def _attention(layout: Inflated, widener: Widener, source: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Projections and the norms of heads: those divide by the root mean square over the larger head, zeros included.

    eps belongs to the stream's norms; queries and keys are scaled so that it weighs in their own as much as before.
    """
    small, large = layout.places.small, layout.places.large
    ratio = large.head_dim / small.head_dim
    if f"{prefix}.self_attn.q_norm.weight" not in source:
        return widen_attention(layout.places, widener, source, prefix, query_gain=ratio**0.5)
    gain = (ratio * layout.eps_gain) ** 0.5
    keys = f"{prefix}.self_attn.k_proj.weight"
    wide = widen_attention(layout.places, widener, {**source, keys: source[keys] * gain}, prefix, query_gain=gain)
    dims = Axis(layout.places.dims, large.head_dim)
    for name, scale in (("q_norm", 1.0), ("k_norm", ratio**-0.5)):  # queries make up for the attention scale: ratio^(1/2 - 1/2)
        norm = f"{prefix}.self_attn.{name}.weight"
        wide[norm] = widener.vector(source[norm], dims, scale)
    return wide


def _confidence(layout: Inflated, widener: Widener, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    small, large = layout.places.small.hidden, layout.places.large.hidden
    rest = weight.shape[1] - small
    places = [*range(small), *range(large, large + rest)]
    wide = widener.matrix(weight, Axis((0,), 1), Axis(places, large + rest, places))
    return {"confidence_head.proj.weight": wide, "confidence_head.proj.bias": widener.kept(bias)}
