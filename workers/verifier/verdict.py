"""What is judged, and what comes of it: one request's rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark.sampling import SamplingParams
from dspark.types import DraftTree, TokenLogprob


@dataclass(frozen=True, slots=True)
class JudgeItem:
    """One request's rows of a step: the anchor's at ``first_row``, then one for each drafted node in order.

    ``output`` are its committed output ids (the anchor is the last of prompt + output). ``draft`` holds only the nodes that
    were verified; None: nothing was. ``stop_ids`` are suppressed while fewer than ``min_tokens`` output tokens would exist.
    ``may_branch``: it was drafted as a tree, whether or not it branches.
    """

    request_id: str
    sampling: SamplingParams
    noise_seed: int
    prompt: Sequence[int]
    output: Sequence[int]
    draft: DraftTree | None
    first_row: int
    stop_ids: tuple[int, ...] = ()
    may_branch: bool = False

    @property
    def drafted(self) -> tuple[int, ...]:
        return self.draft.tokens if self.draft is not None else ()

    @property
    def base_len(self) -> int:
        """Known tokens: the position that the anchor's row predicts."""
        return len(self.prompt) + len(self.output)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``tokens``: the accepted drafts, then one token of the target's own; ``logprobs`` of each where the request asks for them.

    ``path`` are the accepted nodes of a tree; None where the draft is a chain, whose first ``accepted`` nodes stand.
    """

    tokens: tuple[int, ...]
    accepted: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    path: tuple[int, ...] | None = None

    @property
    def nodes(self) -> Sequence[int]:
        """The accepted nodes, from the first token to the last."""
        return range(self.accepted) if self.path is None else self.path
