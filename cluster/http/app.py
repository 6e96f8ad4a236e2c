"""The FastAPI application: routes, the API key, and errors in OpenAI's shape whatever goes wrong."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import dspark
from dspark.cluster.edge import BodyFromScope, is_forbidden
from dspark.cluster.http import chat, completions
from dspark.cluster.http.connection import ClientLeftError, EventStream, read_body, while_connected
from dspark.cluster.http.errors import error_body, json_response, response_of
from dspark.cluster.http.metering import Family, engine_families, exposition, merged
from dspark.cluster.http.protocol import ChatBody, CompletionBody, parse
from dspark.cluster.http.service import Job, Service
from dspark.cluster.http.status import Around, DraftWorkerStatus, cluster_status
from dspark.errors import DSparkError
from dspark.router.scaling import Decision

OPEN_PATHS: Final = frozenset({"/health"})
CLIENT_CLOSED: Final = 499

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


async def no_draft_workers() -> Sequence[DraftWorkerStatus]:
    """What clusters have whose verifiers draft themselves."""
    return ()


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Settings of the HTTP side, and where it learns what others know (``Around`` in ``status.py``)."""

    max_body_bytes: int
    api_key: str | None = None
    show_docs: bool = True
    other_families: Callable[[], Awaitable[list[list[Family]]]] | None = None
    decision: Callable[[], Decision | None] = lambda: None
    draft_workers: Callable[[], Awaitable[Sequence[DraftWorkerStatus]]] = no_draft_workers


def make_app(service: Service, options: HttpOptions) -> FastAPI:
    """The API around one service."""
    docs = options.show_docs
    app = FastAPI(
        title="DSpark Serve",
        version=dspark.__version__,
        docs_url="/docs" if docs else None,
        openapi_url="/openapi.json" if docs else None,
        redoc_url=None,
    )
    _add_generation(app, service, options)
    _add_information(app, service, options)
    _add_errors(app, service)
    app.add_middleware(BodyFromScope)
    app.add_middleware(Gate, api_key=options.api_key, refused=service.meter.refused)
    return app


class Gate:
    """Refuses what must not get further: requests without the API key, and headers that Serve would obey.

    Those headers are stripped by the proxy's own middleware (``cluster/edge.py``); seeing one here means that it
    is not installed, and that Serve has already acted on the header. Then the request is refused.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, refused: Callable[[int], None]) -> None:
        self._app = app
        self._key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope["path"], Headers(scope=scope))) is not None:
            self._refused(refusal.status_code)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        for name in headers:
            if is_forbidden(name):
                return json_response(error_body(400, f"the header {name} is not accepted", name), 400)
        if self._key is None or path in OPEN_PATHS:
            return None
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(sent.strip().encode()).digest()  # equal lengths: comparing takes the same time for every key
        if hmac.compare_digest(digest, self._key) and scheme.lower() == "bearer":
            return None
        body = error_body(401, "a valid API key is needed: Authorization: Bearer …", code="invalid_api_key")
        return json_response(body, 401, {"WWW-Authenticate": "Bearer"})


def _add_generation(app: FastAPI, service: Service, options: HttpOptions) -> None:
    async def create_chat_completion(request: Request) -> Response:
        arrived = time.monotonic()
        body = parse(ChatBody, await read_body(request, options.max_body_bytes))
        job = await while_connected(request.receive, chat.begin(service, body, arrived), Job.close)
        if body.stream:
            return EventStream(chat.events(job, body.wants_usage), job.close)
        return await _answer(request, job, chat.collect(job))

    async def create_completion(request: Request) -> Response:
        arrived = time.monotonic()
        body = parse(CompletionBody, await read_body(request, options.max_body_bytes))
        job = await while_connected(request.receive, completions.begin(service, body, arrived), Job.close)
        if body.stream:
            return EventStream(completions.events(job, body), job.close)
        return await _answer(request, job, completions.collect(job, body))

    for path, endpoint, model in (
        ("/v1/chat/completions", create_chat_completion, ChatBody),
        ("/v1/completions", create_completion, CompletionBody),
    ):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}},
        )


async def _answer(request: Request, job: Job, work: Any) -> Response:
    try:
        return json_response(await while_connected(request.receive, work))
    finally:
        job.close()


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definitions put where they are referred to: a route has no shared place for them."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(definitions[node["$ref"].rpartition("/")[2]])
            return {key: resolve(value) for key, value in node.items()}
        return [resolve(item) for item in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def _add_information(app: FastAPI, service: Service, options: HttpOptions) -> None:
    card = {
        "id": service.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "dspark",
        "max_model_len": service.max_model_len,
    }

    async def list_models() -> Response:
        return json_response({"object": "list", "data": [card]})

    async def retrieve_model(model_id: str) -> Response:
        service.check_model(model_id)
        return json_response(card)

    async def health() -> Response:
        """200 if a verifier makes progress, otherwise 503."""
        statuses = service.dispatcher.fleet.statuses
        healthy = sum(status.healthy for status in statuses)
        state = "draining" if service.dispatcher.is_draining else "ok" if healthy else "no verifier makes progress"
        ok = state == "ok"
        return json_response({"status": state, "verifiers": len(statuses), "healthy": healthy}, 200 if ok else 503)

    async def all_families() -> tuple[list[Family], int]:
        """What all routers measure together, and how many they are."""
        others = await options.other_families() if options.other_families is not None else []
        others = [families for families in others if families]  # the replica that was asked by itself
        return merged([service.meter.families(), *others]), 1 + len(others)

    async def status() -> Response:
        families, num_routers = await all_families()
        return json_response(cluster_status(service, Around(families, num_routers, options.decision(), await options.draft_workers())))

    async def metrics() -> Response:
        families, _ = await all_families()
        families += engine_families(service.dispatcher.fleet.statuses, service.model_name)
        return Response(exposition(families), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, endpoint in (
        ("/v1/models", list_models),
        ("/v1/models/{model_id:path}", retrieve_model),
        ("/health", health),
        ("/metrics", metrics),
        ("/status", status),
    ):
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)


def _add_errors(app: FastAPI, service: Service) -> None:
    def refuse(response: Response) -> Response:
        service.meter.refused(response.status_code)
        return response

    async def ours(request: Request, error: Exception) -> Response:
        if isinstance(error, DSparkError) and error.status == 500:
            _log.error("request failed: %s", error, exc_info=error)
        return refuse(response_of(error if isinstance(error, DSparkError) else DSparkError(str(error))))

    async def theirs(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        detail = str(error.detail) if isinstance(error, HTTPException) else "internal error"
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        return refuse(json_response(error_body(status, f"{detail}: {request.method} {request.url.path}"), status, headers))

    async def left(request: Request, error: Exception) -> Response:
        return refuse(Response(status_code=CLIENT_CLOSED))

    async def bug(request: Request, error: Exception) -> Response:
        return refuse(json_response(error_body(500, "internal error", code="internal_error"), 500))

    app.add_exception_handler(DSparkError, ours)
    app.add_exception_handler(HTTPException, theirs)
    app.add_exception_handler(ClientLeftError, left)
    app.add_exception_handler(Exception, bug)
