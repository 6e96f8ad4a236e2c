"""What one request has done to its logits, and which of their values it wants to see: as its sequence tells the device's judge."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.sampling import SamplingParams
from dspark.workers.verifier.laws import has_penalties


@dataclass(slots=True, eq=False)
class LogitEdits:
    """``tokens`` are all that the host knows (not a copy), the first ``num_prompt`` of them the prompt; ``stop_ids`` end the request.

    ``lasts``: until the request ends, and not only while ``min_tokens`` are missing.
    """

    request_id: str
    sampling: SamplingParams
    tokens: list[int]
    num_prompt: int
    lasts: bool
    stop_ids: tuple[int, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether the law depends on the tokens so far."""
        return has_penalties(self.sampling)

    @property
    def scores(self) -> bool:
        """Whether log-probabilities are asked for."""
        return self.sampling.logprobs is not None

    @staticmethod
    def of(request_id: str, sampling: SamplingParams, tokens: list[int], num_prompt: int) -> LogitEdits | None:
        """None for a request that takes its logits as they are."""
        lasts = bool(sampling.logit_bias) or has_penalties(sampling) or sampling.logprobs is not None
        return LogitEdits(request_id, sampling, tokens, num_prompt, lasts) if lasts or sampling.min_tokens else None
