"""The certificates that a configuration names, for the streams between our processes."""

from __future__ import annotations

from dspark.config import ServeConfig
from dspark.workers.wire.tls import TlsFiles


def tls_files(config: ServeConfig) -> TlsFiles | None:
    """The files of mutual TLS; None without any."""
    if config.tls_ca_file is None or config.tls_cert_file is None or config.tls_key_file is None:
        return None
    return TlsFiles(config.tls_ca_file, config.tls_cert_file, config.tls_key_file, config.tls_server_name)
