"""The router deployment: the HTTP ingress, which finds the verifiers through Serve and streams from them directly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from dspark.cluster.dispatch import Dispatcher
from dspark.cluster.draft_watch import DraftWatch
from dspark.cluster.draft_worker import ask_draft_workers
from dspark.cluster.fleet import Fleet, ReplicaFacts
from dspark.cluster.http.app import HttpOptions, make_app, no_draft_workers
from dspark.cluster.http.metering import Family
from dspark.cluster.http.service import Service
from dspark.cluster.logs import join_serve_logs
from dspark.cluster.ray_metrics import RayMetrics
from dspark.cluster.secure import tls_files
from dspark.cluster.steering import Steering, rules_of
from dspark.config import ServeConfig
from dspark.router.classes import Classes
from dspark.router.scaling import Decision
from dspark.workers.wire.client import GrpcLink
from dspark.workers.wire.link import Link

DISCOVERY_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)


@serve.ingress()
class Router:
    """Tokenises, routes, streams. Up as soon as it has a link to a first verifier."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, verifiers: DeploymentHandle[Any], config: ServeConfig, draft_workers: DeploymentHandle[Any] | None = None
    ) -> None:
        join_serve_logs()
        context = serve.get_replica_context()
        self._name = context.replica_tag
        self._tls = tls_files(config)
        self._silence_s = config.silence_s
        self._verifiers = verifiers
        self._routers: DeploymentHandle[Any] = serve.get_deployment_handle(context.deployment, context.app_name)
        watch = DraftWatch(partial(ask_draft_workers, draft_workers)) if draft_workers is not None else None
        self._options = HttpOptions(
            config.max_body_bytes, _secret(config), config.show_docs, self._other_families, self._decision, watch or no_draft_workers
        )
        fleet = Fleet(self._discover, self._connect, config.move_kv)
        await fleet.start()
        tokenizer = await asyncio.to_thread(_load_tokenizer, config)
        while fleet.facts is None:
            await fleet.wait_for_change(60.0)
        facts = fleet.facts
        dispatcher = Dispatcher(fleet, config.max_waiting, config.replay_wait_s)
        name = config.model_name or facts.model
        classes = Classes(config.service_classes, config.default_class)
        self._service = Service(dispatcher, tokenizer, name, f"dspark-{facts.fingerprint}", facts.max_model_len, classes)
        self._ray_metrics = RayMetrics()
        self._steering = Steering(fleet, self._service.ledger, rules_of(config), self._show)
        self._loops = [asyncio.create_task(self._steering.run())]
        if watch is not None:
            self._loops.append(asyncio.create_task(watch.run()))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._service, self._options)

    async def families(self, asked_by: str) -> list[Family]:
        """What this replica measures; nothing if it asks itself."""
        return [] if asked_by == self._name else self._service.meter.families()

    async def begin_drain(self) -> None:
        """Refuse new requests from now on."""
        self._service.dispatcher.is_draining = True

    async def in_flight(self) -> int:
        """Choices that are being generated for this replica's clients."""
        return self._service.dispatcher.in_flight

    async def __del__(self) -> None:
        if hasattr(self, "_loops"):
            for loop in self._loops:
                loop.cancel()
            await self._service.dispatcher.fleet.close()

    def _decision(self) -> Decision | None:
        return self._steering.decision

    def _show(self, decision: Decision) -> None:
        dispatcher = self._service.dispatcher
        self._ray_metrics.update(dispatcher.fleet.statuses, dispatcher.in_flight, decision)

    async def _discover(self) -> Sequence[ReplicaFacts] | None:
        try:
            found = await self._verifiers.broadcast("describe").results_async(timeout_s=DISCOVERY_TIMEOUT_S, return_exceptions=True)
        except TimeoutError:  # none has come up yet, or one is stuck; the links that are open say how they are themselves
            return None
        except DeploymentUnavailableError:
            return []
        return [ReplicaFacts(**facts) for facts in found if isinstance(facts, dict)]

    def _connect(self, facts: ReplicaFacts) -> Link:
        return GrpcLink(facts.replica_id, facts.address, facts.token, self._name, facts.fingerprint, self._tls, self._silence_s)

    async def _other_families(self) -> list[list[Family]]:
        try:
            response = self._routers.broadcast("families", self._name)
            found = await response.results_async(timeout_s=DISCOVERY_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            return []
        return [families for families in found if isinstance(families, list)]


def _secret(config: ServeConfig) -> str | None:
    key = config.read_api_key()
    return None if key is None else key.get_secret_value()


def _load_tokenizer(config: ServeConfig) -> object:
    from dspark.deploy.default_model import default_cache, prepare
    from dspark.workers.verifier.targets import load_tokenizer

    folder = config.engine.model or str(prepare(default_cache(), _log.info))
    return load_tokenizer(folder, config.engine.revision)
