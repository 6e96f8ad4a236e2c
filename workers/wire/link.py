"""The router's end of one router-verifier stream, whatever carries it: ``Link`` and the ``Flight`` of each request.

A link belongs to one event loop. Transports call ``_accepted``, ``_rejected``, ``_arrived`` and ``_lost`` from that loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from dspark.errors import DSparkError, WorkerLost
from dspark.types import ReplicaView, Request, StepOutcome
from dspark.workers.wire.codec import Status, Tune

ACCEPT_TIMEOUT_S = 15.0  # a verifier answers a Submit from its event loop, without waiting for the engine


class Sink(Protocol):
    """Takes the outcomes of one engine step; called on the engine's thread."""

    def __call__(self, outcomes: Sequence[StepOutcome], /) -> None: ...


class Host(Protocol):
    """What a verifier offers a transport (``workers/verifier/host.py`` is the real one); all methods are thread-safe."""

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request, or raise ``BadRequest`` or ``Overloaded`` at once."""

    def cancel(self, request_id: str) -> None:
        """Stop a request and free what it holds; unknown ids are ignored."""

    def view(self, replica_id: str, address: str) -> ReplicaView:
        """The replica's load now."""

    def stats(self) -> dict[str, float]:
        """Counters and gauges by name."""

    def is_healthy(self) -> bool:
        """False when work is queued and nothing has moved for too long."""

    def tune(self, speculation_limit: float) -> None:
        """Verify at most this share of the longest draft from now on."""


class VerifierLeaves(Exception):
    """Said once to a flight that asked to be told: its verifier takes no more requests and will end when the running ones have."""


class Flight:
    """The outcomes of one request on one verifier, in order; iterating ends after the outcome that carries ``finish``.

    Raises ``WorkerLost`` when the verifier goes away first. ``close`` cancels the request unless it has ended.
    """

    __slots__ = ("_accepted", "_done", "_link", "_queue", "_wants_to_know", "is_shown", "num_tokens", "request_id", "was_heard")

    def __init__(self, link: Link, request: Request) -> None:
        self.request_id = request.id
        self.num_tokens = len(request.prompt_token_ids)
        self.is_shown = False  # by the link's latest view
        self.was_heard = False
        self._link = link
        self._queue: asyncio.Queue[StepOutcome | DSparkError | VerifierLeaves] = asyncio.Queue()
        self._wants_to_know = False
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._done = False

    def __aiter__(self) -> Flight:
        return self

    async def __anext__(self) -> StepOutcome:
        if self._done:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, VerifierLeaves):
            raise item
        if isinstance(item, DSparkError):
            self._done = True
            raise item
        self._done = item.finish is not None
        return item

    @property
    def replica_id(self) -> str:
        return self._link.replica_id

    @property
    def is_accepted(self) -> bool:
        """Whether the verifier has answered that it queued the request."""
        return self._accepted.done()

    async def accepted(self) -> None:
        """Return once the verifier has queued the request; raises its refusal, or ``WorkerLost``."""
        try:
            await asyncio.wait_for(asyncio.shield(self._accepted), ACCEPT_TIMEOUT_S)
        except TimeoutError:
            raise WorkerLost(f"verifier {self._link.replica_id} did not answer in {ACCEPT_TIMEOUT_S:g} s") from None

    def close(self) -> None:
        """Forget the request; the verifier is told to stop it if it still runs there."""
        self._link.release(self)

    def tell_when_leaving(self) -> None:
        """Let iterating raise ``VerifierLeaves`` once, now or later; it can go on afterwards."""
        self._wants_to_know = True
        if self._link.is_draining:
            self.leaves()

    def leaves(self) -> None:
        if self._wants_to_know:
            self._wants_to_know = False
            self._queue.put_nowait(VerifierLeaves())

    def put(self, item: StepOutcome | DSparkError) -> None:
        if isinstance(item, DSparkError) and not self._accepted.done():
            self._accepted.set_exception(item)
            self._accepted.exception()  # retrieved: a flight that was closed meanwhile has nobody to raise it to
        self.was_heard = True
        self._queue.put_nowait(item)

    def accept(self) -> None:
        if not self._accepted.done():
            self._accepted.set_result(None)


class Link(ABC):
    """A stream to one verifier replica: submits requests, hands each outcome to its flight, keeps the latest view."""

    def __init__(self, replica_id: str, address: str) -> None:
        self.replica_id = replica_id
        self.address = address
        self.is_open = False
        self.lost: WorkerLost | None = None
        self._flights: dict[str, Flight] = {}
        self._status: Status | None = None
        self._heard_s = 0.0
        self._num_left = 0  # flights that have ended or were closed, and that the latest view shows

    @abstractmethod
    async def open(self, timeout_s: float) -> None:
        """Connect and shake hands; ``ProtocolMismatch`` or ``WorkerLost`` if that fails."""

    @abstractmethod
    async def close(self) -> None:
        """End the stream; flights still in the air see ``WorkerLost``."""

    @abstractmethod
    def _send_submit(self, request: Request) -> None: ...

    @abstractmethod
    def _send_cancel(self, request_id: str) -> None: ...

    @abstractmethod
    def _send_tune(self, tune: Tune) -> None: ...

    @property
    def in_flight(self) -> int:
        """Requests of this router that are at this verifier."""
        return len(self._flights)

    @property
    def is_draining(self) -> bool:
        """Whether the verifier said that it takes no more requests."""
        return self._status is not None and self._status.view.draining

    @property
    def unseen(self) -> tuple[int, int, int]:
        """What the latest view does not show: requests sent, tokens of those without an outcome, and requests that have ended.

        A view may be older than a request that was sent before it came. But the stream keeps order: a view shows a request
        exactly if it comes after the verifier's word that the request is queued, and before its end.
        """
        unseen = [flight for flight in self._flights.values() if not flight.is_shown]
        return len(unseen), sum(flight.num_tokens for flight in unseen if not flight.was_heard), self._num_left

    @property
    def status(self) -> Status | None:
        """What the verifier last said of itself, aged; None before the first word."""
        if self._status is None:
            return None
        age_s = asyncio.get_running_loop().time() - self._heard_s
        return dataclasses.replace(self._status, view=dataclasses.replace(self._status.view, age_s=age_s))

    def tune(self, tune: Tune) -> None:
        """Hand a decision to the verifier; a closed link drops it."""
        if self.is_open:
            self._send_tune(tune)

    async def submit(self, request: Request) -> Flight:
        """Send a request and wait until it is queued; ``BadRequest``, ``Overloaded`` or ``WorkerLost`` if it is not."""
        if not self.is_open:
            raise self.lost or WorkerLost(f"the link to verifier {self.replica_id} is closed")
        if request.id in self._flights:
            raise ValueError(f"request {request.id} is already in flight")
        flight = Flight(self, request)
        self._flights[request.id] = flight
        try:
            self._send_submit(request)
            await flight.accepted()
        except BaseException:
            self.release(flight)
            raise
        return flight

    def release(self, flight: Flight) -> None:
        """Cancel the flight's request if it has not ended."""
        if self._flights.get(flight.request_id) is flight:
            del self._flights[flight.request_id]
            self._num_left += flight.is_shown
            if self.is_open:
                self._send_cancel(flight.request_id)

    def _accepted(self, request_id: str) -> None:
        if flight := self._flights.get(request_id):
            flight.accept()

    def _rejected(self, request_id: str, error: DSparkError) -> None:
        if flight := self._flights.pop(request_id, None):
            flight.put(error)

    def _arrived(self, outcomes: Sequence[StepOutcome]) -> None:
        for outcome in outcomes:
            flight = self._flights.get(outcome.request_id)
            if flight is None:  # cancelled while this was on its way
                continue
            if outcome.finish is not None:
                del self._flights[outcome.request_id]
                self._num_left += flight.is_shown
            flight.put(outcome)

    def _heard(self, status: Status) -> None:
        self._status = status
        self._heard_s = asyncio.get_running_loop().time()
        self._num_left = 0
        for flight in self._flights.values():
            flight.is_shown = flight.is_accepted
            if status.view.draining:
                flight.leaves()

    def _fell(self, reason: str) -> None:
        """Mark the link lost and tell every flight."""
        if self.lost is not None:
            return
        self.is_open = False
        self.lost = WorkerLost(f"verifier {self.replica_id}: {reason}")
        flights, self._flights = self._flights, {}
        for flight in flights.values():
            flight.put(self.lost)
