"""Errors as OpenAI shapes them: ``{"error": {message, type, param, code}}``, with the status of the error's class."""

from __future__ import annotations

import json
import math
from typing import Any, Final

from starlette.responses import Response

from dspark.errors import BadRequest, DSparkError, Overloaded

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON body of an error."""
    return {"error": {"message": message, "type": _TYPES.get(status, "server_error"), "param": param, "code": code}}


def body_of(error: DSparkError) -> dict[str, Any]:
    """The JSON body of one of our errors; those that only an operator can act on don't tell their text to clients."""
    if isinstance(error, BadRequest):
        return error_body(error.status, str(error), error.param, error.code)
    if error.status == 503:
        return error_body(503, str(error), code="overloaded" if isinstance(error, Overloaded) else "worker_lost")
    return error_body(error.status, "internal error", code="internal_error")


def response_of(error: DSparkError) -> Response:
    """The response to one of our errors."""
    headers = {}
    if error.retryable:
        wait_s = error.retry_after_s if isinstance(error, Overloaded) else 1.0
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return json_response(body_of(error), error.status, headers)


def json_response(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(json.dumps(body, ensure_ascii=False, separators=(",", ":")), status, headers, "application/json")
