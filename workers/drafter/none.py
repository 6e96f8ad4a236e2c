"""The drafter that never drafts: plain decoding behind the same seam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dspark.types import DraftSignals, DraftTree, DraftTurn


class NoDrafter:
    """Proposes nothing and keeps nothing, so every round commits the target's own token only."""

    block_size: int = 0
    taps: tuple[int, ...] = ()
    signals: DraftSignals = DraftSignals()

    def project(self, taps: Any) -> None:
        """No features: this drafter taps no layer."""

    def propose(self, turns: Sequence[DraftTurn]) -> None:
        """Nothing is kept."""

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """Always empty."""
        return {}

    def close(self, request_ids: Sequence[str]) -> None:
        """Nothing to forget."""
