"""Draft workers inside one process, for tests: every message is encoded and decoded as on a socket, with faults on demand."""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from dspark.drafting import DraftBatch, DraftHost, DraftLayout, DraftSession, DraftWorkerFacts, SessionListener, TurnBatch
from dspark.errors import ProtocolMismatch, WorkerLost
from dspark.workers.wire import drafting_pb2 as pb
from dspark.workers.wire.codec import WireError
from dspark.workers.wire.drafting_codec import drafts_from_wire, drafts_to_wire, turns_from_wire, turns_to_wire


@dataclass(slots=True)
class Faults:
    """What a worker's network does wrong; may be changed at any time. Rates are shares of messages, both ways.

    ``delay_s`` holds answers back; ``drop`` loses messages without a word; ``corrupt`` flips a bit of a message.
    """

    delay_s: float = 0.0
    drop: float = 0.0
    corrupt: float = 0.0


class LocalDraftNetwork:
    """Workers by id. ``open_session`` is what a verifier connects with; ``kill`` and ``revive`` are a process's end and restart."""

    def __init__(self, seed: int = 0) -> None:
        self.faults: dict[str, Faults] = {}
        self._hosts: dict[str, DraftHost] = {}
        self._dead: set[str] = set()
        self._sessions: dict[str, list[_LocalSession]] = {}
        self._random = random.Random(seed)
        self._numbers = itertools.count()

    def add(self, worker_id: str, host: DraftHost) -> DraftWorkerFacts:
        """Attach a worker; returns how a verifier is told of it."""
        self._hosts[worker_id] = host
        self.faults[worker_id] = Faults()
        self._sessions[worker_id] = []
        return DraftWorkerFacts(worker_id, f"local:{worker_id}", "")

    def kill(self, worker_id: str) -> None:
        """Lose every session of the worker now; connecting fails until ``revive``."""
        self._dead.add(worker_id)
        sessions, self._sessions[worker_id] = self._sessions[worker_id], []
        for session in sessions:
            session.fall("killed")

    def revive(self, worker_id: str) -> None:
        """Let verifiers connect again."""
        self._dead.discard(worker_id)

    def open_session(self, facts: DraftWorkerFacts, layout: DraftLayout, listener: SessionListener) -> DraftSession:
        """An ``OpenSession``."""
        host = self._hosts[facts.worker_id]
        if facts.worker_id in self._dead:
            raise WorkerLost(f"draft worker {facts.worker_id} is dead")
        if wrong := host.layout.mismatch(layout):
            raise ProtocolMismatch(f"draft worker {facts.worker_id} does not fit the verifier: {wrong}")
        session = _LocalSession(host, listener, self.faults[facts.worker_id], self._random, f"local-{next(self._numbers)}")
        self._sessions[facts.worker_id].append(session)
        return session


class _LocalSession:
    """One thread carries answers down, in order, each ``delay_s`` after it was given."""

    def __init__(self, host: DraftHost, listener: SessionListener, faults: Faults, chance: random.Random, key: str) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._host = host
        self._listener = listener
        self._faults = faults
        self._chance = chance
        self._key = key
        self._is_open = True
        self._lock = threading.Lock()
        self._answers: queue.SimpleQueue[tuple[float, bytes] | None] = queue.SimpleQueue()
        threading.Thread(target=self._carry, name=key, daemon=True).start()

    def send(self, batch: TurnBatch) -> None:
        if not self._is_open:
            return
        data = turns_to_wire(batch).SerializeToString()
        self.bytes_sent += len(data)
        if (spoilt := self._spoil(data)) is None:
            return
        try:
            arrived = turns_from_wire(pb.Turns.FromString(spoilt), self._host.layout)
        except (WireError, DecodeError) as error:
            self.fall(str(error))
            return
        with self._lock:  # nothing may reach the worker behind the session's end: nobody would ever close it
            if self._is_open:
                self._host.submit(self._key, arrived, self._answer)

    def close_requests(self, request_ids: Sequence[str]) -> None:
        if self._is_open:
            self._host.close_requests(self._key, request_ids)

    def end(self) -> None:
        self.fall("ended")

    def fall(self, reason: str) -> None:
        """End the session at both sides."""
        with self._lock:
            was_open, self._is_open = self._is_open, False
        if was_open:
            self._answers.put(None)
            self._host.end_session(self._key)
            self._listener.lost(reason)

    def _answer(self, batch: DraftBatch) -> None:
        self._answers.put((time.monotonic() + self._faults.delay_s, drafts_to_wire(batch).SerializeToString()))

    def _carry(self) -> None:
        while (item := self._answers.get()) is not None:
            due, data = item
            time.sleep(max(0.0, due - time.monotonic()))
            if not self._is_open or (spoilt := self._spoil(data)) is None:
                continue
            self.bytes_received += len(data)
            try:
                batch = drafts_from_wire(pb.Drafts.FromString(spoilt), self._host.layout)
            except (WireError, DecodeError) as error:
                self.fall(str(error))
            else:
                self._listener.arrived(batch)

    def _spoil(self, data: bytes) -> bytes | None:
        """The message after the network: None if it was lost, perhaps with a flipped bit."""
        if self._chance.random() < self._faults.drop:
            return None
        if not data or self._chance.random() >= self._faults.corrupt:
            return data
        place = self._chance.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << self._chance.randrange(8))]) + data[place + 1 :]
