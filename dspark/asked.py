"""What requests ask of sampling, as records that travel from the host to kernels: one each, joined to a step's by bytes alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark.sampling import AcceptanceRule, SamplingParams

GREEDY, COUPLED, RATIO = 0, 1, 2  # as kernels know them (``kernels/chain_judge.py``)
RECORD = np.dtype([("seed", "<i8"), ("top_p", "<f8"), ("min_p", "<f8"), ("temperature", "<f4"), ("top_k", "<i4"), ("rule", "<i8")])


def record_of(sampling: SamplingParams, seed: int) -> bytes:
    """The record of a request whose noise is keyed by ``seed``; edits of logits have no place in it."""
    rule = GREEDY if sampling.is_greedy else COUPLED if sampling.rule is AcceptanceRule.COUPLED else RATIO
    return np.array((seed, sampling.top_p, sampling.min_p, sampling.temperature, max(sampling.top_k, 0), rule), RECORD).tobytes()


def records_in(records: bytes) -> NDArray[np.void]:
    """[R] RECORD of records that were joined."""
    return np.frombuffer(records, RECORD)
