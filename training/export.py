"""From training state to a drafter folder that serving and other engines load, in the dialect of its kind and the target's dtype."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import numpy as np
import torch
from safetensors import SafetensorError

from dspark.errors import ConfigError
from dspark.training import checkpoints
from dspark.training.config import TrainConfig
from dspark.training.files import cannot_write, write_json
from dspark.training.model import Module, module_config, new_module
from dspark.training.shards import Corpus, read_corpus
from dspark.training.target import load_target
from dspark.workers.build import target_head
from dspark.workers.drafter.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from dspark.workers.drafter.draft_vocabulary import VOCABULARY_FILE
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.saving import save_drafter
from dspark.workers.verifier.targets import Target

Progress = Callable[[str], None]


def export(config: TrainConfig, progress: Progress) -> None:
    """Write the drafter of the last checkpoint, whether or not its schedule is done."""
    target, tokenizer = load_target(config)
    module = new_module(module_config(config.drafter, target, tokenizer), target_head(target), target.device, config.trainer.seed)
    if not checkpoints.load_module(config.checkpoints, module):
        raise ConfigError(f"{config.checkpoints} holds no checkpoint; run dspark train drafter first")
    export_module(config, module, read_corpus(config.data), target)
    progress(f"drafter in {config.drafter_folder}")


def export_module(config: TrainConfig, module: Module, corpus: Corpus, target: Target) -> None:
    """Write a drafter folder, replacing an older one only when the new one is whole. ConfigError if the disk refuses."""
    folder = config.drafter_folder
    making, before = (folder.with_name(f".{folder.name}.{state}") for state in ("making", "before"))
    shutil.rmtree(making, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)
    try:
        rounded = copy.deepcopy(module).to(target.dtype)
        size = config.drafter.draft_vocab_size
        frequent = None if size is None else frequent_tokens(corpus, size, target.vocab_size)
        if isinstance(rounded, Eagle3Module) and frequent is not None:
            rounded.use_draft_vocabulary(torch.tensor(frequent, device=target.device), None)
        save_drafter(making, rounded)
        (making / WEIGHTS_FILE).chmod((making / CONFIG_FILE).stat().st_mode)  # some versions write it for the owner only
        if not isinstance(rounded, Eagle3Module) and frequent is not None:
            write_json(making / VOCABULARY_FILE, {"token_ids": frequent}, indent=None)
        if folder.exists():
            folder.rename(before)
        making.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(making, ignore_errors=True)
        raise cannot_write(folder, error) from error


def frequent_tokens(corpus: Corpus, count: int, vocab_size: int) -> list[int]:
    """The ``count`` most frequent tokens of all answers, rising; ties go to the lower id."""
    lengths = np.diff(corpus.starts)
    places = np.arange(len(corpus.tokens)) - np.repeat(corpus.starts[:-1], lengths)
    answers = corpus.tokens[places >= np.repeat(corpus.prompt_lens, lengths)]
    counts = np.bincount(answers.astype(np.int64), minlength=vocab_size)
    best = np.argsort(-counts, kind="stable")[: min(count, vocab_size)]
    return [int(token) for token in np.sort(best)]
