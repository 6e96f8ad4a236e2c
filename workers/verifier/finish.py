"""Where a request ends inside a block of committed tokens."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.types import Finish
from dspark.workers.verifier.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Cut:
    """The tokens that count, and why the request ends with them (None: it goes on)."""

    tokens: tuple[int, ...]
    finish: Finish | None = None
    stop_reason: str | int | None = None


def cut(sequence: Sequence, tokens: tuple[int, ...], eos_ids: tuple[int, ...]) -> Cut:
    """Cut a block of new tokens at the first stop token, stop string or length limit, whichever comes first.

    Stops are looked for before the length limit: several tokens commit at once, and one of them may be an EOS that lies
    inside the limit. Stop tokens and stop strings do not count before ``min_tokens``.
    """
    sampling = sequence.request.sampling
    room = sequence.max_len - sequence.num_known
    tokens = tokens[:room]
    for i, token in enumerate(tokens):
        count = len(sequence.output) + i + 1
        can_stop = count > sampling.min_tokens
        if can_stop and not sampling.ignore_eos and token in eos_ids:
            return Cut(tokens[: i + 1], Finish.STOP)
        if can_stop and token in sampling.stop_token_ids:
            return Cut(tokens[: i + 1], Finish.STOP, token)
        if sequence.text is not None:
            sequence.text.push([token])
            if sequence.text.stop_hit is not None and count >= sampling.min_tokens:
                return Cut(tokens[: i + 1], Finish.STOP, sequence.text.stop_hit)
    if len(tokens) == room:
        return Cut(tokens, Finish.LENGTH)
    return Cut(tokens)
