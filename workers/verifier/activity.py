"""What drafting did lately: whether the speculation that an engine was asked for takes place, and what a round yields."""

from __future__ import annotations

import math

from dspark.types import Mode, SpeculationState
from dspark.workers.verifier.engine import Engine

ENOUGH = 200  # drafts asked for, without one that came: not a slow moment any more
MEMORY_ROUNDS = 500.0  # a round this many rounds ago counts 1/e


class RecentDrafts:
    """Follows the counters of one engine; call ``update`` whenever somebody looks."""

    def __init__(self) -> None:
        self.tokens_per_round = 1.0
        self.drafted_per_round = 0.0
        self._seen = (0, 0, 0)  # rounds, drafted, accepted
        self._asked = 0
        self._arrived = 0
        self._delivers = True

    def update(self, engine: Engine) -> None:
        """Take in what happened since the last call."""
        counters = engine.counters
        now = (counters.rounds, counters.drafted, counters.accepted)
        rounds, drafted, accepted = (after - before for after, before in zip(now, self._seen, strict=True))
        if rounds > 0:
            weight = 1.0 if self._seen[0] == 0 else 1.0 - math.exp(-rounds / MEMORY_ROUNDS)
            self.tokens_per_round += weight * (1.0 + accepted / rounds - self.tokens_per_round)
            self.drafted_per_round += weight * (drafted / rounds - self.drafted_per_round)
            self._seen = now
        if counters.drafts_arrived > self._arrived or counters.drafts_asked >= self._asked + ENOUGH:
            self._delivers = counters.drafts_arrived > self._arrived
            self._asked, self._arrived = counters.drafts_asked, counters.drafts_arrived

    def state(self, engine: Engine) -> SpeculationState:
        """The state at the last update; ``INACTIVE`` needs a missing drafter, or ``ENOUGH`` drafts in a row that did not come."""
        if engine.options.speculation.mode is Mode.OFF:
            return SpeculationState.OFF
        if not engine.drafter.block_size or not self._delivers:
            return SpeculationState.INACTIVE
        return SpeculationState.PAUSED if engine.drafts.is_paused else SpeculationState.ACTIVE
