"""Predict only the tokens that matter: a drafter restricted to the most frequent part of the vocabulary.

Output head and Markov head cost as much as all layers together on a CPU, and most of their rows never win. A checkpoint may
name its frequent tokens in ``draft_vocabulary.json``; where memory is slow the drafter then reads those rows only. The draft
law is supported on them, so nothing is lost but the drafts of rare tokens.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from dspark.errors import ConfigError
from dspark.workers.drafter.dspark_module import DSparkModule

VOCABULARY_FILE = "draft_vocabulary.json"


def read_draft_vocabulary(folder: Path, vocab_size: int) -> Tensor | None:
    """Rising target ids [n] that the checkpoint in ``folder`` predicts best; None if it names none. ConfigError if damaged."""
    path = folder / VOCABULARY_FILE
    if not path.exists():
        return None
    try:
        ids = torch.tensor(json.loads(path.read_text(encoding="utf-8"))["token_ids"], dtype=torch.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"drafter: {path} cannot be read: {error}") from error
    if ids.dim() != 1 or not len(ids) or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size or bool((ids.diff() <= 0).any()):
        raise ConfigError(f"drafter: {path} must name rising token ids below {vocab_size}")
    return ids


def restrict_vocabulary(module: DSparkModule, ids: Tensor) -> None:
    """Let a module over the whole vocabulary predict only the target ids ``ids`` [n]."""
    assert module.draft_target_ids is None, "the vocabulary is restricted already"
    ids = ids.to(module.draft_lm_head.device)
    if module.markov_head is not None:
        full = module.markov_head.markov_w2
        part = nn.Linear(full.in_features, len(ids), bias=False, device="meta")
        part.weight = nn.Parameter(full.weight.detach()[ids].contiguous(), requires_grad=False)
        module.markov_head.markov_w2 = part
    module.config = dataclasses.replace(module.config, draft_vocab_size=len(ids))
    module.use_draft_vocabulary(ids, None)
