"""Batches: every sequence once an epoch, within the budget, and anchors only where a block has something to predict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark.errors import ConfigError
from dspark.training.batches import PAD_TO, draw_anchors, make_batch, plan_epoch, split_corpus
from dspark.training.config import TrainerConfig
from dspark.training.shards import Corpus, Sample, read_corpus, write_shard

SETTINGS = TrainerConfig(batch_tokens=2048, anchors=8, max_len=200, held_out=10)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    rng = np.random.default_rng(0)
    samples = [Sample([7] * int(rng.integers(1, 50)), list(rng.integers(0, 99, int(rng.integers(1, 300)))), 0.0, i) for i in range(120)]
    write_shard(tmp_path, 0, samples, 300)
    return read_corpus(tmp_path)


def padded(lengths: NDArray[np.int64]) -> int:
    return -(-int(lengths.max()) // PAD_TO) * PAD_TO


def test_an_epoch_visits_every_sequence_once_within_the_budget(corpus: Corpus) -> None:
    split = split_corpus(corpus, SETTINGS)
    lengths = np.minimum(np.diff(corpus.starts), SETTINGS.max_len)
    assert len(split.held_out) == 10
    assert not set(split.train) & set(split.held_out)
    assert all(lengths[i] - corpus.prompt_lens[i] >= 2 for i in split.train)
    batches = plan_epoch(corpus, split.train, SETTINGS, 4, 0)
    assert sorted(i for batch in batches for i in batch) == split.train.tolist()
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (padded(lengths[batch]) + SETTINGS.anchors * 4) <= SETTINGS.batch_tokens
    assert any(len(batch) > 2 for batch in batches)


def test_plans_and_batches_are_functions_of_their_numbers(corpus: Corpus) -> None:
    split = split_corpus(corpus, SETTINGS)
    one, again, other = (plan_epoch(corpus, split.train, SETTINGS, 4, epoch) for epoch in (0, 0, 1))
    assert [batch.tolist() for batch in one] == [batch.tolist() for batch in again]
    assert [batch.tolist() for batch in one] != [batch.tolist() for batch in other]
    first, second = (make_batch(corpus, one[0], SETTINGS, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.anchors, second.anchors)
    assert first.samples.tolist() == one[0].tolist()
    for row, index in enumerate(one[0]):
        text = corpus.sample(int(index))[: SETTINGS.max_len]
        assert first.tokens[row, : len(text)].tolist() == text.tolist()
        assert int(first.lengths[row]) == len(text)


def test_anchors_lie_in_the_answer_and_have_a_label() -> None:
    lengths, prompts = torch.tensor([30, 12, 9]), torch.tensor([4, 6, 7])
    anchors, is_real = draw_anchors(lengths, prompts, 64, 16, torch.Generator().manual_seed(0))
    assert is_real.sum(1).tolist() == [16, 5, 1]
    for row in range(3):
        real = anchors[row][is_real[row]].tolist()
        assert len(set(real)) == len(real)
        assert all(int(prompts[row]) <= place <= int(lengths[row]) - 2 for place in real)
        assert bool((anchors[row][~is_real[row]] == prompts[row]).all())


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, [Sample([1], [2, 3], 0.0, 0), Sample([1] * 300, [2, 3], 0.0, 1)], 300)
    with pytest.raises(ConfigError, match="1 usable samples are too few"):
        split_corpus(read_corpus(tmp_path), SETTINGS)
