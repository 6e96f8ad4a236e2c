"""Training state on disk: one safetensors file, replaced by a rename, so that a killed run finds its last checkpoint whole.

Names: ``module.<parameter>``, ``optimizer.<state>.<parameter>``; the counters travel in the file's metadata. Nothing is
drawn from a generator that lives across steps, so weights, optimizer and counters are the whole state.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dspark.errors import ConfigError
from dspark.training.files import write_whole

FILE = "last.safetensors"


@dataclass(slots=True)
class Counters:
    """Where a run is: optimizer steps done, the next batch, and seconds trained."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    tokens: int = 0


def save(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, counters: Counters, identity: str) -> None:
    """Replace the folder's checkpoint; ConfigError, the old one untouched, if the disk refuses."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{key}.{names[parameter]}": value for key, value in state.items()}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {key: repr(value) for key, value in asdict(counters).items()} | {"identity": identity}
    write_whole(folder / FILE, lambda path: save_file(on_cpu, path, metadata=metadata))


def load(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, identity: str) -> Counters | None:
    """Restore the folder's checkpoint and return its counters; None if there is none. ConfigError if it belongs to other settings."""
    if not (folder / FILE).exists():
        return None
    tensors, metadata = _read(folder / FILE)
    if metadata.get("identity") != identity:
        raise ConfigError(f"checkpoint {folder / FILE} was made with other settings or data; choose another folder or delete it")
    _load_module(module, tensors)
    _load_optimizer(optimizer, dict(module.named_parameters()), tensors)
    return Counters(
        step=int(metadata["step"]),
        epoch=int(metadata["epoch"]),
        batch=int(metadata["batch"]),
        seconds=float(metadata["seconds"]),
        tokens=int(metadata["tokens"]),
    )


def load_module(folder: Path, module: nn.Module) -> bool:
    """Restore only the weights; False if there is no checkpoint. ConfigError if they have other shapes."""
    if not (folder / FILE).exists():
        return False
    tensors, _ = _read(folder / FILE)
    try:
        _load_module(module, tensors)
    except RuntimeError as error:
        raise ConfigError(f"checkpoint {folder / FILE} was made with other drafter settings") from error
    return True


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"checkpoint {path} cannot be read: {error}") from error


def _load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    module.load_state_dict({name.removeprefix("module."): t for name, t in tensors.items() if name.startswith("module.")})


def _load_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    optimizer.state.clear()
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, key, parameter_name = name.split(".", 2)
            parameter = parameters[parameter_name]
            where = torch.device("cpu") if key == "step" and not optimizer.defaults.get("fused") else parameter.device
            optimizer.state[parameter][key] = tensor.to(where)
