"""The frozen target of a training run: loading it, naming it, and running it for features."""

from __future__ import annotations

import gc
import hashlib
from typing import Any

import torch

from dspark.deploy.default_model import DEFAULT_MODEL_NAME, default_cache, prepare
from dspark.errors import ConfigError
from dspark.training.config import TrainConfig
from dspark.workers.verifier.targets import Target, as_target, load_model, load_tokenizer


def load_target(config: TrainConfig) -> tuple[Target, Any]:
    """The target and its tokenizer (None if it has none)."""
    device = resolve_device(config.device)
    folder = config.model or str(prepare(default_cache(), lambda _: None))
    model = load_model(folder, resolve_dtype(config, device), device, config.revision)
    model.requires_grad_(False)
    return as_target(model, config.model or DEFAULT_MODEL_NAME), load_tokenizer(folder, config.revision)


def resolve_device(name: str) -> torch.device:
    """The device that a setting names; ConfigError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this machine has no usable CUDA device")
    return device


def resolve_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The target's dtype; auto is bfloat16 where the device has it."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]  # the names are checked by TrainConfig
    return torch.bfloat16 if device.type == "cpu" or torch.cuda.is_bf16_supported() else torch.float16


def fingerprint(target: Target) -> str:
    """A name for these weights: shapes, and some values of every tensor."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in target.model.state_dict().items():
        flat = tensor.flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return f"{type(target.model).__name__}-{digest.hexdigest()}"


def release_memory() -> None:
    """Give back what dropped modules and engines had of a GPU, so that the next one measures what is free and what it takes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> str:
    """What a report says of the GPU memory that tensors took at most; nothing on a CPU."""
    return f", at most {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory" if device.type == "cuda" else ""


def template_digest(tokenizer: Any) -> str:
    """A name for the chat template."""
    return hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=12).hexdigest()
