"""Errors that say who can act.

::

    DSparkError                 status  retryable  grpc                  who acts
    ├── ConfigError               500      no      FAILED_PRECONDITION   the operator (a key of the configuration)
    ├── BadRequest                400      no      INVALID_ARGUMENT      the client (``param`` names the field)
    │   ├── UnknownModel          404      no      NOT_FOUND
    │   └── TooLarge              413      no      OUT_OF_RANGE
    ├── Overloaded                503      yes     RESOURCE_EXHAUSTED    the client, after ``retry_after_s``
    ├── WorkerLost                503      yes     UNAVAILABLE           the router (replays elsewhere)
    └── ProtocolMismatch          500      no      FAILED_PRECONDITION   the operator (two versions that don't fit)

Only the ingress turns them into HTTP or gRPC codes; rooms below raise them and know nothing of either.
"""

from __future__ import annotations

from typing import ClassVar


class DSparkError(Exception):
    """Base of every error this project raises on purpose."""

    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    grpc_code: ClassVar[str] = "INTERNAL"


class ConfigError(DSparkError):
    """The configuration cannot work; the message names the key and the values that would."""

    grpc_code = "FAILED_PRECONDITION"


class BadRequest(DSparkError):
    """The request cannot be served as sent; ``param`` names the field."""

    status = 400
    grpc_code = "INVALID_ARGUMENT"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModel(BadRequest):
    """The named model is not served here."""

    status = 404
    grpc_code = "NOT_FOUND"


class TooLarge(BadRequest):
    """The request body is over the limit."""

    status = 413
    grpc_code = "OUT_OF_RANGE"


class Overloaded(DSparkError):
    """No capacity now; trying again after ``retry_after_s`` seconds may work."""

    status = 503
    retryable = True
    grpc_code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorkerLost(DSparkError):
    """A worker died or stopped answering; the request can be replayed on another."""

    status = 503
    retryable = True
    grpc_code = "UNAVAILABLE"


class ProtocolMismatch(DSparkError):
    """Two ends speak different versions, models or layouts."""

    grpc_code = "FAILED_PRECONDITION"
