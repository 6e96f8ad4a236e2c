"""Sampling without sorting against the verifier's laws and the plain reference; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_checks import DEVICE, random
from helpers.triton_interpreter import mend_interpreter
from torch import Tensor

from dspark.kernels import sampling
from dspark.kernels.keyed_random import TOKEN, exponential
from dspark.sampling import SamplingParams
from dspark.workers.verifier.laws import target_laws

pytest.importorskip("triton")
mend_interpreter()

ASKED = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=0.5, top_k=40, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=2.0, top_k=200, top_p=0.95),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=0.01, top_p=0.5),
    SamplingParams(temperature=1e-30),
]


def make_rows(asked: list[SamplingParams]) -> sampling.SamplingRows:
    return sampling.SamplingRows(
        temperature=torch.tensor([s.temperature for s in asked], dtype=torch.float32, device=DEVICE),
        top_k=torch.tensor([max(s.top_k, 0) for s in asked], dtype=torch.int32, device=DEVICE),
        top_p=torch.tensor([s.top_p for s in asked], dtype=torch.float64, device=DEVICE),
        min_p=torch.tensor([s.min_p for s in asked], dtype=torch.float64, device=DEVICE),
        seeds=torch.arange(len(asked), device=DEVICE) * 7919 - 3,
        positions=torch.arange(len(asked), device=DEVICE) + 11,
    )


def check(logits: Tensor, asked: list[SamplingParams]) -> None:
    """Kernel, reference and the verifier's laws agree on laws, supports and tokens."""
    rows = make_rows(asked)
    settled = sampling.settle(logits, rows)
    found = sampling.write_laws(logits, rows, settled)
    verifier = target_laws(logits.float().clone(), asked)
    tokens = verifier.draw(verifier.probs, range(len(asked)), rows.seeds, rows.positions)
    for wanted in (verifier.probs, sampling.laws_reference(logits, rows)):
        assert torch.equal(found > 0, wanted > 0)
        torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-5)
    assert torch.equal(settled.tokens, tokens)
    assert torch.equal(sampling.sample_reference(logits, rows), tokens)


@pytest.mark.parametrize("size", [7, 300, 5000])
@pytest.mark.parametrize("seed", [0, 1])
def test_laws_and_tokens_are_the_verifiers(size: int, seed: int) -> None:
    check(3 * random(len(ASKED), size, seed=seed), ASKED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equal_logits_are_kept_by_ascending_id(dtype: torch.dtype) -> None:
    """Coarse logits: nearly every cut goes through a tie."""
    check((2 * random(len(ASKED), 500, seed=5)).round().to(dtype), ASKED)
    check(torch.zeros(len(ASKED), 300, dtype=dtype, device=DEVICE), ASKED)


def test_masked_ids_are_never_kept() -> None:
    logits = random(len(ASKED), 64, seed=6)
    logits[:, 3:] = -torch.inf
    check(logits, ASKED)


def test_greedy_rows_take_the_first_of_the_largest() -> None:
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, [4500, 17]] = 2.0
    logits[2, 4999] = 1.0
    rows = make_rows([SamplingParams(temperature=0.0)] * 3)
    assert sampling.settle(logits, rows).tokens.tolist() == [0, 17, 4999]
    assert sampling.sample(logits, rows).tolist() == [0, 17, 4999]


def test_rows_that_nobody_asked_for_are_left_alone() -> None:
    """``top_k`` below 0: nothing is said of the row, and the others are as without it."""
    logits = 3 * random(len(ASKED), 300, seed=9)
    rows = make_rows(ASKED)
    alone = sampling.settle(logits, rows)
    logits[2], rows.top_k[2] = torch.nan, -1
    found = sampling.settle(logits, rows)
    others = torch.arange(len(ASKED), device=DEVICE) != 2
    assert torch.equal(found.tokens[others], alone.tokens[others])
    assert torch.equal(found.leasts[others], alone.leasts[others])


def test_rows_of_a_wider_table_and_no_rows() -> None:
    wide = torch.full((len(ASKED), 200), torch.nan, device=DEVICE)
    wide[:, 40:140] = 3 * random(len(ASKED), 100, seed=8)
    check(wide[:, 40:140], ASKED)
    assert sampling.settle(wide[:0], make_rows([])).tokens.shape == (0,)


def test_random_numbers_are_those_of_the_reference() -> None:
    exponentials = pytest.importorskip("helpers.random_kernel").exponentials
    seeds = torch.tensor([0, -5, 2**62, 12345], device=DEVICE)
    positions = torch.tensor([0, 1, 4096, 2**40], device=DEVICE)
    salts = torch.tensor([0, 3, -700, 2**58], device=DEVICE)
    ids = torch.arange(2048, dtype=torch.int32, device=DEVICE)
    found = exponentials(seeds, positions, TOKEN, salts, ids)
    wanted = exponential(seeds[:, None], positions[:, None], TOKEN, ids, salts[:, None])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0.0)
