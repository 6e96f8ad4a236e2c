"""The verifiers a router knows: discovers them, keeps one link to each, ranks them for a request. No Ray in here."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dspark.errors import DSparkError, ProtocolMismatch
from dspark.router.admission import capacity
from dspark.router.policy import Standing, choose
from dspark.router.predict import Ask, Prediction, Sent
from dspark.router.prefixes import PrefixIndex, chunk_keys
from dspark.router.transfers import longest_holder, pays, speed
from dspark.types import KVSource, ReplicaView, Request
from dspark.workers.wire.codec import Status, Tune
from dspark.workers.wire.link import Flight, Link

REFRESH_S: Final = 1.0
EAGER_REFRESH_S: Final = 0.1  # while there is no verifier at all
OPEN_TIMEOUT_S: Final = 5.0
LIMIT_AGE_S: Final = 0.1  # adding up a thousand views takes a millisecond: not for every request

_log = logging.getLogger(__name__)


def ask_of(request: Request) -> Ask:
    """What routing knows of a request."""
    return Ask(
        id=request.id,
        num_tokens=len(request.prompt_token_ids),
        budget=request.latency_budget,
        priority=request.priority,
        keys=tuple(chunk_keys(request.prompt_token_ids, request.cache_salt)),
    )


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
    """Links to all verifiers that run the first one's model; others are left alone and logged.

    With ``moves_kv`` they are told where they may fetch KV.
    """

    def __init__(self, discover: Discover, connect: Connect, moves_kv: bool = False) -> None:
        self.moves_kv = moves_kv
        self._discover = discover
        self._connect = connect
        self._links: dict[str, Link] = {}
        self._joined_s: dict[str, float] = {}
        self._facts: dict[str, ReplicaFacts] = {}
        self._ids: tuple[str, ...] = ()  # of the links, to draw from
        self._limit = (0.0, 0)  # when it was added up, and the sum
        self._refused: set[str] = set()
        self._listed: dict[str, ReplicaFacts] = {}  # by the last answer
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
        """Requests that all verifiers can run at once; up to ``LIMIT_AGE_S`` old."""
        now = asyncio.get_running_loop().time()
        when, limit = self._limit
        if not limit or now - when > LIMIT_AGE_S:
            limit = capacity(self.views)
            self._limit = (now, limit)
        return limit

    def joined_s(self, replica_id: str) -> float:
        """Seconds for which this router has had a link to a verifier."""
        now = asyncio.get_running_loop().time()
        return now - self._joined_s.get(replica_id, now)

    def described(self, replica_id: str) -> Mapping[str, object]:
        """The effective settings of a verifier."""
        facts = self._facts.get(replica_id)
        return facts.described if facts is not None else {}

    def tune(self, tune: Tune) -> None:
        """Hand a decision to every verifier."""
        for link in self._links.values():
            link.tune(tune)

    def candidates(self, ask: Ask) -> Iterator[tuple[Link, Prediction]]:
        """Links that may take the request, best first, and what is expected of each."""
        for prediction in choose(ask, self._ids, self._look, self._prefixes):
            link = self._links.get(prediction.replica_id)
            if link is not None and link.is_open:
                yield link, prediction

    async def submit(self, link: Link, request: Request, ask: Ask) -> Flight:
        """Send a request to a verifier and note it; raises what ``Link.submit`` raises."""
        if self.moves_kv and request.kv_source is None and (giver := self._giver(link, ask)) is not None:
            request = dataclasses.replace(request, kv_source=self.source_of(giver))
        flight = await link.submit(request)
        self._prefixes.add(ask.keys, link.replica_id)
        return flight

    def source_of(self, replica_id: str) -> KVSource | None:
        """Where KV of a verifier can be fetched; None if it is not known."""
        facts = self._facts.get(replica_id)
        return None if facts is None else KVSource(replica_id, facts.address, facts.token)

    def _giver(self, link: Link, ask: Ask) -> str | None:
        """A verifier from which ``link``'s had better fetch a part of the prefix."""
        holders = self._prefixes.holders(ask.keys) if ask.keys else []
        status, described = link.status, self.described(link.replica_id)
        if not holders or status is None:
            return None
        found = longest_holder(holders, link.replica_id, lambda name: self._is_open(name) and self.source_of(name) is not None)
        if found is None:
            return None
        capacity, size = described.get("kv_capacity_tokens"), described.get("kv_capacity_bytes")
        if not isinstance(capacity, int) or not isinstance(size, int) or not capacity:
            return None
        bytes_per_s = speed(status.stats.get("kv_fetched_bytes_total", 0.0), status.stats.get("kv_fetch_seconds_total", 0.0))
        return found[0] if pays(found[1], status.view.prefill_token_s, size / capacity, bytes_per_s) else None

    def _is_open(self, replica_id: str) -> bool:
        link = self._links.get(replica_id)
        return link is not None and link.is_open

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a verifier came or went, or after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def refresh(self) -> None:
        """Ask who is there; open links to newcomers, drop lost ones, and those that left and have nothing in flight.

        While nobody can say, those that were there last are: a lost link to one of them is opened again.
        """
        found = await self._discover()
        if found is not None:
            self._listed = {fact.replica_id: fact for fact in found}
        before = set(self._links)
        for replica_id, link in list(self._links.items()):
            gone = replica_id not in self._listed and link.in_flight == 0
            if link.lost is not None or gone:
                await self._drop(replica_id)
        self._refused &= self._listed.keys()
        newcomers = [fact for name, fact in self._listed.items() if name not in self._links and name not in self._refused]
        await asyncio.gather(*(self._open(fact) for fact in newcomers))
        if set(self._links) != before:
            self._ids = tuple(self._links)
            self._limit = (0.0, 0)
            self._changed.set()
            self._changed = asyncio.Event()

    def _look(self, replica_id: str) -> Standing | None:
        link = self._links.get(replica_id)
        if link is None or not link.is_open or (status := link.status) is None or not status.healthy:
            return None
        return Standing(status.view, Sent(*link.unseen))

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
            self._joined_s[facts.replica_id] = asyncio.get_running_loop().time()
            self._facts[facts.replica_id] = facts
            _log.info("verifier %s joined", facts.replica_id)

    async def _drop(self, replica_id: str) -> None:
        link = self._links.pop(replica_id)
        del self._joined_s[replica_id], self._facts[replica_id]
        self._prefixes.forget(replica_id)
        await link.close()
        _log.info("verifier %s left: %s", replica_id, link.lost)
