"""The target's embedding and output head for a drafter, with or without the layers between them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_file

from dspark.errors import ConfigError
from dspark.workers.drafter.target_head import TargetHead

INDEX_FILE: Final = "model.safetensors.index.json"
WEIGHTS_FILE: Final = "model.safetensors"
SAMPLED_ROWS: Final = 1024


def head_of(model: Any, embed: Tensor, lm_head: Tensor) -> TargetHead:
    """The ends of a causal LM of transformers, which may be on the meta device: the tensors are given."""
    config = model.config.get_text_config(decoder=True)
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    return TargetHead(
        embed=embed,
        lm_head=lm_head,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=len(model.get_decoder().layers),
        model_type=config.model_type,
        embed_scale=float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def load_target_head(name: str, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> TargetHead:
    """The ends of the model ``name`` (a folder or a hub name): two tensors are read, no layer. ConfigError if they are not found."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} cannot be read: {error}") from error
    files = _Files(name, revision)
    embed = files.read(_parameter(model, model.get_input_embeddings()), dtype, device)
    head_name = _parameter(model, model.get_output_embeddings())
    tied = bool(getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False))
    return head_of(model, embed, embed if tied else files.read(head_name, dtype, device))


def fingerprint(head: TargetHead) -> str:
    """Names the target as far as a drafter sees it: its shape, and rows of its embedding and head all over the vocabulary."""
    shape = (head.hidden_size, head.vocab_size, head.num_layers, head.model_type, head.embed_scale, head.softcap)
    digest = hashlib.sha256(repr(shape).encode())
    for tensor in (head.embed, head.lm_head):
        rows = torch.linspace(0, tensor.shape[0] - 1, min(SAMPLED_ROWS, tensor.shape[0])).long()
        sample = tensor.detach()[rows.to(tensor.device)].cpu().contiguous()
        digest.update(f"{tensor.dtype}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _parameter(model: Any, module: Any) -> str:
    """The name of a module's weight in the model."""
    for name, found in model.named_modules():
        if found is module and module is not None:
            return f"{name}.weight"
    raise ConfigError(f"{type(model).__name__} has no embedding or output head that a drafter could share")


class _Files:
    """Weight files of a model, found where transformers finds them."""

    def __init__(self, name: str, revision: str | None) -> None:
        self._name = name
        self._revision = revision
        index = self._find(INDEX_FILE)
        if index is not None:
            shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._shard_of = shards
        else:
            self._shard_of = dict.fromkeys(self._names(WEIGHTS_FILE), WEIGHTS_FILE)

    def read(self, parameter: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A parameter by its name in the model; checkpoints may have a prefix more or less."""
        ending = ".".join(parameter.split(".")[-2:])
        fitting = [name for name in self._shard_of if name == parameter] or [
            name for name in self._shard_of if name == ending or name.endswith(f".{ending}")
        ]
        if len(fitting) != 1:
            raise ConfigError(f"model {self._name!r}: {len(fitting)} tensors of its checkpoint could be {parameter}")
        path = self._find(self._shard_of[fitting[0]])
        try:
            with safe_open(str(path), framework="pt") as file:
                tensor: Tensor = file.get_tensor(fitting[0])
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"model {self._name!r}: {path} cannot be read: {error}") from error
        return tensor.to(device=device, dtype=dtype)

    def _names(self, file_name: str) -> list[str]:
        path = self._find(file_name)
        if path is None:
            raise ConfigError(f"model {self._name!r} has neither {INDEX_FILE} nor {WEIGHTS_FILE}")
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())

    def _find(self, file_name: str) -> Path | None:
        found = cached_file(
            self._name,
            file_name,
            revision=self._revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)
