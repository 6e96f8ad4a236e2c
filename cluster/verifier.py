"""The verifier deployment: one Serve replica that owns one engine and speaks to routers over its own gRPC stream.

Serve places it, names it, checks its health and stops it; no token passes through Serve (docs/adr/002-token-path.md).
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

import dspark
from dspark.cluster.autoscaling import WANTED
from dspark.cluster.draft_directory import DraftDirectory
from dspark.cluster.draft_worker import find_draft_workers
from dspark.cluster.fleet import ReplicaFacts
from dspark.cluster.logs import join_serve_logs
from dspark.cluster.progress import Progress, give_cores_back
from dspark.cluster.ranks import ActorLauncher
from dspark.cluster.secure import tls_files
from dspark.config import EngineConfig, ServeConfig
from dspark.errors import DSparkError, WorkerLost
from dspark.kv_blocks import KVExchange
from dspark.router.drafters import assign_by_load
from dspark.workers.wire.codec import PROTOCOL
from dspark.workers.wire.link import Host
from dspark.workers.wire.tls import TlsFiles

if TYPE_CHECKING:
    from dspark.workers.build import Loaded

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
    exchange: KVExchange | None = None


@dataclass(frozen=True, slots=True)
class Drafting:
    """How a verifier of a disaggregated topology drafts; ``name`` is its own."""

    name: str
    directory: DraftDirectory
    tls: TlsFiles | None
    wait_s: float | None
    fallback: str


Loader = Callable[[EngineConfig, Callable[[str], None], Drafting | None], Ready]


def load_verifier(config: EngineConfig, progress: Callable[[str], None], drafting: Drafting | None) -> Ready:
    """Load the engine that the configuration names; with ``drafting`` its drafts come from draft workers."""
    from dspark.workers.build import load_engine
    from dspark.workers.disaggregated import RemoteDrafting, load_remote_engine
    from dspark.workers.own_thread import call_in_own_thread
    from dspark.workers.verifier.host import EngineHost
    from dspark.workers.verifier.kv_exchange import EngineExchange
    from dspark.workers.wire.draft_client import grpc_sessions

    launcher = ActorLauncher() if config.num_ranks > 1 else None

    def load() -> Loaded:
        if drafting is None:
            return load_engine(config, progress, launcher)
        sessions = grpc_sessions(drafting.name, drafting.tls)
        remote = RemoteDrafting(sessions, drafting.directory.attach, assign_by_load, drafting.wait_s, drafting.fallback)
        return load_remote_engine(config, remote, progress, launcher)

    loaded = call_in_own_thread(load)
    host = EngineHost(loaded.engine, config.stall_s)
    ready = Ready(host, loaded.model_name, loaded.engine.options.max_model_len, loaded.describe)
    identity = f"{fingerprint_of(ready)} {loaded.describe['drafter']}"
    return dataclasses.replace(ready, exchange=EngineExchange(loaded.engine, identity, host.between_steps))


class Verifier:
    """Serve's replica around one engine. Without ``threads`` the engine gets all cores that torch would take by itself."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ServeConfig, loader: Loader, draft_workers: DeploymentHandle[Any] | None = None
    ) -> None:
        join_serve_logs()
        give_cores_back(config.engine)
        replica_id = serve.get_replica_context().replica_tag
        self._drain_s = config.drain_s
        tls = tls_files(config)
        drafting = None
        if draft_workers is not None:
            directory = DraftDirectory(partial(find_draft_workers, draft_workers))
            directory.start()
            wait_s = None if config.draft_wait_ms is None else config.draft_wait_ms / 1e3
            drafting = Drafting(replica_id, directory, tls, wait_s, config.draft_fallback)
        progress = Progress("verifier", replica_id)
        try:
            self._ready = await asyncio.to_thread(loader, config.engine, progress, drafting)
        except DSparkError as error:
            progress.fail(error)
            raise
        self._ready.host.start()
        self._token = secrets.token_hex(32)
        self._fingerprint = fingerprint_of(self._ready)
        from dspark.workers.wire.server import WireServer  # imports torch, which reads the number of cores

        self._server = WireServer(self._ready.host, replica_id, self._fingerprint, self._token, tls, self._ready.exchange)
        with_pairs = config.kv_transport == "collective"
        address = await self._server.start(ray.util.get_node_ip_address(), with_pairs)  # type: ignore[no-untyped-call]
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
