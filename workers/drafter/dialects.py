"""Load a drafter for a target and refuse one that was made for another."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dspark.errors import ConfigError
from dspark.workers.drafter import checkpoint
from dspark.workers.drafter.calibration import read_signals, read_temperatures
from dspark.workers.drafter.dialect_configs import read_module_config
from dspark.workers.drafter.draft_vocabulary import read_draft_vocabulary, restrict_vocabulary
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.eagle3_configs import is_eagle3, read_eagle3_config
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.grafted import FeatureProjection
from dspark.workers.drafter.module_config import ModuleConfig
from dspark.workers.drafter.target_head import TargetHead

HEAD_CONTAINER = "logit_head."  # early SpecForge checkpoints keep their heads below it
SHARED = ("embed_tokens.weight", "lm_head.weight")
IGNORED = ("verifier_lm_head.weight", "verifier_norm.weight", "t2d", "rotary_emb.inv_freq")


def load_drafter(folder: Path, head: TargetHead, dtype: torch.dtype, device: torch.device) -> DSparkModule | Eagle3Module:
    """The drafter in ``folder``, ready to draft for the target whose ends are ``head``.

    ConfigError, naming the folder and both shapes, if it was made for another target; or naming the key or weight that is
    missing, unknown or not supported.
    """
    raw = checkpoint.read_config(folder)
    is_eagle = is_eagle3(raw)
    tensors = {_own_name(name, is_eagle): t for name, t in checkpoint.read_tensors(folder, dtype, device).items()}
    if any(name.startswith("mtp.") for name in tensors):
        raise ConfigError(f"drafter: {folder}: weights under mtp.* belong to a drafter bundled with its target, which is not supported")
    has_qk_norm = any(name.endswith("self_attn.q_norm.weight") for name in tensors)
    config = read_eagle3_config(folder, raw, has_qk_norm, head.num_layers) if is_eagle else read_module_config(folder, raw, has_qk_norm)
    _check_fits(folder, config, head, raw.get("num_target_layers"))
    shared = {name: tensors.pop(name) for name in SHARED if name in tensors}
    mapping = tensors.pop("d2t", None)
    _check_shared(folder, config, head, shared)
    module: DSparkModule | Eagle3Module
    with torch.device("meta"):
        module = Eagle3Module(config, head) if is_eagle else DSparkModule(config, head)
    _assign(folder, module, {name: t for name, t in tensors.items() if not _is_ignored(name, config)})
    if config.draft_vocab_size < config.vocab_size:
        module.use_draft_vocabulary(_target_ids(folder, config, mapping), shared.get("lm_head.weight"))
    elif isinstance(module, Eagle3Module):
        module.use_draft_vocabulary(None, shared.get("lm_head.weight"))
    elif device.type == "cpu" and (frequent := read_draft_vocabulary(folder, config.vocab_size)) is not None:
        restrict_vocabulary(module, frequent)
    if isinstance(module, DSparkModule):
        module.confidence_temperatures = read_temperatures(folder, config.block_size, device)
    module.signals = read_signals(folder, config.block_size, config.has_confidence)
    return module.requires_grad_(False).eval()


def load_projection(folder: Path, head: TargetHead, dtype: torch.dtype, device: torch.device) -> FeatureProjection:
    """The part of the drafter in ``folder`` that turns taps of its target into features; ConfigError as ``load_drafter``."""
    raw = checkpoint.read_config(folder)
    if is_eagle3(raw):
        raise ConfigError(f"drafter: {folder}: EAGLE-3 drafters are grafted onto their target only; draft workers drive DSpark and DFlash")
    names = {name.removeprefix(HEAD_CONTAINER) for name in checkpoint.tensor_names(folder)}
    config = read_module_config(folder, raw, has_qk_norm="layers.0.self_attn.q_norm.weight" in names)
    _check_fits(folder, config, head, raw.get("num_target_layers"))
    with torch.device("meta"):
        projection = FeatureProjection(config)
    _assign(folder, projection, checkpoint.read_tensors(folder, dtype, device, projection.state_dict().keys()))
    projection.signals = read_signals(folder, config.block_size, config.has_confidence)
    return projection.requires_grad_(False).eval()


def _own_name(name: str, is_eagle: bool) -> str:
    """Our name of a checkpoint's weight: EAGLE-3's layer is ``midlayer`` in EAGLE's dialect and ours, ``layers.0`` in the others."""
    name = name.removeprefix(HEAD_CONTAINER)
    return name.replace("layers.0.", "midlayer.", 1) if is_eagle and name.startswith("layers.0.") else name


def _check_fits(folder: Path, config: ModuleConfig, head: TargetHead, num_target_layers: int | None) -> None:
    pairs = [
        ("hidden_size", config.hidden_size, head.hidden_size),
        ("vocab_size", config.vocab_size, head.vocab_size),
        ("num_target_layers", head.num_layers if num_target_layers is None else num_target_layers, head.num_layers),
    ]
    wrong = [f"its {name} is {own}, the target's is {target}" for name, own, target in pairs if own != target]
    if wrong:
        raise ConfigError(f"drafter: {folder} was made for another target than this {head.model_type}: {'; '.join(wrong)}")
    if config.draft_vocab_size > config.vocab_size:
        raise ConfigError(f"drafter: {folder}: draft_vocab_size {config.draft_vocab_size} is over vocab_size {config.vocab_size}")
    if any(not -1 <= tap < head.num_layers for tap in config.target_layer_ids):
        raise ConfigError(f"drafter: {folder} taps target layers {list(config.target_layer_ids)}, but the target has {head.num_layers}")
    if config.mask_token_id >= head.embed.shape[0]:
        raise ConfigError(
            f"drafter: {folder}: mask_token_id {config.mask_token_id} is not among the target's {head.embed.shape[0]} embeddings"
        )


def _check_shared(folder: Path, config: ModuleConfig, head: TargetHead, shared: dict[str, Tensor]) -> None:
    """Embedding and head of the checkpoint are not used, so they must at least be the target's in shape."""
    for name, tensor in shared.items():
        rows = config.draft_vocab_size if name == "lm_head.weight" else config.vocab_size
        expected = (rows, head.hidden_size)
        if tuple(tensor.shape) != expected:
            raise ConfigError(f"drafter: {folder}: {name} is {list(tensor.shape)}, the target needs {list(expected)}")


def _assign(folder: Path, module: FeatureProjection, tensors: dict[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ConfigError(f"drafter: {folder} lacks the weights {_some(missing)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise ConfigError(f"drafter: {folder} has weights that its configuration does not call for: {_some(unknown)}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ConfigError(
                f"drafter: {folder}: {name} is {list(tensors[name].shape)}, its configuration and target call for {list(shape)}"
            )
    module.load_state_dict(tensors, assign=True)


def _target_ids(folder: Path, config: ModuleConfig, mapping: Tensor | None) -> Tensor:
    """Target ids of the draft vocabulary from ``d2t``, which holds the offset of each draft id."""
    count = config.draft_vocab_size
    if mapping is None or tuple(mapping.shape) != (count,):
        shape = None if mapping is None else list(mapping.shape)
        raise ConfigError(f"drafter: {folder}: draft_vocab_size {count} needs a d2t of shape [{count}], found {shape}")
    ids = torch.arange(count, device=mapping.device) + mapping.to(torch.int64)
    if int(ids[0]) < 0 or int(ids[-1]) >= config.vocab_size or bool((ids.diff() <= 0).any()):
        raise ConfigError(f"drafter: {folder}: d2t must map draft ids to rising target ids below {config.vocab_size}")
    return ids


def _is_ignored(name: str, config: ModuleConfig) -> bool:
    return name in IGNORED or (name.startswith("confidence_head.") and not config.has_confidence)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
