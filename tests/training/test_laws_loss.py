"""The chunked loss and its hand-written gradients against autograd over everything at once, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dspark.training.laws_loss import LawRows, LawTerms, law_loss
from dspark.workers.drafter.target_head import TargetHead

VOCAB, SIZE, RANK, ROWS = 13, 6, 3, 11


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def make_head(softcap: float | None) -> TargetHead:
    weight = random(VOCAB, SIZE, seed=1)
    return TargetHead(weight, weight, SIZE, VOCAB, 2, "llama", softcap=softcap)


def make_rows() -> LawRows:
    labels = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(2))
    weights = random(ROWS, seed=3).abs()
    weights[4] = 0.0
    return LawRows(random(ROWS, SIZE, seed=4), labels, weights)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


def reference(hidden: Tensor, bias: Tensor, rows: LawRows, terms: LawTerms) -> tuple[Tensor, Tensor]:
    """(loss, overlap) by the definition."""
    head = terms.head
    log_draft = (capped(hidden @ head.lm_head.T, head.softcap) + bias).log_softmax(-1)
    law = capped(rows.target @ head.lm_head.T, head.softcap).softmax(-1)
    distance = (log_draft.exp() - law).abs().sum(-1)
    entropy = -log_draft[torch.arange(ROWS), rows.labels]
    return (rows.weights * (terms.cross_entropy * entropy + terms.law * distance)).sum(), 1 - distance / 2


@pytest.mark.parametrize(("softcap", "chunk"), itertools.product((None, 2.0), (1, 4, 100)))
def test_loss_and_gradients_equal_the_unchunked_reference(softcap: float | None, chunk: int) -> None:
    terms = LawTerms(0.1, 0.9, chunk, make_head(softcap))
    rows = make_rows()
    ours = [random(*shape, seed=seed).requires_grad_() for seed, shape in ((5, (ROWS, SIZE)), (6, (ROWS, RANK)), (7, (VOCAB, RANK)))]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    found = law_loss(*ours, rows, terms)
    expected, overlap = reference(theirs[0], theirs[1] @ theirs[2].T, rows, terms)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.overlap.double(), overlap, rtol=1e-6, atol=1e-6)
    (3.0 * found.loss).backward()
    (3.0 * expected).backward()
    for own, other in zip(ours, theirs, strict=True):
        assert own.grad is not None
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_compiled_loss_is_the_same(softcap: float | None) -> None:
    """Compiled once for chunks of any size: the last one is smaller."""
    found = []
    for compiled in (False, True):
        terms = LawTerms(0.1, 0.9, 4, make_head(softcap), compiled)
        inputs = [random(*shape, seed=seed).requires_grad_() for seed, shape in ((5, (ROWS, SIZE)), (6, (ROWS, RANK)), (7, (VOCAB, RANK)))]
        result = law_loss(*inputs, make_rows(), terms)
        result.loss.backward()
        found.append([result.loss, result.overlap, result.is_match, *(part.grad for part in inputs)])
    for eager, compiled_value in zip(*found, strict=True):
        torch.testing.assert_close(compiled_value, eager, rtol=1e-6, atol=1e-8)


def test_without_a_sequential_head_only_hidden_gets_gradients() -> None:
    terms = LawTerms(0.1, 0.9, 4, make_head(None))
    rows = make_rows()
    hidden = random(ROWS, SIZE, seed=5).requires_grad_()
    other = hidden.detach().clone().requires_grad_()
    law_loss(hidden, None, None, rows, terms).loss.backward()
    reference(other, torch.zeros(ROWS, VOCAB, dtype=torch.float64), rows, terms)[0].backward()
    torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-6, atol=1e-9)


def test_a_perfect_draft_overlaps_wholly_and_matches_greedy_labels() -> None:
    head = make_head(None)
    goal = random(ROWS, SIZE, seed=8)
    labels = (goal @ head.lm_head.T).argmax(-1)
    found = law_loss(goal.clone(), None, None, LawRows(goal, labels, torch.ones(ROWS).double()), LawTerms(0.0, 1.0, 3, head))
    assert float(found.loss) == pytest.approx(0.0, abs=1e-5)
    assert bool((found.overlap > 1 - 1e-6).all())
    assert bool(found.is_match.all())
