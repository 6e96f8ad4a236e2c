"""From a request to its outcomes, whatever happens to verifiers on the way.

The router holds the prompt and every token it has passed on. When a verifier dies they are sent to another one as the
known tokens of the same request; random numbers are keyed by seed and position, so the text goes on as it would have.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import Sequence
from typing import Final

from dspark.cluster.fleet import Fleet, ask_of
from dspark.errors import BadRequest, DSparkError, Overloaded, WorkerLost
from dspark.router.admission import admit, refuse_late
from dspark.types import Finish, Request, StepOutcome
from dspark.workers.wire.link import Flight, VerifierLeaves

MAX_REPLAYS: Final = 3  # a request that kills every verifier it meets must not take them all down
NEW_WAIT_S: Final = 5.0  # for a verifier, before the first token
RETRY_S: Final = 0.2
RATE_WINDOW_S: Final = 20.0

_log = logging.getLogger(__name__)


class Dispatcher:
    """Admits requests, places them on verifiers and follows them there."""

    def __init__(self, fleet: Fleet, max_waiting: int, replay_wait_s: float) -> None:
        self.fleet = fleet
        self.in_flight = 0
        self.replays = 0
        self.moves = 0
        self.is_draining = False
        self._max_waiting = max_waiting
        self._replay_wait_s = replay_wait_s
        self._ended: deque[float] = deque(maxlen=1024)

    async def start(self, requests: Sequence[Request], reject_when_late: bool = False) -> list[Generation]:
        """All requests queued at verifiers, or none: raises ``BadRequest``, ``Overloaded`` or ``WorkerLost``.

        With ``reject_when_late`` a request whose latency budget no verifier is predicted to keep is an overload.
        """
        if self.is_draining:
            raise Overloaded("this server is shutting down", 5.0)
        limit = self.fleet.running_limit
        if limit:  # without any verifier the wait in _place decides
            admit(len(requests), self.in_flight, limit, self._max_waiting, self._finished_per_s(), requests[0].priority)
        generations = [Generation(self, request) for request in requests]
        try:
            if len(generations) == 1:
                await generations[0].begin(reject_when_late)
            else:
                async with asyncio.TaskGroup() as group:
                    for generation in generations:
                        group.create_task(generation.begin(reject_when_late))
        except BaseExceptionGroup as failed:
            _close(generations)
            raise next((e for e in failed.exceptions if isinstance(e, DSparkError)), failed.exceptions[0]) from None
        except BaseException:
            _close(generations)
            raise
        return generations

    async def place(self, request: Request, deadline: float, may_refuse: bool, reject_when_late: bool = False) -> Flight:
        """A flight on the best verifier that takes the request, trying until ``deadline``.

        With ``may_refuse`` an overload of all of them is raised at once; a replay waits instead.
        """
        loop = asyncio.get_running_loop()
        ask = ask_of(request)
        while True:
            refusal: DSparkError | None = None
            for number, (link, prediction) in enumerate(self.fleet.candidates(ask)):
                if reject_when_late and number == 0:
                    refuse_late(ask, prediction)
                try:
                    return await self.fleet.submit(link, request, ask)
                except (Overloaded, WorkerLost) as error:
                    refusal = error if refusal is None or isinstance(error, Overloaded) else refusal
            if may_refuse and isinstance(refusal, Overloaded):
                raise refusal
            if loop.time() >= deadline:
                raise refusal or Overloaded("no verifier is available", 5.0)
            await self.fleet.wait_for_change(RETRY_S)

    async def move(self, request: Request) -> Flight:
        """A flight for a request whose verifier leaves; raises at once if no other takes it."""
        flight = await self.place(request, asyncio.get_running_loop().time(), may_refuse=True)
        self.moves += 1
        return flight

    async def replace(self, request: Request) -> Flight:
        """A flight for a request whose verifier was lost."""
        self.replays += 1
        return await self.place(request, asyncio.get_running_loop().time() + self._replay_wait_s, may_refuse=False)

    def entered(self) -> None:
        self.in_flight += 1

    def left(self) -> None:
        self.in_flight -= 1
        self._ended.append(asyncio.get_running_loop().time())

    def _finished_per_s(self) -> float:
        since = asyncio.get_running_loop().time() - RATE_WINDOW_S
        return sum(ended >= since for ended in self._ended) / RATE_WINDOW_S


class Generation:
    """The outcomes of one request, replayed on another verifier as often as needed; iterating ends after ``finish``.

    Raises ``WorkerLost`` or ``Overloaded`` when no verifier can go on with it. ``close`` must be called in the end; it cancels.
    """

    def __init__(self, dispatcher: Dispatcher, request: Request) -> None:
        self.request = request
        self.num_replays = 0
        self.num_moves = 0
        self._num_names = 0
        self._dispatcher = dispatcher
        self._emitted: list[int] = []
        self._flight: Flight | None = None
        self._is_done = False
        self._is_closed = False
        dispatcher.entered()

    @property
    def replica_id(self) -> str:
        """The verifier that runs the request, or ran it last; empty before it was placed."""
        return self._flight.replica_id if self._flight is not None else ""

    async def begin(self, reject_when_late: bool = False) -> None:
        """Return once a verifier has queued the request."""
        deadline = asyncio.get_running_loop().time() + NEW_WAIT_S
        self._hold(await self._dispatcher.place(self.request, deadline, True, reject_when_late))

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> StepOutcome:
        while not self._is_done:
            if self._flight is None:
                raise WorkerLost("the request was not placed")
            try:
                outcome = await anext(self._flight)
            except VerifierLeaves:
                await self._move(self._flight)
                continue
            except WorkerLost as lost:
                await self._replay(lost)
                continue
            if outcome.finish in (Finish.ABORT, Finish.ERROR):  # not the client's doing: it closes and never sees this
                await self._replay(WorkerLost(outcome.error or "the verifier stopped the request"))
                continue
            self._emitted.extend(outcome.tokens)
            self._is_done = outcome.finish is not None
            return outcome
        raise StopAsyncIteration

    def close(self) -> None:
        """End the request here and at its verifier; safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._flight is not None:
            self._flight.close()
        self._dispatcher.left()

    def _hold(self, flight: Flight) -> None:
        self._flight = flight
        if self._dispatcher.fleet.moves_kv:
            flight.tell_when_leaving()
        if self._is_closed:  # closed while it was being placed
            flight.close()

    async def _replay(self, lost: WorkerLost) -> None:
        if self.num_replays >= MAX_REPLAYS:
            raise WorkerLost(f"gave up after {MAX_REPLAYS} replays: {lost}") from lost
        self.num_replays += 1
        _log.warning("request %s is replayed with %d tokens: %s", self.request.id, len(self._emitted), lost)
        try:
            self._hold(await self._dispatcher.replace(self._rest()))
        except BadRequest as error:
            raise WorkerLost(f"the replay was refused: {error}") from error

    async def _move(self, flight: Flight) -> None:
        """Go on at another verifier, which fetches the KV from this one; if no other takes it, it ends where it is.

        What this one yields meanwhile is not looked at: the other one yields it again.
        """
        source = self._dispatcher.fleet.source_of(flight.replica_id)
        try:
            moved = await self._dispatcher.move(dataclasses.replace(self._rest(), kv_source=source))
        except DSparkError as refusal:
            _log.info("request %s stays at %s, which leaves: %s", self.request.id, flight.replica_id, refusal)
            return
        self.num_moves += 1
        flight.close()
        _log.info("request %s moved from %s to %s with %d tokens", self.request.id, flight.replica_id, moved.replica_id, len(self._emitted))
        self._hold(moved)

    def _rest(self) -> Request:
        """The request as it is now, for another verifier: what was passed on is known."""
        self._num_names += 1
        name = f"{self.request.id}~{self._num_names}"
        return dataclasses.replace(self.request, id=name, prompt_token_ids=self.request.prompt_token_ids + tuple(self._emitted))


def _close(generations: Sequence[Generation]) -> None:
    for generation in generations:
        generation.close()
