"""How a server of ours listens, and who gets in."""

from __future__ import annotations

import hmac
from typing import Any

import grpc

from dspark.workers.wire.client import TOKEN_KEY
from dspark.workers.wire.tls import TlsFiles


def add_port(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    """Let a server listen on an address, with mutual TLS if there is any; returns the port."""
    if tls is None:
        return int(server.add_insecure_port(address))
    return int(server.add_secure_port(address, tls.server_credentials()))


async def check_token(context: grpc.aio.ServicerContext[Any, Any], token: bytes) -> None:
    """Refuse a stream whose metadata lacks the token; the comparison takes the same time whatever was sent."""
    sent = dict(context.invocation_metadata() or ()).get(TOKEN_KEY, "")
    sent = sent if isinstance(sent, bytes) else str(sent).encode()
    if not hmac.compare_digest(sent, token):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
