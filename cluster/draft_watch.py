"""What routers know of draft workers: asked every other second, for the status. No draft passes here. No Ray in here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from dspark.cluster.autoscaling import BUSY
from dspark.cluster.http.status import DraftWorkerStatus

PERIOD_S: Final = 2.0
SILENT_S: Final = 10.0  # without an answer, after which what is known of the workers is called old

_log = logging.getLogger(__name__)

Ask = Callable[[], Awaitable[Sequence[Mapping[str, Any]] | None]]  # reports of all that are up; None: it could not be found out


class DraftWatch:
    """Keeps asking on an event loop; calling it gives the last answer."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._known: list[DraftWorkerStatus] = []
        self._answered_s = 0.0  # when ``_known`` was found out
        self._busy_s: dict[str, tuple[float, float]] = {}  # worker -> when it was asked, and seconds that it had drafted by then

    async def __call__(self) -> Sequence[DraftWorkerStatus]:
        return self._known

    async def run(self) -> None:
        """Ask every ``PERIOD_S``, until cancelled."""
        while True:
            try:
                await self.refresh(time.monotonic())
            except Exception:  # noqa: BLE001 - it goes through Serve, whose errors are many; the next round asks again
                _log.warning("draft workers could not be asked", exc_info=True)
            await asyncio.sleep(PERIOD_S)

    async def refresh(self, now_s: float) -> None:
        """Ask once. The time is of a monotonic clock. Serve answers for all workers or, if one of them is not heard of, for none."""
        reports = await self._ask()
        if reports is None:
            if now_s - self._answered_s > SILENT_S:
                self._known = [replace(worker, state="silent", busy=None) for worker in self._known]
            return
        self._answered_s = now_s
        before, self._busy_s = self._busy_s, {report["id"]: (now_s, float(report["stats"][BUSY])) for report in reports}
        self._known = [self._status(report, before.get(report["id"])) for report in sorted(reports, key=lambda report: str(report["id"]))]

    def _status(self, report: Mapping[str, Any], before: tuple[float, float] | None) -> DraftWorkerStatus:
        now_s, busy_s = self._busy_s[report["id"]]
        stats = report["stats"]
        return DraftWorkerStatus(
            id=report["id"],
            state=report["state"],
            verifiers=report["verifiers"],
            requests=int(stats["num_requests"]),
            blocks=int(stats["num_blocks"]),
            free_blocks=int(stats["num_free_blocks"]),
            busy=None if before is None or now_s <= before[0] else round(min(1.0, (busy_s - before[1]) / (now_s - before[0])), 4),
        )
