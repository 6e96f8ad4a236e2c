"""The verifiers a router knows: discovers them, keeps one link to each, ranks them for a request. No Ray in here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from dspark.errors import DSparkError, ProtocolMismatch
from dspark.router.admission import capacity
from dspark.router.policy import Sent, rank
from dspark.router.prefixes import PrefixIndex, chunk_keys
from dspark.types import ReplicaView, Request
from dspark.workers.wire.codec import Status
from dspark.workers.wire.link import Flight, Link

REFRESH_S: Final = 1.0
EAGER_REFRESH_S: Final = 0.1  # while there is no verifier at all
OPEN_TIMEOUT_S: Final = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """What a verifier replica says through Serve, once: where its stream is, the secret to open it, what it runs.

    ``model`` is the engine's own name for what it serves, ``described`` the effective settings to print.
    """

    replica_id: str
    address: str
    token: str
    fingerprint: str
    model: str
    max_model_len: int
    described: dict[str, object]

    def __repr__(self) -> str:
        return f"ReplicaFacts({self.replica_id} at {self.address}, {self.model})"  # the token stays out of logs


Discover = Callable[[], Awaitable[Sequence[ReplicaFacts] | None]]  # None: it could not be found out
Connect = Callable[[ReplicaFacts], Link]


class Fleet:
    """Links to all verifiers that run the first one's model; others are left alone and logged."""

    def __init__(self, discover: Discover, connect: Connect) -> None:
        self._discover = discover
        self._connect = connect
        self._links: dict[str, Link] = {}
        self._refused: set[str] = set()
        self._prefixes = PrefixIndex()
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self.facts: ReplicaFacts | None = None

    async def start(self) -> None:
        """Begin to look for verifiers."""
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Close every link."""
        if self._keeper is not None:
            self._keeper.cancel()
        await asyncio.gather(*(link.close() for link in self._links.values()))
        self._links.clear()

    @property
    def statuses(self) -> list[Status]:
        """The latest word of every open link."""
        return [status for link in self._links.values() if link.is_open and (status := link.status) is not None]

    @property
    def views(self) -> list[ReplicaView]:
        """Views of the verifiers that can take requests."""
        return [status.view for status in self.statuses if status.healthy]

    @property
    def running_limit(self) -> int:
        """Requests that all verifiers can run at once."""
        return capacity(self.views)

    def candidates(self, request: Request) -> list[Link]:
        """Links that may take the request, best first."""
        keys = chunk_keys(request.prompt_token_ids, request.cache_salt)
        views = self.views
        sent = {view.id: Sent(*self._links[view.id].unseen) for view in views}
        order = rank(views, request.id, len(request.prompt_token_ids), self._prefixes.hits(keys), sent)
        return [link for replica_id in order if (link := self._links.get(replica_id)) is not None and link.is_open]

    async def submit(self, link: Link, request: Request) -> Flight:
        """Send a request to a verifier and note it; raises what ``Link.submit`` raises."""
        flight = await link.submit(request)
        self._prefixes.add(chunk_keys(request.prompt_token_ids, request.cache_salt), link.replica_id)
        return flight

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a verifier came or went, or after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def refresh(self) -> None:
        """Ask who is there; open links to newcomers, drop lost ones, and those that left and have nothing in flight."""
        found = await self._discover()
        listed = list(self._links) if found is None else [fact.replica_id for fact in found]
        facts = {fact.replica_id: fact for fact in found or ()}
        before = set(self._links)
        for replica_id, link in list(self._links.items()):
            gone = replica_id not in listed and link.in_flight == 0
            if link.lost is not None or gone:
                await self._drop(replica_id)
        self._refused = {replica_id for replica_id in self._refused if found is None or replica_id in facts}
        newcomers = [fact for replica_id, fact in facts.items() if replica_id not in self._links and replica_id not in self._refused]
        await asyncio.gather(*(self._open(fact) for fact in newcomers))
        if set(self._links) != before:
            self._changed.set()
            self._changed = asyncio.Event()

    async def _keep(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception:  # noqa: BLE001 - discovery goes through Serve, whose errors are many; the next round asks again
                _log.warning("verifiers could not be listed", exc_info=True)
            await asyncio.sleep(REFRESH_S if self._links else EAGER_REFRESH_S)

    async def _open(self, facts: ReplicaFacts) -> None:
        expected = self.facts.fingerprint if self.facts is not None and self._links else None
        link = self._connect(facts)
        try:
            if expected not in (None, facts.fingerprint):
                raise ProtocolMismatch(f"verifier {facts.replica_id} runs another model ({facts.fingerprint}, not {expected})")
            await link.open(OPEN_TIMEOUT_S)
        except ProtocolMismatch as error:
            self._refused.add(facts.replica_id)
            _log.error("verifier %s is not used: %s", facts.replica_id, error)
        except DSparkError as error:
            _log.warning("verifier %s cannot be reached yet: %s", facts.replica_id, error)
        else:
            self.facts = facts
            self._links[facts.replica_id] = link
            _log.info("verifier %s joined", facts.replica_id)

    async def _drop(self, replica_id: str) -> None:
        link = self._links.pop(replica_id)
        self._prefixes.forget(replica_id)
        await link.close()
        _log.info("verifier %s left: %s", replica_id, link.lost)
