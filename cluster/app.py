"""Topologies as builders: each returns a Serve application. ``build_colocated`` is what ``serve run`` and ``dspark serve`` use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application

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
        num_replicas=config.num_verifiers,
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


def _gpus(device: str) -> float:
    """GPUs each rank of a verifier asks Ray for. ``auto`` takes one if the cluster has any."""
    if device.startswith("cuda:"):
        raise ConfigError(f"engine.device {device}: Ray gives each verifier a GPU; say cuda, and choose GPUs with CUDA_VISIBLE_DEVICES")
    if device == "auto":
        has_gpu = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1  # type: ignore[no-untyped-call]
        return 1.0 if has_gpu else 0.0
    return 0.0 if device == "cpu" else 1.0
