"""Train on several workers through Ray Train: one process each, gradients averaged (DDP), restarted together when one dies.

Every worker loads the target and reads the data itself, so the run's folder must be one that all of them see. The first writes
checkpoints there; after a death Ray starts the group again, and it goes on from the last one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from dspark.errors import ConfigError
from dspark.training.config import TrainConfig
from dspark.training.shards import read_corpus
from dspark.training.target import load_target, resolve_device
from dspark.training.trainer import Trainer
from dspark.training.world import World

Progress = Callable[[str], None]
MAX_RESTARTS = 3


def train_on_ray(config: TrainConfig, num_workers: int, progress: Progress, max_seconds: float | None = None) -> bool:
    """As ``trainer.train``, on ``num_workers`` workers of the Ray cluster at hand, or of one started here.

    ConfigError without Ray Train, for what the workers refuse, or when they died more than ``MAX_RESTARTS`` times.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise ConfigError(f"--num-workers needs Ray Train ({error}); install dspark-serve[train]") from error
    read_corpus(config.data)  # refused here, before anything is started
    uses_gpu = resolve_device(config.device).type == "cuda"
    if not ray.is_initialized():
        ray.init()
    progress(f"training on {num_workers} {'GPUs' if uses_gpu else 'CPU workers'} of Ray")
    make_trainer: Any = TorchTrainer  # its stubs know neither a training function's result nor where to find it
    trainer = make_trainer(
        _work,
        train_loop_config={"config": config.model_dump_json(), "max_seconds": max_seconds},
        torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=uses_gpu),
        run_config=RunConfig(
            name="drafter", storage_path=str(config.out.absolute() / "ray"), failure_config=FailureConfig(max_failures=MAX_RESTARTS)
        ),
    )
    try:
        done: bool | str = trainer.fit().return_value
    except WorkerGroupError as error:
        refused = [str(failure) for failure in error.worker_failures.values() if isinstance(failure, ConfigError)]
        raise ConfigError(refused[0] if refused else f"training on Ray failed: {error}") from error
    except ray.train.TrainingFailedError as error:
        raise ConfigError(f"training on Ray failed: {error}") from error
    if isinstance(done, str):
        raise ConfigError(done)
    return done


def _work(settings: dict[str, Any]) -> bool | str:
    """One worker's life; whether the schedule is done, or what every worker refuses alike: a raise would be tried again."""
    import ray.train.torch

    config = TrainConfig.model_validate_json(settings["config"])
    device = ray.train.torch.get_device() if resolve_device(config.device).type == "cuda" else torch.device("cpu")
    world = World.of_process_group(device)
    try:
        target, tokenizer = load_target(config.model_copy(update={"device": str(device)}))
        trainer = Trainer(config, target, tokenizer, _say, world)
    except ConfigError as error:
        return str(error)
    return trainer.run(settings["max_seconds"])


def _say(line: str) -> None:
    """To the driver's screen. Not by print, which Ray Train replaces and repeats."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
