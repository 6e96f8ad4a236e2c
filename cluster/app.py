"""Topologies as builders: each returns a Serve application, for ``serve run`` and ``dspark serve``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from dspark.cluster.autoscaling import LOOK_BACK_S, BusyDraftWorkers, WantedVerifiers
from dspark.cluster.draft_worker import DRAIN_S, DraftLoader, DraftWorkerReplica, load_draft_worker
from dspark.cluster.ingress import Router
from dspark.cluster.ranks import bundles
from dspark.cluster.verifier import Loader, Verifier, load_verifier
from dspark.config import ServeConfig
from dspark.config_file import validate
from dspark.errors import ConfigError

APP_NAME = "dspark"
FAR_OUT = 100_000  # Serve's own limits: our admission decides long before they are reached
HEALTH_CHECKS = 3  # without an answer in a row, and Serve replaces a process
HEALTH_PERIOD_S = 5.0
LEEWAY_S = 30.0  # between the end of our drain and Serve's kill
QUIET = {"enable_access_log": False, "log_level": "WARNING"}


def build_colocated(args: ServeConfig | Mapping[str, Any]) -> Application:
    """Routers in front of verifiers that draft on their own device.

    ``args`` is a ``ServeConfig`` or its fields, as a Serve YAML gives them; ``ConfigError`` names a key that is wrong.
    """
    return assemble(as_config(args, "colocated"))


def build_disaggregated(args: ServeConfig | Mapping[str, Any]) -> Application:
    """Routers in front of verifiers that draft with draft workers; drafts go between those two directly.

    ``args`` as in ``build_colocated``.
    """
    return assemble(as_config(args, "disaggregated"))


def build(config: ServeConfig) -> Application:
    """The application of the topology that the configuration names."""
    return {"colocated": build_colocated, "disaggregated": build_disaggregated}[config.topology](config)


def as_config(args: ServeConfig | Mapping[str, Any], topology: str) -> ServeConfig:
    """A checked configuration of a topology; ConfigError if it is one of another."""
    config = args if isinstance(args, ServeConfig) else validate(ServeConfig, {"topology": topology} | dict(args), {})
    if config.topology != topology:
        raise ConfigError(f"topology {config.topology}: this application is {topology}")
    return config


def assemble(config: ServeConfig, loader: Loader = load_verifier, draft_loader: DraftLoader = load_draft_worker) -> Application:
    """The application around any loaders of engines and draft workers."""
    gpus = _gpus(config, "engine.device")
    places = verifier_scaling(config) | bundles(config.engine.num_ranks, gpus)
    verifier = _deployment(Verifier, "Verifier", places, gpus, config.drain_s, config.silence_s)
    router = _deployment(Router, "Router", {"num_replicas": config.num_routers}, 0.0, config.drain_s, config.silence_s)
    drafting: tuple[Any, ...] = ()
    if config.topology == "disaggregated":
        workers = draft_worker_scaling(config, config.num_draft_workers)
        draft_worker = _deployment(DraftWorkerReplica, "DraftWorker", workers, _gpus(config, "draft_device"), DRAIN_S, config.silence_s)
        drafting = (draft_worker.bind(config, draft_loader),)
    app: Application = router.bind(verifier.bind(config, loader, *drafting), config, *drafting)
    return app


def _deployment(replica: type, name: str, places: Mapping[str, Any], gpus: float, drain_s: float, silence_s: float) -> Any:
    """A Serve deployment that leaves all limits to us and gives its replicas time to drain; ``places``: how many, and where.

    A replica that has not answered for about ``silence_s`` is replaced.
    """
    return serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        graceful_shutdown_timeout_s=drain_s + LEEWAY_S,
        graceful_shutdown_wait_loop_s=0.1,
        max_ongoing_requests=FAR_OUT,
        max_queued_requests=-1,
        health_check_period_s=min(HEALTH_PERIOD_S, silence_s / HEALTH_CHECKS),
        health_check_timeout_s=silence_s / HEALTH_CHECKS,
        logging_config=QUIET,
        **places,
    )(replica)


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


def _gpus(config: ServeConfig, key: str) -> float:
    """GPUs that each process of a replica asks Ray for. ``auto`` takes one if the cluster has any."""
    device = config.draft_device if key == "draft_device" and config.draft_device is not None else config.engine.device
    if device.startswith("cuda:"):
        raise ConfigError(f"{key} {device}: Ray gives each replica a GPU; say cuda, and choose GPUs with CUDA_VISIBLE_DEVICES")
    if device == "auto":
        has_gpu = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1  # type: ignore[no-untyped-call]
        return 1.0 if has_gpu else 0.0
    return 0.0 if device == "cpu" else 1.0
