"""The draft workers that a verifier is told of: asks who is there, and hands them to the verifier's links. No Ray in here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from dspark.drafting import DraftWorkerFacts

REFRESH_S: Final = 1.0
EAGER_REFRESH_S: Final = 0.1  # while there is no draft worker at all

_log = logging.getLogger(__name__)

Discover = Callable[[], Awaitable[Sequence[DraftWorkerFacts] | None]]  # None: it could not be found out


class Links(Protocol):
    """Where the workers are named to; ``DraftLinks`` is the real one."""

    def set_workers(self, facts: Sequence[DraftWorkerFacts]) -> None: ...


class DraftDirectory:
    """Keeps asking on an event loop; links may be attached from any thread, before or after the first answer."""

    def __init__(self, discover: Discover) -> None:
        self._discover = discover
        self._facts: Sequence[DraftWorkerFacts] = ()
        self._links: list[Links] = []
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to ask."""
        self._keeper = asyncio.create_task(self._keep())

    def close(self) -> None:
        """Ask no more."""
        if self._keeper is not None:
            self._keeper.cancel()

    def attach(self, links: Links) -> None:
        """Name the workers to these links now, and whenever they change."""
        self._links.append(links)
        links.set_workers(self._facts)

    async def refresh(self) -> None:
        """Ask once."""
        found = await self._discover()
        if found is None or list(found) == list(self._facts):
            return
        self._facts = found
        for links in self._links:
            links.set_workers(found)

    async def _keep(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception:  # noqa: BLE001 - discovery goes through Serve, whose errors are many; the next round asks again
                _log.warning("draft workers could not be listed", exc_info=True)
            await asyncio.sleep(REFRESH_S if self._facts else EAGER_REFRESH_S)
