"""``dspark bench inflate``: a model of 8 billion parameters that computes what a small one does.

Real text, real acceptance and real calibration at the cost of a large model, where large weights are not at hand. The
residual stream is padded with zeros (RMSNorm over D instead of d values: weights times sqrt(d / D), eps times d / D), heads
and MLP units are added that contribute zero, and so are layers. Every added weight is noise, so a device reads and multiplies
as much as in any model of that size; the added activations are zeros, which draw less power in a matrix product.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.bench.widen import Axis, Places, Shape, Widener
from dspark.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Mapping[str, Tensor]

FREQUENCY_TYPES = ("default", "linear", "llama3")  # rotary types whose frequencies are a function of theta^(-2i/D) alone
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class InflatePlan:
    """What to make of the model in ``source``."""

    source: Path
    out: Path
    shape: Shape
    layers: int
    dtype: str
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Inflated:
    """How the source lies in the large model: its parts in a layer, and for each source layer the large model's."""

    places: Places
    layer_of: tuple[int, ...]

    @property
    def norm_gain(self) -> float:
        """What norm weights over the stream are multiplied by."""
        return math.sqrt(self.eps_gain)

    @property
    def eps_gain(self) -> float:
        return self.places.small.hidden / self.places.large.hidden


def inflate(plan: InflatePlan, progress: Progress) -> None:
    """Write the large model, a file a layer, with the source's tokenizer; ConfigError if the shape cannot hold the source."""
    layout, config = lay_out(plan), _read_config(plan.source)
    if plan.out.exists() and any(plan.out.iterdir()):
        raise ConfigError(f"--out {plan.out} is not empty")
    plan.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    (plan.out / "config.json").write_text(json.dumps(_large_config(plan, config, layout), indent=2) + "\n", encoding="utf-8")
    for file in plan.source.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.startswith("model"):
            shutil.copy(file, plan.out / file.name)
    writer = _Shards(plan.out, plan.layers + 1)
    for tensors in _large_tensors(plan, layout, _read_tensors(plan.source), make_widener(plan.dtype, plan.seed)):
        writer.write(tensors)
    writer.finish()
    progress(
        f"wrote {plan.out}: {writer.num_parameters / 1e9:.2f} billion parameters ({writer.num_zeros / writer.num_parameters:.1%} zero),"
        f" {writer.num_bytes / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s"
    )


def lay_out(plan: InflatePlan) -> Inflated:
    """Where the source goes; ConfigError names what does not fit or is not supported."""
    config = _read_config(plan.source)
    if config.get("model_type") != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise ConfigError(f"{plan.source}: only Llama models without biases can be inflated, not {config.get('model_type')!r}")
    small, large = shape_of(config), plan.shape
    check_fits(small, large, config)
    if large.hidden % large.heads:
        raise ConfigError(f"hidden {large.hidden} is no multiple of heads {large.heads}, which transformers wants of a Llama model")
    count = int(config["num_hidden_layers"])
    if plan.layers < count:
        raise ConfigError(f"--layers {plan.layers} is under the source's {count}")
    return Inflated(Places(small, large), tuple(layer * plan.layers // count for layer in range(count)))


def check_fits(small: Shape, large: Shape, config: Mapping[str, Any]) -> None:
    """ConfigError names the size that cannot hold the source, whose configuration is ``config``."""
    for name in ("hidden", "intermediate", "kv_heads", "group", "head_dim"):
        if getattr(large, name) < getattr(small, name):
            raise ConfigError(f"{name} {getattr(large, name)} is under the source's {getattr(small, name)}")
    if large.head_dim % small.head_dim or large.heads % large.kv_heads:
        raise ConfigError(f"head_dim must be a multiple of the source's {small.head_dim}, and heads a multiple of kv_heads")
    rope = str((config.get("rope_parameters") or {}).get("rope_type", "default"))
    if large.head_dim != small.head_dim and rope not in FREQUENCY_TYPES:
        raise ConfigError(f"head_dim cannot grow with rotary type {rope!r}; keep {small.head_dim}")


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The sizes in a transformers configuration."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return Shape(hidden, int(config["intermediate_size"]), heads, kv_heads, int(config.get("head_dim") or hidden // heads))


def sizes_in_config(shape: Shape) -> dict[str, int]:
    """``shape`` as the keys of a transformers configuration."""
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }


def make_widener(dtype: str, seed: int) -> Widener:
    """On a GPU if there is one."""
    import torch

    return Widener(getattr(torch, dtype), torch.device("cuda" if torch.cuda.is_available() else "cpu"), seed)


def widen_mlp(places: Places, widener: Widener, source: Tensors | None, prefix: str) -> dict[str, Tensor]:
    """The three matrices of a gated MLP below ``prefix``; without a source they yield zero."""
    found = source or {}
    units = places.units if source is not None else Axis((), places.large.intermediate)
    gates = places.gates if source is not None else Axis((), places.large.intermediate, range(places.large.intermediate))
    gate, up, down = (f"{prefix}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    return {
        gate: widener.matrix(found.get(gate), gates, places.stream),
        up: widener.matrix(found.get(up), places.ups, places.stream),
        down: widener.matrix(found.get(down), places.stream_out, units),
    }


def widen_attention(places: Places, widener: Widener, source: Tensors | None, prefix: str, query_gain: float) -> dict[str, Tensor]:
    """The four projections below ``prefix``; without a source they yield zero."""
    found = source or {}
    queries, keys, attended = places.queries, places.keys, places.attended
    if source is None:
        queries, keys = (Axis((), axis.size, range(axis.size)) for axis in (queries, keys))
        attended = Axis((), attended.size)
    q, k, v, o = (f"{prefix}.self_attn.{name}_proj.weight" for name in "qkvo")
    return {
        q: widener.matrix(found.get(q), queries, places.stream, query_gain),
        k: widener.matrix(found.get(k), keys, places.stream),
        v: widener.matrix(found.get(v), places.values, places.stream),
        o: widener.matrix(found.get(o), places.stream_out, attended),
    }


def widen_norms(layout: Inflated, widener: Widener, source: Tensors, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Norms over the stream."""
    return {name: widener.vector(source[name], layout.places.stream_out, layout.norm_gain) for name in names}


def _large_tensors(plan: InflatePlan, layout: Inflated, source: Tensors, widener: Widener) -> Iterator[dict[str, Tensor]]:
    """The tensors of each layer, and last those of the ends."""
    places = layout.places
    scale = (places.large.head_dim / places.small.head_dim) ** 0.5  # attention divides by the root of the head's size
    source_of = {large: small for small, large in enumerate(layout.layer_of)}
    for layer in range(plan.layers):
        old, new = f"model.layers.{source_of.get(layer, 0)}", f"model.layers.{layer}"
        norms = (f"{old}.input_layernorm.weight", f"{old}.post_attention_layernorm.weight")
        filling = source if layer in source_of else None
        tensors = widen_norms(layout, widener, source, norms)  # an added layer has the first one's: they meet only what comes to nothing
        tensors |= widen_attention(places, widener, filling, old, scale) | widen_mlp(places, widener, filling, old)
        yield {new + name.removeprefix(old): tensor for name, tensor in tensors.items()}
    embedding = source["model.embed_tokens.weight"]
    vocabulary = Axis(range(len(embedding)), len(embedding))
    whole = Axis(range(places.small.hidden), places.large.hidden, range(places.large.hidden))
    yield {
        "model.embed_tokens.weight": widener.matrix(embedding, vocabulary, whole),
        "lm_head.weight": widener.matrix(source.get("lm_head.weight", embedding), vocabulary, places.stream),
        **widen_norms(layout, widener, source, ("model.norm.weight",)),
    }


def _large_config(plan: InflatePlan, config: Mapping[str, Any], layout: Inflated) -> dict[str, Any]:
    return {
        **config,
        **sizes_in_config(plan.shape),
        "_name_or_path": plan.out.name,
        "num_hidden_layers": plan.layers,
        "rms_norm_eps": float(config["rms_norm_eps"]) * layout.eps_gain,
        "tie_word_embeddings": False,
        "dtype": plan.dtype,
    }


class _Shards:
    """Writes numbered safetensors files and their index."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self._files: dict[str, str] = {}
        self._done = 0
        self.num_parameters = self.num_zeros = self.num_bytes = 0

    def write(self, tensors: Tensors) -> None:
        from safetensors.torch import save_file

        self._done += 1
        name = f"model-{self._done:05d}-of-{self._count:05d}.safetensors"
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, self._folder / name, metadata={"format": "pt"})
        self._files |= dict.fromkeys(tensors, name)
        self.num_parameters += sum(tensor.numel() for tensor in tensors.values())
        self.num_zeros += sum(int((tensor == 0).sum()) for tensor in tensors.values())
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self._files}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is no model folder: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{folder}/config.json must hold a JSON object")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if "model.embed_tokens.weight" not in tensors:
        raise ConfigError(f"{folder} has no safetensors with model.embed_tokens.weight")
    return tensors
