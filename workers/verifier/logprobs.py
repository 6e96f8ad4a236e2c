"""Log-probabilities under the target's raw law: before bias, penalties, temperature and truncation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.kernels.top import largest
from dspark.sampling import MAX_LOGPROBS
from dspark.types import TokenLogprob

SCORE_ROWS = 32  # rows scored at once: bounds the memory that a long prompt takes


def prompt_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of given tokens under raw logits [n, V], row i scoring tokens[i], with ``top`` alternatives each."""
    return score(logits, tokens, [top] * len(tokens))


def score(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Score tokens[i] under row i of raw logits [n, V]: log-softmax, rank (1 + how many are likelier), the ``tops[i]`` likeliest."""
    scores: list[TokenLogprob] = []
    for start in range(0, len(tokens), SCORE_ROWS):
        part = slice(start, start + SCORE_ROWS)
        scores += _score_rows(logits[part].to(torch.float32), tokens[part], tops[part])
    return scores


def _score_rows(rows: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    chosen = torch.tensor(tokens, dtype=torch.int64, device=rows.device)[:, None]
    logprobs = rows.log_softmax(-1)
    ranks = (rows > rows.gather(1, chosen)).count_nonzero(-1) + 1
    # As many as may ever be asked for, or none: what one row gets must not depend on its neighbours.
    best = largest(rows, min(MAX_LOGPROBS, rows.shape[1]))[1] if any(tops) else chosen[:, :0]
    columns = [logprobs.gather(1, chosen).squeeze(1), ranks, best, logprobs.gather(1, best)]
    scores = []
    for token, top, logprob, rank, ids, values in zip(tokens, tops, *(column.tolist() for column in columns), strict=True):
        order = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        scores.append(TokenLogprob(token, logprob, rank, tuple(order[:top])))
    return scores
