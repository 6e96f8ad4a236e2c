"""``dspark serve``: what is checked, prepared and printed around a local Ray (``cluster/local_ray.py``)."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from typing import Any, Final

from dspark.config import EngineConfig, ServeConfig
from dspark.config_file import effective
from dspark.errors import ConfigError
from dspark.status import local_url

# Ray reads these when it is imported. With the first it takes 127.0.0.1 for the node's address, as it does on a Mac;
# otherwise its control plane listens on all interfaces, whatever address it is given. Only the ports of Serve's replicas
# still do; nobody gets anything from them, or from any other port of Ray, without the token.
BEFORE_RAY: Final = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


def serve_forever(config: ServeConfig, show_dashboard: bool = False) -> None:
    """Serve until SIGINT or SIGTERM, then drain and leave no process behind. A second signal ends the drain.

    Raises ``ConfigError`` before anything is started if the port is taken or the model cannot be prepared, and the
    engine's own error if it cannot be loaded.
    """
    started = time.monotonic()
    if "ray" not in sys.modules:
        for name, value in BEFORE_RAY.items():
            os.environ.setdefault(name, value)
    from dspark.cluster.local_ray import LocalServer

    config = _with_threads(config)
    check_port(config.host, config.port)
    if config.engine.model is None:
        from dspark.deploy.default_model import default_cache, prepare

        prepare(default_cache(), say)
    with LocalServer(config, show_dashboard, say) as server:
        described = server.deploy()
        if described is None:  # a signal came first
            return
        for line in summary(config, described):
            say(line)
        docs = f" (docs: {url(config)}/docs)" if config.show_docs else ""
        say(f"ready in {time.monotonic() - started:.0f} s: {url(config)}{docs}")
        server.serve()


def url(config: ServeConfig) -> str:
    """Where clients on this machine find the server."""
    return local_url(config.host, config.port)


def check_port(host: str, port: int) -> None:
    """ConfigError if the port cannot be bound now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise ConfigError(f"port {port} on {host} {reason}; choose another with --port or DSPARK_PORT") from error


def summary(config: ServeConfig, described: dict[str, Any]) -> list[str]:
    """The effective configuration, one line a key (``*``: set by the user), and the KV capacity."""
    engine = config.engine.model_copy(update={key: described[key] for key in EngineConfig.model_fields if key in described})
    chosen = effective(config)
    resolved = effective(config.model_copy(update={"engine": engine}))
    width = max(len(setting.path) for setting in chosen)
    lines = ["effective configuration (* set by you):"]
    lines += [f"{' ' if given.is_default else '*'} {given.path:<{width}}  {now.value}" for given, now in zip(chosen, resolved, strict=True)]
    tokens, requests = described["kv_capacity_tokens"], described["kv_capacity_requests"]
    longest = described["max_model_len"]
    lines.append(f"KV capacity: {tokens} tokens, {requests} requests of the full {longest} tokens ({config.num_verifiers} x this)")
    if (worker := described.get("draft_worker")) is not None:
        context, place = worker["kv_capacity_tokens"], f"{worker['dtype']} on {worker['device']}"
        lines.append(f"draft workers: context of {context} tokens, {place} ({config.num_draft_workers} x this)")
    return lines


def _with_threads(config: ServeConfig) -> ServeConfig:
    """Compute threads of every process, if they are not set.

    OMP_NUM_THREADS of this shell; inside Ray the variable means something else. Otherwise several processes share the cores of this
    machine: teams that take all of them each would wait for one another at every product.
    """
    if config.engine.threads is not None:
        return config
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value.isdigit() and int(value) > 0:
        threads = int(value)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = config.num_verifiers * config.engine.num_ranks + (config.num_draft_workers if config.topology == "disaggregated" else 0)
        if processes == 1:
            return config
        threads = max(1, cores // processes)
        say(f"{processes} processes share {cores} cores: {threads} compute threads each (--threads sets it)")
    return config.model_copy(update={"engine": config.engine.model_copy(update={"threads": threads})})


def say(text: str) -> None:
    """Print a line now."""
    print(text, flush=True)
