"""What replicas say while they load, and how they get the machine's cores."""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

from ray.experimental import internal_kv

from dspark.config import EngineConfig

PROGRESS_PREFIX: Final = b"dspark:progress:"
ERROR_MARK: Final = "error: "

_log = logging.getLogger(__name__)


class Progress:
    """Leaves lines for ``dspark serve`` to show: a replica cannot be asked anything before it is up."""

    def __init__(self, kind: str, replica_id: str) -> None:
        self._key = PROGRESS_PREFIX + f"{kind} {replica_id}".encode()
        self._lines: list[str] = []

    def __call__(self, message: str) -> None:
        _log.info("%s", message)
        self._lines.append(message.replace("\n", " "))
        internal_kv._internal_kv_put(self._key, "\n".join(self._lines).encode())

    def fail(self, error: Exception) -> None:
        """Leave the error that ends the load."""
        self(f"{ERROR_MARK}{error}")

    @staticmethod
    def read() -> dict[str, list[str]]:
        """All lines so far, by kind and name of the replica."""
        values = {key: internal_kv._internal_kv_get(key) or b"" for key in internal_kv._internal_kv_list(PROGRESS_PREFIX)}
        return {key.removeprefix(PROGRESS_PREFIX).decode(): value.decode().split("\n") for key, value in values.items() if value}


def give_cores_back(config: EngineConfig) -> None:
    """Ray sets OMP_NUM_THREADS=1 for actors without whole CPUs; torch reads it when it is imported, which must be later."""
    assert "torch" not in sys.modules, "torch was imported before its number of threads was set"
    if config.threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
