"""Draft workers of tiny modules inside the test's process, and engines that draft with them."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from helpers.engines import make_engine

from dspark.drafting import DraftHost, DraftLayout, DraftWorkerFacts
from dspark.router.drafters import assign_by_load
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.draft_links import DraftLinks
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.remote import RemoteDrafter
from dspark.workers.drafter.worker import DraftWorker
from dspark.workers.drafter.worker_host import DraftWorkerHost
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.targets import Target
from dspark.workers.wire.draft_local import LocalDraftNetwork
from dspark.workers.wire.draft_server import DraftWireServer
from dspark.workers.wire.tls import TlsFiles

T = TypeVar("T")
LAW_WIDTH = 8


def layout_of(module: DSparkModule) -> DraftLayout:
    config, dtype = module.config, str(module.fc.weight.dtype).removeprefix("torch.")
    return DraftLayout("target", "drafter", dtype, config.hidden_size, config.block_size, config.vocab_size)


def make_worker_host(module: DSparkModule, num_blocks: int = 128) -> DraftWorkerHost:
    pool = BlockPool(num_blocks)
    host = DraftWorkerHost(DraftWorker(LocalDrafter(module, pool, law_width=LAW_WIDTH), pool), layout_of(module))
    host.start()
    return host


def is_idle(host: DraftWorkerHost) -> bool:
    return host.worker.num_requests == 0 and not host._inbox and not host._is_busy


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


@dataclass
class Workers:
    """Worker processes as a test sees them: hosts by name behind a network with faults."""

    module: DSparkModule
    network: LocalDraftNetwork = field(default_factory=LocalDraftNetwork)
    hosts: dict[str, DraftWorkerHost] = field(default_factory=dict)
    facts: list[DraftWorkerFacts] = field(default_factory=list)
    links: list[DraftLinks] = field(default_factory=list)

    def add(self, name: str, num_blocks: int = 128) -> None:
        self.hosts[name] = make_worker_host(self.module, num_blocks)
        self.facts.append(self.network.add(name, self.hosts[name]))

    def connect(self) -> DraftLinks:
        links = DraftLinks(layout_of(self.module), self.network.open_session)
        self.links.append(links)
        links.set_workers(self.facts)
        eventually(lambda: len(links.links) == len(self.facts), "connecting")
        return links

    def engine(self, target: Target, num_blocks: int = 128, wait_s: float = 5.0, **options: Any) -> Engine:
        """An engine that drafts with the workers, waiting for them however busy the machine is; from graphs it feeds them itself."""
        pool = BlockPool(num_blocks)
        drafter = RemoteDrafter(self.module, pool, self.connect(), assign_by_load, feeds=options.get("graphs") is not None)
        engine = make_engine(target, drafter, pool, **options)
        engine.options = dataclasses.replace(engine.options, draft_wait_s=wait_s)
        return engine

    def check_idle(self) -> None:
        """No worker holds anything for requests that have ended."""
        eventually(lambda: all(map(is_idle, self.hosts.values())), "forgetting requests")
        for host in self.hosts.values():
            host.worker.check()


@contextmanager
def draft_workers(module: DSparkModule, *names: str, num_blocks: int = 128) -> Iterator[Workers]:
    workers = Workers(module)
    for name in names:
        workers.add(name, num_blocks)
    try:
        yield workers
        workers.check_idle()
    finally:
        for links in workers.links:
            links.close()
        for host in workers.hosts.values():
            host.close()


class ServedWorker:
    """A draft worker behind gRPC, on an event loop of its own."""

    def __init__(self, host: DraftHost, worker_id: str = "w0", token: str = "secret", tls: TlsFiles | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.server = self.call(self._make(host, worker_id, token, tls))
        self.facts = DraftWorkerFacts(worker_id, self.call(self.server.start()), token)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def stop(self) -> None:
        self.call(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _make(self, host: DraftHost, worker_id: str, token: str, tls: TlsFiles | None) -> DraftWireServer:
        return DraftWireServer(host, worker_id, token, tls)
