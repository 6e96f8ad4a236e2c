"""A drafted block in one launch against the plain loop; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_checks import DEVICE, random

from dspark.kernels import markov_sample
from dspark.kernels.markov_sample import Block, BlockHeads, BlockRows, ConfidenceWeights

pytest.importorskip("triton")

VOCAB, RANK, HIDDEN, LENGTH = 200, 24, 40, 3


def block_of(run: str, count: int, candidates: int, width: int, seed: int, dtype: torch.dtype = torch.float32, **changes: object) -> Block:
    """R = ``count`` requests of mixed temperatures and rules through ``launch`` or ``reference``."""
    heads = {
        "w1": random(VOCAB, RANK, dtype=dtype, seed=seed),
        "w2": random(VOCAB, RANK, dtype=dtype, seed=seed + 1) / RANK**0.5,
        "target_ids": None,
        "confidence": ConfidenceWeights(
            random(1, HIDDEN + RANK, dtype=dtype, seed=seed + 2) / HIDDEN**0.5,
            random(1, dtype=dtype, seed=seed + 3),
            torch.tensor([0.7, 1.0, 1.6, 2.0], device=DEVICE),
        ),
    } | changes
    base = 2 * random(count, LENGTH, candidates, dtype=dtype, seed=seed + 4)
    ids = torch.stack(
        [torch.randperm(VOCAB, generator=torch.Generator().manual_seed(i))[:candidates] for i in range(count * LENGTH)] or [torch.empty(0)]
    )
    rows = BlockRows(
        anchors=torch.arange(count, device=DEVICE) * 13 % VOCAB,
        temperature=torch.tensor([(0.0, 1.0, 0.6, 1.7)[i % 4] for i in range(count)], dtype=torch.float32, device=DEVICE),
        seeds=torch.arange(count, device=DEVICE) - 2,
        base_lens=torch.arange(count, device=DEVICE) * 3 + 5,
        coupled=torch.arange(count, device=DEVICE) % 3 == 0,
    )
    ids = (
        ids.long().view(count, LENGTH, candidates).to(DEVICE)
        if count
        else torch.empty(0, LENGTH, candidates, dtype=torch.int64, device=DEVICE)
    )
    hidden = random(count, LENGTH, HIDDEN, dtype=dtype, seed=seed + 5)
    return getattr(markov_sample, run)(base, ids, hidden, rows, BlockHeads(**heads), width)


def assert_same(found: Block, wanted: Block) -> None:
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.ids, wanted.ids)
    for name in ("probs", "margin", "confidence"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(("candidates", "width"), [(64, 8), (100, 64), (20, 64), (64, 64), (64, 1)])
@pytest.mark.parametrize("seed", [0, 10])
def test_equals_the_loop(candidates: int, width: int, seed: int) -> None:
    found, wanted = (block_of(run, 7, candidates, width, seed) for run in ("launch", "reference"))
    assert found.ids.shape == (7, LENGTH, min(candidates, width))
    assert_same(found, wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"w1": None, "w2": None, "confidence": None},
        {"w1": None, "w2": None, "confidence": ConfidenceWeights(random(1, HIDDEN, seed=1), random(1, seed=2), None)},
        {"confidence": None},
        {"target_ids": torch.arange(VOCAB, device=DEVICE) * 3 // 4},
    ],
    ids=["no heads", "confidence of hidden alone", "confidence from the margin", "draft vocabulary"],
)
def test_heads_that_a_module_may_lack(changes: dict[str, object]) -> None:
    assert_same(block_of("launch", 5, 32, 8, 3, **changes), block_of("reference", 5, 32, 8, 3, **changes))


def test_every_position_follows_from_the_token_before() -> None:
    """Other anchors lead to other blocks: the bias is really read."""
    found = block_of("launch", 6, 64, 8, 20)
    without = block_of("launch", 6, 64, 8, 20, w1=None, w2=None, confidence=None)
    assert not torch.equal(found.tokens, without.tokens)


def test_no_requests() -> None:
    assert block_of("launch", 0, 16, 4, 0).tokens.shape == (0, LENGTH)


@pytest.mark.gpu
def test_bf16_laws_are_close() -> None:
    """Tokens may differ where two candidates tie in bf16; the laws of the first position may not by more than rounding."""
    found, wanted = (block_of(run, 64, 100, 64, 5, torch.bfloat16) for run in ("launch", "reference"))
    torch.testing.assert_close(found.margin[:, 0], wanted.margin[:, 0], atol=0.05, rtol=0.02)
    torch.testing.assert_close(found.confidence[:, 0], wanted.confidence[:, 0], atol=0.01, rtol=0.02)
    assert float((found.tokens == wanted.tokens).float().mean()) > 0.9
