"""Engines that exchange KV blocks, and errands that are done at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.kv_exchange import EngineExchange


def at_once(errand: Callable[[], Any]) -> Future[Any]:
    """What ``EngineHost.between_steps`` does, without a thread."""
    done: Future[Any] = Future()
    try:
        done.set_result(errand())
    except Exception as error:  # noqa: BLE001 - as the real one
        done.set_exception(error)
    return done


def exchange_of(engine: Engine, identity: str = "tiny") -> EngineExchange:
    return EngineExchange(engine, identity, at_once)
