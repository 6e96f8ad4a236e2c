"""Which draft worker drafts for whom: rendezvous hashing with bounded load. Pure; every caller with the same views agrees.

A key (a verifier, or a request) goes to the worker with the highest hash of key and worker, so that a worker that comes or
goes moves only the keys that it wins or loses: the others keep the drafter KV that they have built up there. A worker that
carries ``SLACK`` times the mean load is passed over until the others have caught up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

SLACK: Final = 1.25
MAX_AGE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class DraftWorkerView:
    """What is known of a draft worker: ``load`` in any unit that all share (requests it drafts for), ``weight`` its relative speed."""

    id: str
    load: float = 0.0
    weight: float = 1.0
    draining: bool = False
    age_s: float = 0.0


def assign(key: str, workers: Iterable[DraftWorkerView]) -> list[str]:
    """Ids of the workers that may draft for ``key``, best first; leaving or silent ones are left out."""
    usable = [worker for worker in workers if not worker.draining and worker.age_s <= MAX_AGE_S]
    total_weight = sum(worker.weight for worker in usable)
    if not total_weight:
        return []
    mean = (sum(worker.load for worker in usable) + 1.0) / total_weight  # as if the key were there already
    ordered = sorted(usable, key=lambda w: (w.load + 1.0 > math.ceil(SLACK * mean * w.weight), -_score(key, w), w.id))
    return [worker.id for worker in ordered]


def assign_by_load(key: str, loads: Mapping[str, int]) -> str:
    """The best of some usable workers by id, ``loads`` being what each carries; there must be one."""
    return assign(key, [DraftWorkerView(worker_id, load) for worker_id, load in loads.items()])[0]


def _score(key: str, worker: DraftWorkerView) -> float:
    """Weighted rendezvous: the key goes to each worker in proportion to the weights."""
    digest = hashlib.blake2b(f"{key}\0{worker.id}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return worker.weight / -math.log(uniform)
