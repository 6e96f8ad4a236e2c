"""A draft worker as a process of its own, without Ray: loads, listens, drafts until a signal comes."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dspark.config import EngineConfig
from dspark.workers.disaggregated import LoadedDraftWorker, load_draft_worker
from dspark.workers.own_thread import call_in_own_thread

if TYPE_CHECKING:
    from dspark.workers.wire.tls import TlsFiles

DRAIN_S: Final = 5.0  # for verifiers to go to other workers, where there are any
POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a worker listens, and who gets in. ``port`` 0 is a free one; without ``token`` one is made and said."""

    host: str = "127.0.0.1"
    port: int = 0
    token: str = ""
    tls: TlsFiles | None = None


def run_draft_worker(config: EngineConfig, kv_tokens: int | None, listen: Listen, say: Callable[[str], None]) -> None:
    """Draft for verifiers that run ``config`` until SIGINT or SIGTERM; ConfigError if the drafter cannot be loaded."""
    started = time.monotonic()
    loaded = call_in_own_thread(lambda: load_draft_worker(config, kv_tokens, say))
    loaded.host.start()
    try:
        asyncio.run(_serve(loaded, listen, say, started))
    finally:
        loaded.host.close()


async def _serve(loaded: LoadedDraftWorker, listen: Listen, say: Callable[[str], None], started: float) -> None:
    from dspark.workers.wire.draft_server import DraftWireServer

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    token = listen.token or secrets.token_hex(32)
    server = DraftWireServer(loaded.host, "", token, listen.tls)
    address = await server.start(listen.host, listen.port)
    if not listen.token:
        say(f"token: {token}")
    say(f"draft worker ready in {time.monotonic() - started:.0f} s: {address}")
    await stop.wait()
    server.begin_drain()
    deadline = time.monotonic() + DRAIN_S
    while loaded.host.stats()["num_requests"] and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    await server.stop()
