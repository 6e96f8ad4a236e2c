"""The verifier deployment: one Serve replica that owns one engine and speaks to routers over its own gRPC stream.

Serve places it, names it, checks its health and stops it; no token passes through Serve (docs/adr/002-token-path.md).
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray import serve
from ray.experimental import internal_kv

import dspark
from dspark.cluster.autoscaling import WANTED
from dspark.cluster.fleet import ReplicaFacts
from dspark.cluster.logs import join_serve_logs
from dspark.cluster.ranks import ActorLauncher
from dspark.config import EngineConfig, ServeConfig
from dspark.errors import DSparkError, WorkerLost
from dspark.workers.wire.codec import PROTOCOL
from dspark.workers.wire.link import Host
from dspark.workers.wire.server import WireServer

PROGRESS_PREFIX = b"dspark:progress:"
ERROR_MARK = "error: "
LAST_WORDS_S = 2.0  # for routers to read the last outcomes before the stream closes

_log = logging.getLogger(__name__)


class ServedHost(Host, Protocol):
    """A ``Host`` whose life a replica manages."""

    def start(self) -> None: ...

    def drain(self, timeout_s: float) -> bool: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Ready:
    """A loaded engine: its host, not yet started, and what routers and people want to know of it."""

    host: ServedHost
    model: str
    max_model_len: int
    described: dict[str, Any]


Loader = Callable[[EngineConfig, Callable[[str], None]], Ready]


def load_verifier(config: EngineConfig, progress: Callable[[str], None]) -> Ready:
    """Load the engine that the configuration names."""
    from dspark.workers.build import load_engine
    from dspark.workers.own_thread import call_in_own_thread
    from dspark.workers.verifier.host import EngineHost

    launcher = ActorLauncher() if config.num_ranks > 1 else None
    loaded = call_in_own_thread(lambda: load_engine(config, progress, launcher))
    return Ready(EngineHost(loaded.engine), loaded.model_name, loaded.engine.options.max_model_len, loaded.describe)


class Verifier:
    """Serve's replica around one engine. Without ``threads`` the engine gets all cores that torch would take by itself."""

    async def __init__(self, config: ServeConfig, loader: Loader) -> None:  # type: ignore[misc]  # Serve awaits it
        join_serve_logs()
        _give_cores_back(config.engine)
        replica_id = serve.get_replica_context().replica_tag
        self._drain_s = config.drain_s
        progress = Progress(replica_id)
        try:
            self._ready = await asyncio.to_thread(loader, config.engine, progress)
        except DSparkError as error:
            progress(f"{ERROR_MARK}{error}")
            raise
        self._ready.host.start()
        self._token = secrets.token_hex(32)
        self._fingerprint = fingerprint_of(self._ready)
        self._server = WireServer(self._ready.host, replica_id, self._fingerprint, self._token)
        address = await self._server.start(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._facts = ReplicaFacts(
            replica_id, address, self._token, self._fingerprint, self._ready.model, self._ready.max_model_len, self._ready.described
        )
        _log.info("verifier %s listens on %s", replica_id, address)

    async def describe(self) -> dict[str, Any]:
        """The fields of ``ReplicaFacts``."""
        return dataclasses.asdict(self._facts)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's policy reads: the number of verifiers that the routers want."""
        return {WANTED: float(self._server.wanted_verifiers)}

    async def check_health(self) -> None:
        """Serve's health check: a replica whose engine is stuck or failed is replaced."""
        if not self._ready.host.is_healthy():
            raise WorkerLost("the engine makes no progress")

    async def __del__(self) -> None:
        """Serve awaits this before it kills the replica. Streams are invisible to Serve, so they are waited for here."""
        if not hasattr(self, "_facts"):
            return  # never came up
        self._server.begin_drain()
        if not await asyncio.to_thread(self._ready.host.drain, self._drain_s):
            _log.warning("some requests still ran after %g s; routers replay them elsewhere", self._drain_s)
        await asyncio.to_thread(self._ready.host.close)
        await self._server.stop(LAST_WORDS_S)


def fingerprint_of(ready: Ready) -> str:
    """Names what a replica serves: equal fingerprints mean that a request can move from one to the other."""
    keys = ("model", "revision", "dtype", "architecture", "parameters")
    facts = [ready.model, ready.max_model_len, dspark.__version__, PROTOCOL, *(str(ready.described.get(key)) for key in keys)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


class Progress:
    """Leaves lines for ``dspark serve`` to show: a replica cannot be asked anything before it is up."""

    def __init__(self, replica_id: str) -> None:
        self._key = PROGRESS_PREFIX + replica_id.encode()
        self._lines: list[str] = []

    def __call__(self, message: str) -> None:
        _log.info("%s", message)
        self._lines.append(message.replace("\n", " "))
        internal_kv._internal_kv_put(self._key, "\n".join(self._lines).encode())

    @staticmethod
    def read() -> dict[str, list[str]]:
        """All lines so far, by replica."""
        values = {key: internal_kv._internal_kv_get(key) or b"" for key in internal_kv._internal_kv_list(PROGRESS_PREFIX)}
        return {key.removeprefix(PROGRESS_PREFIX).decode(): value.decode().split("\n") for key, value in values.items() if value}


def _give_cores_back(config: EngineConfig) -> None:
    """Ray sets OMP_NUM_THREADS=1 for actors without whole CPUs; torch reads it when it is imported, which is later."""
    if config.threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
