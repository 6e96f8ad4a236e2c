"""Topologies as builders: each returns a Serve application. ``build_colocated`` is what ``serve run`` and ``dspark serve`` use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from dspark.cluster.autoscaling import LOOK_BACK_S, BusyDraftWorkers, WantedVerifiers
from dspark.cluster.ingress import Router
from dspark.cluster.ranks import bundles
from dspark.cluster.verifier import Loader, Verifier, load_verifier
from dspark.config import ServeConfig
from dspark.config_file import validate
from dspark.errors import ConfigError

APP_NAME = "dspark"
FAR_OUT = 100_000  # Serve's own limits: our admission decides long before they are reached
LEEWAY_S = 30.0  # between the end of our drain and Serve's kill
QUIET = {"enable_access_log": False, "log_level": "WARNING"}


def build_colocated(args: ServeConfig | Mapping[str, Any]) -> Application:
    """Routers in front of verifiers that draft on their own device.

    ``args`` is a ``ServeConfig`` or its fields, as a Serve YAML gives them; ``ConfigError`` names a key that is wrong.
    """
    return assemble(as_config(args))


def as_config(args: ServeConfig | Mapping[str, Any]) -> ServeConfig:
    """A checked configuration."""
    return args if isinstance(args, ServeConfig) else validate(ServeConfig, args, {})


def assemble(config: ServeConfig, loader: Loader = load_verifier) -> Application:
    """The application around any engine loader."""
    shared: dict[str, Any] = {
        "max_ongoing_requests": FAR_OUT,
        "max_queued_requests": -1,
        "health_check_period_s": 5.0,
        "logging_config": QUIET,
    }
    gpus = _gpus(config.engine.device)
    verifier = serve.deployment(
        name="Verifier",
        **verifier_scaling(config),
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        **bundles(config.engine.num_ranks, gpus),
        graceful_shutdown_timeout_s=config.drain_s + LEEWAY_S,
        graceful_shutdown_wait_loop_s=0.1,
        **shared,
    )(Verifier)
    router = serve.deployment(
        name="Router",
        num_replicas=config.num_routers,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.drain_s + LEEWAY_S,
        graceful_shutdown_wait_loop_s=0.2,
        **shared,
    )(Router)
    app: Application = router.bind(verifier.bind(config, loader), config)
    return app


def verifier_scaling(config: ServeConfig) -> dict[str, Any]:
    """Serve's options for the number of verifiers: fixed, or what the routers want."""
    scale = config.autoscale
    if scale.max_verifiers is None:
        return {"num_replicas": config.num_verifiers}
    return {"autoscaling_config": _autoscaling(scale.min_verifiers, scale.max_verifiers, config.num_verifiers, WantedVerifiers, {})}


def draft_worker_scaling(config: ServeConfig, num_draft_workers: int) -> dict[str, Any]:
    """Serve's options for the number of draft workers. Replicas report their ``stats`` as autoscaling stats."""
    scale = config.autoscale
    if scale.max_draft_workers is None:
        return {"num_replicas": num_draft_workers}
    rules = {
        "min_count": scale.min_draft_workers,
        "max_count": scale.max_draft_workers,
        "up_cooldown_s": scale.up_cooldown_s,
        "down_cooldown_s": scale.down_cooldown_s,
        "start_timeout_s": scale.start_timeout_s,
    }
    arguments = {"rules": rules, "window_s": scale.scaling_window_s}
    bounds = (scale.min_draft_workers, scale.max_draft_workers, num_draft_workers)
    return {"autoscaling_config": _autoscaling(*bounds, BusyDraftWorkers, arguments)}


def _autoscaling(least: int, most: int, first: int, policy: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """A policy of ours decides alone: its own cooldowns, and none of Serve's."""
    return {
        "min_replicas": least,
        "max_replicas": most,
        "initial_replicas": first,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "look_back_period_s": LOOK_BACK_S,
        "policy": {"policy_function": f"{policy.__module__}:{policy.__name__}", "policy_kwargs": arguments},
    }


def _gpus(device: str) -> float:
    """GPUs each rank of a verifier asks Ray for. ``auto`` takes one if the cluster has any."""
    if device.startswith("cuda:"):
        raise ConfigError(f"engine.device {device}: Ray gives each verifier a GPU; say cuda, and choose GPUs with CUDA_VISIBLE_DEVICES")
    if device == "auto":
        has_gpu = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1  # type: ignore[no-untyped-call]
        return 1.0 if has_gpu else 0.0
    return 0.0 if device == "cpu" else 1.0
