"""What a verifier and a draft worker say to each other, as nouns: ``workers/drafter`` speaks them, ``workers/wire`` carries them.

A verifier sends numbered batches of ``DraftTurn``; every batch is answered once, by its number, with the trees that were
drafted. A turn implies what the worker holds after it: ``base_len`` tokens, and context of all positions up to the end of
its features. Where that is wrong (the worker found more of the prefix in its cache, never had the request, or a batch was
lost) the answer says what it does hold, and the verifier goes on from there; a request without context has no drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Final, Protocol

from dspark.types import DraftTree, DraftTurn

FULL_RETRY_S: Final = 2.0  # before a verifier asks a worker again that had no room for a request


@dataclass(frozen=True, slots=True)
class DraftLayout:
    """What both ends must agree on before a tensor crosses.

    ``target`` and ``drafter`` are fingerprints of the checkpoints; features are [n, ``feature_width``] in ``dtype``.
    """

    target: str
    drafter: str
    dtype: str
    feature_width: int
    block_size: int
    vocab_size: int

    def mismatch(self, other: DraftLayout) -> str | None:
        """Every field in which ``other`` differs, with both values; None if they agree."""
        names = [item.name for item in fields(self) if getattr(self, item.name) != getattr(other, item.name)]
        return "; ".join(f"{name} is {getattr(self, name)!r} here and {getattr(other, name)!r} there" for name in names) or None


@dataclass(frozen=True, slots=True)
class TurnBatch:
    """Turns of one verifier's step for one worker.

    Features may still be on their way to the host when the batch is made: ``wait_ready`` returns when they have arrived.
    """

    seq: int
    turns: tuple[DraftTurn, ...]
    wait_ready: Callable[[], None] = field(default=lambda: None, compare=False)


@dataclass(frozen=True, slots=True)
class Held:
    """What the worker holds of a request after a batch: ``known`` tokens, and context of positions below ``have``.

    ``is_full``: it has no room for the request now, and has forgotten it.
    """

    request_id: str
    known: int
    have: int
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """The answer to the batch ``seq``.

    ``held`` names the requests of which the worker does not hold what their turns implied. ``seconds`` is what computing took.
    """

    seq: int
    trees: tuple[DraftTree, ...] = ()
    held: tuple[Held, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class DraftWorkerFacts:
    """Where a draft worker listens, and the secret that opens its stream."""

    worker_id: str
    address: str
    token: str = field(repr=False)


class SessionListener(Protocol):
    """Hears what a worker says; called on a thread of the transport, which it must not hold up."""

    def arrived(self, batch: DraftBatch) -> None:
        """A batch was answered."""

    def drains(self) -> None:
        """The worker is about to stop: it goes on answering, but other workers are to be preferred from now on."""

    def lost(self, reason: str) -> None:
        """The stream ended; said once, and nothing after it."""


class DraftSession(Protocol):
    """The verifier's end of a stream to one draft worker. No method waits for the network."""

    @property
    def bytes_sent(self) -> int: ...

    @property
    def bytes_received(self) -> int: ...

    def send(self, batch: TurnBatch) -> None:
        """Put a batch on its way; dropped if the stream has ended."""

    def close_requests(self, request_ids: Sequence[str]) -> None:
        """Let the worker forget requests."""

    def end(self) -> None:
        """End the stream; the listener hears that it is lost."""


OpenSession = Callable[[DraftWorkerFacts, DraftLayout, SessionListener], DraftSession]  # WorkerLost or ProtocolMismatch if it cannot


class DraftHost(Protocol):
    """What a draft worker offers a transport (``workers/drafter/worker_host.py`` is the real one); all methods are thread-safe."""

    layout: DraftLayout

    def submit(self, session: str, batch: TurnBatch, answer: Callable[[DraftBatch], None]) -> None:
        """Queue a batch of a session; ``answer`` is called once, on the worker's compute thread. WorkerLost if it has ended."""

    def close_requests(self, session: str, request_ids: Sequence[str]) -> None:
        """Forget requests of a session; unknown ones are fine."""

    def end_session(self, session: str) -> None:
        """Forget all requests of a session."""

    def is_healthy(self) -> bool:
        """False when batches are queued and none was answered for too long, or drafting failed for good."""

    def stats(self) -> dict[str, float]:
        """Counters and gauges by name."""
