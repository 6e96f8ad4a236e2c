"""Where an engine's thread leaves outcomes, for tests that wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from dspark.types import StepOutcome


class Receiver:
    """Collects what a sink is given."""

    def __init__(self) -> None:
        self.calls: list[list[StepOutcome]] = []
        self.ended: dict[str, StepOutcome] = {}
        self.changed = threading.Event()

    def __call__(self, outcomes: Sequence[StepOutcome]) -> None:
        self.calls.append(list(outcomes))
        self.ended |= {o.request_id: o for o in outcomes if o.finish is not None}
        self.changed.set()

    def wait_for(self, count: int, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.ended) < count:
            assert time.monotonic() < deadline, f"only {len(self.ended)} of {count} requests ended"
            self.changed.wait(0.1)
            self.changed.clear()

    def tokens(self, request_id: str) -> list[int]:
        return [t for call in self.calls for o in call if o.request_id == request_id for t in o.tokens]
