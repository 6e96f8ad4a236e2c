"""Who takes part in the step being planned: an entry a row in lists, added while tokens are given out.

What the planner needs to know of all rows is added up on the way, where every request is looked at anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from dspark.types import DraftTree, Mode
from dspark.workers.verifier.costs import Floats, LiveCosts
from dspark.workers.verifier.sequence import Sequence


@dataclass(slots=True)
class Shares:
    """The step's R rows, lists [R]: ``limits`` are seconds a token that keep a latency budget (inf: none); ``samples`` whether a row
    computes all known tokens, so that it yields new ones.

    ``places``: rows with a draft that may be trimmed, and ``drafts`` these; ``whole``: rows whose draft may not. A stale draft is none.
    ``num_draft`` and ``num_commit`` [R] are the planner's answer: drafted tokens to verify, and how many of them may be committed.
    """

    sequences: list[Sequence] = field(default_factory=list)
    num_known: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    drafts: list[DraftTree] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    shadows: list[int] = field(default_factory=list)  # of ``places``, rows in shadow mode
    num_tokens: int = 0  # known ones, of all rows
    decode_tokens: int = 0
    context: int = 0  # positions
    num_limited: int = 0  # rows with a latency budget
    is_unbiased: bool = True  # no trimming can change the law of a text: greedy, coupled, or drafts fixed by the history
    num_draft: list[int] = field(default_factory=list)
    num_commit: list[int] = field(default_factory=list)

    def add(self, sequence: Sequence, num_known: int, limit_s: float) -> None:
        """Give a request so many of its pending tokens."""
        reach = sequence.num_computed + num_known
        samples = reach == len(sequence.tokens)
        draft = sequence.draft
        if draft is not None and samples and draft.base_len == reach and draft.parents and sequence.drafts_wanted:
            place, mode = len(self.sequences), sequence.speculation.mode
            if mode is Mode.STATIC:
                self.whole.append(place)
            else:
                self.places.append(place)
                self.drafts.append(draft)
                if mode is Mode.SHADOW:
                    self.shadows.append(place)
                if draft.law is not None and not sequence.request.sampling.is_exact:
                    self.is_unbiased = False
        self.sequences.append(sequence)
        self.num_known.append(num_known)
        self.samples.append(samples)
        self.limits.append(limit_s)
        self.num_tokens += num_known
        self.context += reach
        if num_known == 1:
            self.decode_tokens += 1
        if limit_s < math.inf:
            self.num_limited += 1

    def drop(self, sequence: Sequence) -> None:
        """Take back what a request was given, if anything."""
        kept = Shares()
        for other, num_known, limit_s in zip(self.sequences, self.num_known, self.limits, strict=True):
            if other is not sequence:
                kept.add(other, num_known, limit_s)
        for one in fields(self):
            setattr(self, one.name, getattr(kept, one.name))

    def seconds(self, costs: LiveCosts, max_extra: int, with_padding: bool = True) -> Floats:
        """Seconds [k + 1] of the step with 0 .. k drafted tokens."""
        seconds = costs.extra_seconds(self.decode_tokens, self.context, max_extra, with_padding)
        if num_prefill := self.num_tokens - self.decode_tokens:
            seconds += costs.table.prefill_s * num_prefill
        return seconds


def num_drafted(sequence: Sequence) -> int:
    """Drafted tokens at hand, of those that are wanted."""
    return 0 if sequence.draft is None else min(len(sequence.draft.tokens), sequence.drafts_wanted)
