"""A ``Link`` inside one process, for tests and for topologies without a network: same behaviour, with faults on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dspark.errors import DSparkError, WorkerLost
from dspark.types import Request, StepOutcome
from dspark.workers.wire.codec import Status, Tune
from dspark.workers.wire.link import Host, Link

VIEW_PERIOD_S = 0.05


class LocalLink(Link):
    """Speaks to ``host`` without a socket. ``kill`` ends it as a dead process would, ``delay_s`` holds every batch of
    outcomes back, and ``drop`` swallows batches, as a stuck network would."""

    def __init__(self, replica_id: str, host: Host) -> None:
        super().__init__(replica_id, f"local:{replica_id}")
        self.delay_s = 0.0
        self.drop = False
        self._host = host
        self._running: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def open(self, timeout_s: float) -> None:
        if self.lost is not None:
            raise self.lost
        self._loop = asyncio.get_running_loop()
        self._heard(self._ask())
        self._ticker = asyncio.create_task(self._tick())
        self.is_open = True

    async def close(self) -> None:
        self.kill("the link was closed")

    def kill(self, reason: str = "killed") -> None:
        """Lose the link now: every flight sees ``WorkerLost``, the host's requests are cancelled."""
        self._fell(reason)
        for request_id in self._running:
            self._host.cancel(request_id)
        self._running.clear()
        if self._ticker is not None:
            self._ticker.cancel()

    def _send_submit(self, request: Request) -> None:
        try:
            self._host.submit(request, self._sink)
        except DSparkError as error:
            self._rejected(request.id, error)
        else:
            self._running.add(request.id)
            self._accepted(request.id)

    def _send_cancel(self, request_id: str) -> None:
        self._running.discard(request_id)
        self._host.cancel(request_id)

    def _send_tune(self, tune: Tune) -> None:
        self._host.tune(tune.speculation_limit)

    def _sink(self, outcomes: Sequence[StepOutcome]) -> None:
        if self._loop is None:
            raise WorkerLost("outcomes came before the link was opened")
        self._loop.call_soon_threadsafe(self._loop.call_later, self.delay_s, self._deliver, outcomes)

    def _deliver(self, outcomes: Sequence[StepOutcome]) -> None:
        if self.drop or not self.is_open:
            return
        self._running.difference_update(outcome.request_id for outcome in outcomes if outcome.finish is not None)
        self._arrived(outcomes)

    def _ask(self) -> Status:
        return Status(self._host.view(self.replica_id, self.address), self._host.is_healthy(), self._host.stats())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(VIEW_PERIOD_S)
            self._heard(self._ask())
