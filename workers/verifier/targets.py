"""Target models: any causal LM of transformers whose attention goes through the attention interface.

A family is served if its state is addressed by position (KV) and every layer's attention reaches ``paged_forward``.
That is found out by running, not by a list: a probe notes the KV shape of each layer, and a second run compares our logits
with the model's own. Families that keep other state are refused by name, with the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dspark.errors import ConfigError
from dspark.kernels.paged_attention import AttentionRow
from dspark.workers.verifier.attention import ATTENTION_NAME, KVStore, LayerShape, ProbeStep, make_step, register

if TYPE_CHECKING:
    from dspark.workers.verifier.parallel.leader import Ranks

SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
CHECK_LENGTH = 24
# worst median relative error of a row's logits; bf16 rows differ by batch shape alone (3 decimal digits)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 3e-2}


@dataclass(slots=True)
class Target:
    """A loaded model, ready for ``Runner``; with ``ranks``, the leader's share of one."""

    model: PreTrainedModel
    name: str
    layers: dict[int, LayerShape]
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position: int
    eos_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    num_parameters: int  # of the whole model
    ranks: Ranks | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        return KVStore.bytes_per_token(self.layers, self.dtype.itemsize)

    def check(self) -> None:
        """WorkerLost if a rank was lost. Ask before results of a step are used: on a GPU they may be garbage."""
        if self.ranks is not None:
            self.ranks.check()

    def decoder_layers(self) -> nn.ModuleList:
        """The layers that taps read, in order."""
        return decoder_layers(self.model)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's stack of decoder layers."""
    layers = getattr(model.get_decoder(), "layers", None)  # type: ignore[no-untyped-call]
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"{type(model).__name__} has no list of decoder layers that taps could read")
    return layers


def check_model_folder(name: str) -> None:
    """Refuse a local folder that cannot hold a model, before anything is loaded."""
    folder = Path(name)
    if not folder.exists():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise ConfigError(f"model {name!r}: no such folder, and not a hub name of the form owner/name")
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model {name!r}: the folder has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model {name!r}: the folder has no *.safetensors weights (other weight formats are not loaded)")


def load_model(name: str, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> PreTrainedModel:
    """Load a causal LM from a folder or the hub with our attention; never runs code from the checkpoint."""
    config = load_config(name, revision)
    check_architecture(config)
    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, revision=revision, attn_implementation=ATTENTION_NAME, use_safetensors=True
        )
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ConfigError(f"model {name!r} cannot be loaded: {error}") from error
    placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]  # the stub binds the wrapped method wrongly
    placed.eval()  # type: ignore[no-untyped-call]
    return placed


def load_config(name: str, revision: str | None = None) -> Any:
    """The configuration of a model in a folder or on the hub."""
    check_model_folder(name)
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ConfigError(f"model {name!r} cannot be loaded: {error}") from error


def architecture(config: Any) -> str:
    """What a configuration calls its model."""
    return (getattr(config, "architectures", None) or [config.model_type])[0]  # type: ignore[no-any-return]


def check_architecture(config: Any) -> None:
    """Refuse families whose state is more than KV addressed by position."""
    text = config.get_text_config(decoder=True)
    name = architecture(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{name} is an encoder-decoder model; only decoder-only models are served")
    other = set(getattr(text, "layer_types", None) or ()) - SERVED_LAYER_TYPES
    if other:
        raise ConfigError(
            f"{name} cannot be served: layers of type {', '.join(sorted(other))} keep state that is not addressed by position,"
            " so rejected draft tokens could not be rolled back"
        )
    if getattr(text, "index_topk", None) is not None:
        raise ConfigError(f"{name} cannot be served: its attention picks positions with an indexer that keeps its own cache")
    for key in ("ssm_state_size", "mamba_d_state", "state_size", "linear_conv_kernel_dim", "linear_attn_config"):
        if getattr(text, key, None) is not None:
            raise ConfigError(f"{name} cannot be served: it mixes tokens with a recurrent state ({key}), which cannot be rolled back")


def as_target(model: PreTrainedModel, name: str) -> Target:
    """Probe a loaded model, check our logits against its own, and note what the engine needs to know."""
    register()
    check_architecture(model.config)
    if getattr(model, "_is_stateful", False):
        raise ConfigError(f"{type(model).__name__} cannot be served: it is stateful, and its state cannot be rolled back")
    config = model.config.get_text_config(decoder=True)
    layers = probe_layers(model)
    stack = decoder_layers(model)
    target = Target(
        model=model,
        name=name,
        layers=layers,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=len(stack),
        max_position=int(getattr(config, "max_position_embeddings", 0) or 4096),
        eos_ids=eos_ids(model),
        dtype=model.dtype,
        device=model.device,
        num_parameters=sum(p.numel() for p in model.parameters()),
    )
    check_faithful(target, own_logits(model))
    return target


def eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """End-of-sequence ids of the generation config, then of the model's."""
    found: list[int] = []
    for config in (model.generation_config, model.config.get_text_config(decoder=True)):
        value = getattr(config, "eos_token_id", None)
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if token is not None and token not in found:
                found.append(int(token))
    return tuple(found)


@torch.inference_mode()
def probe_layers(model: PreTrainedModel) -> dict[int, LayerShape]:
    """Run two tokens and note the KV shapes of every attention layer."""
    model.set_attn_implementation(ATTENTION_NAME)
    step = ProbeStep()
    ids = torch.tensor([[0, 1]], device=model.device)
    positions = torch.tensor([[0, 1]], device=model.device)
    try:
        model(ids, position_ids=positions, use_cache=False, step=step)
    except (TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{type(model).__name__} cannot be served: its attention does not run through the interface ({error})") from error
    layers = step.layers()
    expected = len(decoder_layers(model))
    if len(layers) < expected:
        raise ConfigError(
            f"{type(model).__name__} cannot be served: only {len(layers)} of its {expected} layers use the attention interface;"
            " the others keep state of their own"
        )
    return layers


def _check_input(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Token ids and positions [1, CHECK_LENGTH] of the self-check."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, vocab_size, (1, CHECK_LENGTH), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device), torch.arange(CHECK_LENGTH, device=model.device).unsqueeze(0)


@torch.inference_mode()
def own_logits(model: PreTrainedModel) -> Tensor:
    """Logits [CHECK_LENGTH, V] of the self-check through the model's own attention."""
    ids, positions = _check_input(model)
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(ids, position_ids=positions, use_cache=False).logits[0].float()
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    return logits


@torch.inference_mode()
def paged_logits(target: Target) -> Tensor:
    """Logits [CHECK_LENGTH, V] of the self-check in two chunks through paged attention."""
    model, length = target.model, CHECK_LENGTH
    ids, positions = _check_input(model)
    store = KVStore(target.layers, 2, 16, torch.empty(0, dtype=target.dtype, device=target.device))
    parts = []
    for begin, end in ((0, length // 2), (length // 2, length)):
        slots = [(position + 16) % 32 for position in range(begin, end)]
        step = make_step(store, [AttentionRow(0, end - begin, end, (1, 0))], slots, padding=0)
        parts.append(model(ids[:, begin:end], position_ids=positions[:, begin:end], use_cache=False, step=step).logits[0].float())
    return torch.cat(parts)


def check_faithful(target: Target, expected: Tensor) -> None:
    """Compare the logits through paged attention with the model's own; ConfigError if they differ."""
    error = _relative_error(paged_logits(target), expected)
    if not error <= TOLERANCE[target.dtype]:
        raise ConfigError(
            f"{type(target.model).__name__} cannot be served: its logits through paged attention differ from its own by {error:.2g}"
            f" (relative, allowed {TOLERANCE[target.dtype]:g})"
        )


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Median over rows: a mixture of experts in bf16 may route a single token differently."""
    centred = expected - expected.mean(-1, keepdim=True)
    return float(((actual - expected).norm(dim=-1) / centred.norm(dim=-1).clamp_min(1e-6)).median())


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The model's tokenizer, or None if the folder has none."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        if Path(name).is_dir() and not any(Path(name).glob("tokenizer*")):
            return None
        raise ConfigError(f"model {name!r}: its tokenizer cannot be loaded: {error}") from error
