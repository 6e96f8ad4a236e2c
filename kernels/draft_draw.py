"""The drafter's side of both acceptance rules: the law a token is drawn from, and the draw.

::

    logits        [R, V]   fp32 or bf16   one row a request, Markov bias included
    temperature   [R]      fp32           0: the argmax, as a one-hot law
    ids, probs    [R, k]   int64, fp32    the law: renormalised softmax over the k largest logits
    margin        [R]      fp32           how sure a row is of its best token
    seeds, positions, base_lens  [R] int64; coupled [R] bool

A ratio row must ship exactly the law its token was drawn from; a coupled row draws with the target's own noise, and
ships nothing. Neither reads the target's logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dspark.kernels.keyed_random import DRAFT, TOKEN, exponential, race
from dspark.kernels.top import first_argmax, largest

MAX_MARGIN = 12.0  # a rest of exp(-12) is near what fp32 can tell from nothing
MIN_TEMPERATURE = 1e-30  # below it logits / temperature would overflow; the law is the argmax long before


def truncate_law(logits: Tensor, temperature: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The softmax at the temperature over the ``width`` largest logits of each row: (ids [R, k], probs [R, k] fp32), k = min(width, V).

    The ids of a row go from the largest logit down. ``width`` must be at least 1.
    """
    values, ids = largest(logits, min(width, logits.shape[1]))
    values = values.to(torch.float32)
    if values.shape[1] == 1:
        return ids, torch.ones_like(values)
    scale = temperature.to(torch.float32).clamp(min=MIN_TEMPERATURE)[:, None]
    probs = torch.softmax((values - values[:, :1]) / scale, dim=-1)
    one_hot = torch.zeros_like(probs)
    one_hot[:, 0] = 1.0
    return ids, torch.where((temperature == 0)[:, None], one_hot, probs)


def law_of(logits: Tensor, temperature: Tensor) -> Tensor:
    """The softmax at the temperature over all logits of each row [R, k], in their order; at temperature 0 one-hot at the first largest."""
    values = logits.to(torch.float32)
    scale = temperature.to(torch.float32).clamp(min=MIN_TEMPERATURE)[:, None]
    probs = torch.softmax((values - values.amax(-1, keepdim=True)) / scale, dim=-1)
    one_hot = torch.zeros_like(probs).scatter_(1, first_argmax(values)[:, None], 1.0)
    return torch.where((temperature == 0)[:, None], one_hot, probs)


def log_odds(logits: Tensor) -> Tensor:
    """Log-odds of each row's largest logit against all others, at temperature 1 whatever the request's: [R], at most ``MAX_MARGIN``."""
    logits = logits.to(torch.float32)
    rest = torch.exp(logits - logits.amax(-1, keepdim=True)).sum(-1) - 1.0
    return -torch.log(rest.clamp(min=math.exp(-MAX_MARGIN)))


def draw(ids: Tensor, probs: Tensor, seeds: Tensor, positions: Tensor, base_lens: Tensor, coupled: Tensor) -> Tensor:
    """Draw a token a row from the law (ids, probs): tokens [R] int64.

    Coupled rows use the target's noise at the position; ratio rows use noise of their own, salted with the round's
    base_len so that a position drafted again draws afresh.
    """
    if ids.shape[1] == 1:
        return ids[:, 0]
    purpose = torch.where(coupled, TOKEN, DRAFT)
    salt = torch.where(coupled, 0, base_lens)
    columns = race(probs, seeds, positions, purpose, ids, salt)
    return ids.gather(1, columns[:, None]).squeeze(1)


def race_order(ids: Tensor, probs: Tensor, seeds: Tensor, positions: Tensor, coupled: Tensor, salts: Tensor) -> Tensor:
    """Keys [R, B, k] whose descending order draws candidates of B laws (ids, probs) [R, B, k] a row without replacement.

    The first is the token that ``draw`` would give, the next is drawn from the law without the first, and so on. Under the
    ratio rule the noise is salted with ``salts`` [R, B], the anchor's being the round's base_len and every other node's its
    ``child_salt``: what follows different nodes must be independent. Coupled rows share the target's noise at the position.
    """
    is_coupled = coupled.view(-1, 1, 1)
    purpose, salt = torch.where(is_coupled, TOKEN, DRAFT), torch.where(is_coupled, 0, salts.unsqueeze(-1))
    return probs / exponential(seeds.view(-1, 1, 1), positions.view(-1, 1, 1), purpose, ids, salt)


def child_salt(salts: Tensor, candidates: Tensor) -> Tensor:
    """Salts (int64, at least 0) of the nodes that are candidates 0, 1, … of nodes with ``salts``: a hash of the path."""
    return (salts * 0x2545F4914F6CDD1D + (candidates + 1) * 0x1B03738712FAD5C9) & (2**59 - 1)
