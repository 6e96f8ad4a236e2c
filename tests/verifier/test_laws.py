"""Every sampling parameter against a naive law, alone, mixed in a batch, and inside a drafted block."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.exact_laws import reference_law
from torch import Tensor

from dspark.errors import BadRequest
from dspark.sampling import SamplingParams
from dspark.workers.verifier.laws import NARROW, Block, TargetLaws, check_sampling, edit, target_laws

PROMPT, OUTPUT, DRAFTED, STOP_IDS = (3, 3, 7, 20), (7, 9, 9, 11), (9, 30, 30), (2, 40)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 7.0},
    "coldest": {"temperature": 1e-42},
    "top_k": {"top_k": 5},
    "top_k-1": {"top_k": 1},
    "top_k-all": {"top_k": 10**6},
    "top_k-wide": {"top_k": 200},
    "top_p": {"top_p": 0.7},
    "top_p-tiny": {"top_p": 1e-6},
    "top_p-wide": {"top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "min_p-1": {"min_p": 1.0},
    "min_p-wide": {"min_p": 1e-4},
    "all-cuts": {"temperature": 1.4, "min_p": 0.01, "top_k": 30, "top_p": 0.8},
    "wide-cuts": {"temperature": 1.4, "min_p": 0.0001, "top_k": 300, "top_p": 0.97},
    "bias": {"logit_bias": {1: 4.0, 9: -100.0, 30: 2.5}},
    "repetition": {"repetition_penalty": 1.7},
    "repetition-below-1": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.1},
    "frequency": {"frequency_penalty": 0.9},
    "negative-penalties": {"presence_penalty": -1.0, "frequency_penalty": -0.5},
    "min_tokens": {"min_tokens": 6},
    "everything": {
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.001,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {1: 3.0, 2: 50.0, 9: -1.0},
        "min_tokens": 6,
    },
}


def params(case: str) -> SamplingParams:
    return SamplingParams(max_tokens=None, **CASES[case])


def logits_of(seed: int, num_rows: int, width: int, scale: float = 2.0) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def block_of(sampling: SamplingParams) -> Block:
    return Block(sampling, PROMPT, OUTPUT, DRAFTED, STOP_IDS)


def laws_of(rows: Tensor, sampling: SamplingParams) -> TargetLaws:
    """The laws of one block's rows; the rows are left alone."""
    rows = rows.clone()
    edit(rows, block_of(sampling))
    return target_laws(rows, [sampling] * len(rows))


def naive(rows: Tensor, sampling: SamplingParams) -> Tensor:
    laws = [reference_law(row.tolist(), sampling, PROMPT, OUTPUT + DRAFTED[:j], STOP_IDS) for j, row in enumerate(rows)]
    return torch.tensor(laws, dtype=torch.float64)


@pytest.mark.parametrize("width", [50, 700, 5000])
@pytest.mark.parametrize("case", CASES)
def test_each_parameter_equals_the_naive_law_inside_a_block(case: str, width: int) -> None:
    rows = logits_of(width, len(DRAFTED) + 1, width)
    laws = laws_of(rows, params(case))
    wanted = naive(rows, params(case))
    assert torch.allclose(laws.probs.to(torch.float64), wanted, atol=2e-6)
    assert torch.equal(laws.probs > 0, wanted.to(torch.float32) > 0)
    assert torch.allclose(laws.probs.sum(-1), torch.ones(len(rows)), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_narrow_support_holds_all_mass(case: str) -> None:
    laws = laws_of(logits_of(3, len(DRAFTED) + 1, 5000), params(case))
    for row, slot in enumerate(laws.slots):
        if slot >= 0:
            assert float(laws.probs[row, laws.support[slot]].sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("width", [600, 5000])
def test_a_mixed_batch_equals_each_alone_exactly(width: int) -> None:
    samplings = [params(case) for case in CASES]
    rows = logits_of(11, len(samplings), width)
    alone = [target_laws(rows[i : i + 1].clone(), [sampling]).probs for i, sampling in enumerate(samplings)]
    assert torch.equal(target_laws(rows.clone(), samplings).probs, torch.cat(alone))


def test_ties_keep_the_lowest_ids() -> None:
    """Of equal logits the lowest ids stay, however many the row holds and whichever way it is found."""
    for width in (10, NARROW * 3, 40_000):
        flat = torch.zeros(3, width)
        laws = target_laws(flat, [SamplingParams(top_k=4), SamplingParams(top_p=3.5 / width), SamplingParams(top_k=NARROW * 2)])
        assert laws.probs[0].nonzero().squeeze(1).tolist() == [0, 1, 2, 3]
        assert laws.probs[1].nonzero().squeeze(1).tolist() == [0, 1, 2, 3]
        assert laws.probs[2].nonzero().squeeze(1).tolist() == list(range(min(width, NARROW * 2)))


def test_top_p_keeps_just_enough() -> None:
    """Four equal ids and half the mass: two ids hold it exactly, and no third is kept."""
    laws = target_laws(torch.zeros(3, 4), [SamplingParams(top_p=0.5), SamplingParams(top_p=0.51), SamplingParams(top_k=2, top_p=0.5)])
    assert (laws.probs > 0).sum(-1).tolist() == [2, 3, 1]


@pytest.mark.parametrize("case", ["top_k", "top_p", "min_p", "all-cuts", "wide-cuts", "top_k-wide", "min_p-1"])
def test_coarse_logits_full_of_ties_equal_the_naive_law(case: str) -> None:
    rows = (logits_of(5, 4, 3000) * 2).round() / 2
    assert torch.allclose(laws_of(rows, params(case)).probs.to(torch.float64), naive(rows, params(case)), atol=2e-6)


def test_a_large_vocabulary_cut_wide_equals_a_plain_sort() -> None:
    rows = logits_of(6, 2, 49_152, 1.0)
    laws = target_laws(rows.clone(), [SamplingParams(top_p=0.9), SamplingParams(top_k=20_000)])
    assert list(laws.slots) == [-1, -1]
    probs, order = torch.softmax(rows.to(torch.float64), -1).sort(descending=True)
    count = int((probs[0].cumsum(-1) < 0.9).sum()) + 1
    assert abs(int((laws.probs[0] > 0).sum()) - count) <= 1  # fp32 against fp64 at the edge
    assert torch.allclose(laws.probs[1, order[1, :20_000]].to(torch.float64), probs[1, :20_000] / probs[1, :20_000].sum(), rtol=1e-5)
    assert int((laws.probs[1] > 0).sum()) == 20_000


def test_one_block_row_sees_the_drafts_before_it_and_no_later_one() -> None:
    """Token 30 is drafted twice: penalised once at row 2, twice at row 3, and not before."""
    rows = torch.zeros(4, 50)
    edit(rows, block_of(SamplingParams(frequency_penalty=0.5)))
    assert rows[:, 30].tolist() == [0.0, 0.0, -0.5, -1.0]
    assert rows[:, 9].tolist() == [-1.0, -1.5, -1.5, -1.5]
    assert rows[:, 3].tolist() == [0.0] * 4, "presence and frequency count the output alone"
    rows = torch.full((4, 50), 2.0)
    edit(rows, block_of(SamplingParams(repetition_penalty=2.0)))
    assert rows[:, 30].tolist() == [2.0, 2.0, 1.0, 1.0]
    assert rows[:, 3].tolist() == [1.0] * 4, "repetition counts the prompt too"


def test_min_tokens_counts_the_drafts_before_a_row_as_output() -> None:
    rows = torch.zeros(4, 50)
    edit(rows, block_of(SamplingParams(min_tokens=6, max_tokens=None)))
    assert rows[:, 40].tolist() == [-torch.inf, -torch.inf, 0.0, 0.0]
    assert int(rows.isinf().sum()) == 4


def test_rows_without_processors_need_no_edit() -> None:
    assert not block_of(SamplingParams(temperature=0.5, top_p=0.9, top_k=3)).needs_edit
    assert not block_of(SamplingParams(min_tokens=4, max_tokens=None)).needs_edit, "four tokens exist"
    assert not Block(SamplingParams(min_tokens=9, max_tokens=None), PROMPT, OUTPUT, (), ()).needs_edit, "nothing could stop it"
    assert block_of(SamplingParams(min_tokens=5, max_tokens=None)).needs_edit


def test_long_histories_equal_the_naive_law() -> None:
    rng = random.Random(3)
    sampling = SamplingParams(presence_penalty=0.7, frequency_penalty=0.1, repetition_penalty=1.3)
    prompt, output, drafted = ([rng.randrange(900) for _ in range(n)] for n in (1500, 700, 5))
    rows = logits_of(9, 6, 1000)
    wanted = [reference_law(row.tolist(), sampling, prompt, output + drafted[:j]) for j, row in enumerate(rows)]
    edit(rows, Block(sampling, prompt, output, drafted, ()))
    assert torch.allclose(target_laws(rows, [sampling] * 6).probs.to(torch.float64), torch.tensor(wanted, dtype=torch.float64), atol=2e-6)


def test_ids_outside_the_vocabulary_are_refused_by_name() -> None:
    check_sampling(SamplingParams(logit_bias={99: 1.0}, stop_token_ids=(0, 99)), 100)
    with pytest.raises(BadRequest, match="token 100") as bias:
        check_sampling(SamplingParams(logit_bias={3: 1.0, 100: 1.0}), 100)
    assert bias.value.param == "logit_bias"
    with pytest.raises(BadRequest, match="token 4096") as stop:
        check_sampling(SamplingParams(stop_token_ids=(5, 4096)), 100)
    assert stop.value.param == "stop_token_ids"
