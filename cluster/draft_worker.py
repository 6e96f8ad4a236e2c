"""The draft worker deployment: one Serve replica that drafts for all verifiers over streams of its own.

Serve places it, names it, checks its health and stops it; no draft passes through Serve.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from dspark.cluster.logs import join_serve_logs
from dspark.cluster.progress import Progress, give_cores_back
from dspark.cluster.secure import tls_files
from dspark.config import EngineConfig, ServeConfig
from dspark.drafting import DraftHost, DraftWorkerFacts
from dspark.errors import DSparkError, WorkerLost

DISCOVERY_TIMEOUT_S: Final = 2.0
DRAIN_S: Final = 5.0  # for verifiers to go to other workers, where there are any
POLL_S: Final = 0.1

_log = logging.getLogger(__name__)


class ServedDraftHost(DraftHost, Protocol):
    """A ``DraftHost`` whose life a replica manages."""

    def start(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DraftReady:
    """A loaded draft worker: its host, not yet started, and what to show of it."""

    host: ServedDraftHost
    described: dict[str, Any]


DraftLoader = Callable[[EngineConfig, int | None, Callable[[str], None]], DraftReady]


def load_draft_worker(config: EngineConfig, kv_tokens: int | None, progress: Callable[[str], None]) -> DraftReady:
    """Load what verifiers with this configuration draft with."""
    from dspark.workers.disaggregated import load_draft_worker
    from dspark.workers.own_thread import call_in_own_thread

    loaded = call_in_own_thread(lambda: load_draft_worker(config, kv_tokens, progress))
    return DraftReady(loaded.host, loaded.describe)


class DraftWorkerReplica:
    """Serve's replica around one draft worker. Without ``threads`` it gets all cores that torch would take by itself."""

    async def __init__(self, config: ServeConfig, loader: DraftLoader) -> None:  # type: ignore[misc]  # Serve awaits it
        join_serve_logs()
        give_cores_back(config.engine)
        replica_id = serve.get_replica_context().replica_tag
        engine = config.engine.model_copy(update={"device": config.draft_device or config.engine.device})
        progress = Progress("draft worker", replica_id)
        try:
            self._ready = await asyncio.to_thread(loader, engine, config.draft_kv_tokens, progress)
        except DSparkError as error:
            progress.fail(error)
            raise
        self._ready.host.start()
        token = secrets.token_hex(32)
        from dspark.workers.wire.draft_server import DraftWireServer  # imports torch, which reads the number of cores

        self._server = DraftWireServer(self._ready.host, replica_id, token, tls_files(config))
        address = await self._server.start(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._facts = DraftWorkerFacts(replica_id, address, token)
        _log.info("draft worker %s listens on %s", replica_id, address)

    async def describe(self) -> dict[str, Any]:
        """The fields of ``DraftWorkerFacts``."""
        return dataclasses.asdict(self._facts)

    async def report(self) -> dict[str, Any]:
        """What it runs, who is connected, and its counters."""
        state = "ready" if self._ready.host.is_healthy() else "no progress"
        return {
            "id": self._facts.worker_id,
            "state": "draining" if self._server.is_draining else state,
            "described": self._ready.described,
            "verifiers": self._server.num_sessions,
            "stats": self._ready.host.stats(),
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's policy reads: the counters."""
        return self._ready.host.stats()

    async def check_health(self) -> None:
        """Serve's health check: a replica that does not answer any more is replaced."""
        if not self._ready.host.is_healthy():
            raise WorkerLost("the draft worker makes no progress")

    async def __del__(self) -> None:
        """Serve awaits this before it kills the replica."""
        if not hasattr(self, "_facts"):
            return  # never came up
        self._server.begin_drain()
        deadline = time.monotonic() + DRAIN_S
        while self._ready.host.stats()["num_requests"] and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        await self._server.stop()
        await asyncio.to_thread(self._ready.host.close)


async def find_draft_workers(workers: DeploymentHandle[Any]) -> list[DraftWorkerFacts] | None:
    """All draft workers that are up; None if Serve does not say."""
    found = await _ask_all(workers, "describe")
    return None if found is None else [DraftWorkerFacts(**facts) for facts in found]


async def ask_draft_workers(workers: DeploymentHandle[Any]) -> list[dict[str, Any]] | None:
    """The reports of all draft workers that are up; None if Serve does not say."""
    return await _ask_all(workers, "report")


async def _ask_all(workers: DeploymentHandle[Any], method: str) -> list[dict[str, Any]] | None:
    try:
        found = await workers.broadcast(method).results_async(timeout_s=DISCOVERY_TIMEOUT_S, return_exceptions=True)
    except TimeoutError:  # none has come up yet, or one is stuck
        return None
    except DeploymentUnavailableError:
        return []
    return [answer for answer in found if isinstance(answer, dict)]
