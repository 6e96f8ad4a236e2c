"""Mutual TLS on the internal streams: one certificate a process, both ends verified against one authority."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from dspark.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a process: the authority that signed its peers, its own certificate chain, and the key of that.

    ``server_name`` is what a peer's certificate must be issued for, whatever address it listens on; None: that address.
    """

    authority: Path
    certificate: Path
    key: Path
    server_name: str | None = None

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials that admit only clients with a certificate of the authority."""
        pair = (_read(self.key), _read(self.certificate))
        return grpc.ssl_server_credentials([pair], root_certificates=_read(self.authority), require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials that show our certificate and admit only servers with one of the authority."""
        return grpc.ssl_channel_credentials(_read(self.authority), _read(self.key), _read(self.certificate))

    def channel_options(self) -> tuple[tuple[str, str], ...]:
        """Options that a channel with these credentials needs."""
        return () if self.server_name is None else (("grpc.ssl_target_name_override", self.server_name),)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls: {path} cannot be read: {error.strerror}") from error
