"""What one rank must know to join: plain values, sent to its process as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from dspark.workers.verifier.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One rank of a parallel verifier. ``host`` and ``port`` are the leader's store; ``dtype`` a name of torch.

    ``loads_at_once`` ranks may hold the whole model in host memory at the same time.
    """

    rank: int
    tensor: int
    expert: int
    host: str
    port: int
    model: str
    name: str
    revision: str | None
    dtype: str
    device: str
    threads: int
    kv_tokens: int | None
    loads_at_once: int

    @property
    def layout(self) -> Layout:
        return Layout(self.rank, self.tensor, self.expert)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RankSpec:
        return RankSpec(**json.loads(text))
