"""Keyed random numbers: pure, well mixed in every direction, fine next to zero; and the draws made with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.exact_laws import chi_square_p
from torch import Tensor

from dspark.kernels import keyed_random
from dspark.kernels.draft_draw import MAX_MARGIN, draw, log_odds, truncate_law
from dspark.kernels.keyed_random import ACCEPT, DRAFT, TOKEN, exponential, gumbel, race, uniform

LOWEST, HIGHEST = -(2**63), 2**63 - 1


def keys(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def count(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length, dtype=torch.int64)


def unit(noise: Tensor) -> Tensor:
    """The uniform an exponential was made from."""
    return -torch.expm1(-noise.to(torch.float64))


def even_p(values: Tensor, num_bins: int = 256) -> float:
    """p-value of numbers in (0, 1) being even."""
    bins = torch.bincount((values.flatten() * num_bins).long().clamp(0, num_bins - 1), minlength=num_bins).to(torch.float64)
    expected = values.numel() / num_bins
    return chi_square_p(float((bins - expected).square().sum() / expected), num_bins - 1)


def pairs_p(left: Tensor, right: Tensor, num_bins: int = 32) -> float:
    """p-value of two rows of numbers in (0, 1) being even and independent of each other."""
    cells = (left.flatten() * num_bins).long().clamp(0, num_bins - 1) * num_bins + (right.flatten() * num_bins).long().clamp(
        0, num_bins - 1
    )
    counts = torch.bincount(cells, minlength=num_bins**2).to(torch.float64)
    expected = left.numel() / num_bins**2
    return chi_square_p(float((counts - expected).square().sum() / expected), num_bins**2 - 1)


# Ways to walk through a million keys; each must give even numbers.
WALKS: dict[str, Callable[[], Tensor]] = {
    "ids": lambda: exponential(keys(7), keys(3), TOKEN, count(0, 1 << 20)),
    "positions": lambda: exponential(keys(7), count(0, 1 << 20), TOKEN, keys(11)),
    "seeds": lambda: exponential(count(-(1 << 19), 1 << 20), keys(3), TOKEN, keys(11)),
    "high-seeds": lambda: exponential(count(0, 1 << 20) << 43, keys(3), TOKEN, keys(0)),
    "salts": lambda: exponential(keys(7), keys(3), DRAFT, keys(11), count(0, 1 << 20)),
    "grid": lambda: exponential(count(0, 32)[:, None, None], count(0, 32)[:, None], DRAFT, count(0, 1024), 5),
}


@pytest.mark.parametrize("walk", WALKS)
def test_exponentials_are_even_along(walk: str) -> None:
    values = unit(WALKS[walk]())
    assert even_p(values) > 1e-4
    assert even_p(values * 4096 % 1.0) > 1e-4  # the next bits too
    assert pairs_p(values.flatten()[:-1], values.flatten()[1:]) > 1e-4


def test_uniforms_are_even_and_independent() -> None:
    values = uniform(count(0, 1024)[:, None], count(0, 1024), ACCEPT)
    assert values.dtype == torch.float64
    assert even_p(values) > 1e-4
    assert pairs_p(values[:-1], values[1:]) > 1e-4
    assert pairs_p(values[:, :-1], values[:, 1:]) > 1e-4
    assert 0.0 < float(values.min()) < 1e-5
    assert 1.0 - 1e-5 < float(values.max()) < 1.0


def test_the_evenness_test_can_fail() -> None:
    values = unit(WALKS["ids"]())
    assert even_p(values * 0.999) < 1e-6
    assert pairs_p(values, (values + 0.3) % 1.0) < 1e-6


def block(seed: int = 5, first: int = 0, purpose: int = TOKEN, first_id: int = 0, salt: int = 0) -> Tensor:
    return unit(exponential(keys(seed), count(first, 64)[:, None], purpose, count(first_id, 1 << 14), salt))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 6},
        {"seed": -5},
        {"seed": 5 + 2**32},
        {"first": 1},
        {"first": 64},
        {"purpose": ACCEPT},
        {"purpose": DRAFT},
        {"first_id": 1},
        {"first_id": 1 << 14},
        {"salt": 1},
        {"seed": 6, "first": -1},
        {"seed": 4, "first": 1, "salt": 1},
    ],
    ids=str,
)
def test_neighbouring_keys_are_independent(other: dict[str, int]) -> None:
    left, right = block(), block(**other)
    assert pairs_p(left, right) > 1e-4
    correlation = float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])
    assert abs(correlation) < 5e-3  # five standard deviations of a million


def test_a_row_has_32_bits_next_to_zero() -> None:
    """Counts below 2^-12 .. 2^-20 fit Poisson laws, and values there are finer than 2^-31."""
    values = torch.cat([exponential(keys(seed), count(0, 16)[:, None], TOKEN, count(0, 1 << 18)).flatten() for seed in range(4)])
    for bits in (12, 14, 16, 18, 20):
        expected = len(values) / 2**bits
        assert abs(int((values < 2.0**-bits).sum()) - expected) < 5 * expected**0.5
    small = values[values < 2.0**-12].to(torch.float64)
    steps = unit(small) * 2**32 / (1 - 2.0**-24)  # j + 1/2
    assert float((steps - steps.floor() - 0.5).abs().max()) < 0.2
    assert 0.4 < float((steps.floor() % 2).mean()) < 0.6


def test_extremes_are_finite_and_positive() -> None:
    seeds = keys(LOWEST, -1, 0, 1, HIGHEST)[:, None, None]
    positions = keys(0, 1, 2**31, 2**40)[:, None]
    noise = exponential(seeds, positions, TOKEN, count(0, 1 << 16))
    assert noise.dtype == torch.float32
    assert float(noise.min()) > 0.0
    assert float(noise.max()) < 17.0
    assert gumbel(seeds, positions, TOKEN, count(0, 1 << 12)).isfinite().all()


def test_the_worst_words_stay_inside_the_open_interval() -> None:
    """Every corner of the 32-bit word gives a finite exponential over 0."""
    words = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1], dtype=torch.int32)
    values = -torch.log1p((words.to(torch.float32) + 0.25).abs() * -keyed_random._UNIT)
    assert values.isfinite().all()
    assert (values > 0).all()


def test_numbers_are_pinned() -> None:
    """A text is a function of its seed across versions too: these numbers may not change."""
    words = exponential(keys(42, -42)[:, None], keys(17), TOKEN, keys(0, 1, 49151))
    expected = torch.tensor([[0.65694606, 0.39960831, 2.27526045], [0.13465479, 0.59963083, 0.90998179]])
    assert torch.allclose(words, expected, rtol=1e-5)
    assert uniform(keys(42), keys(17), ACCEPT).item() == pytest.approx(0.4227649130043537, rel=1e-12)


def test_numbers_depend_on_their_key_alone() -> None:
    """Shapes, batch order, strides and the choice of ids change nothing."""
    seeds, positions = keys(3, -8, 2**50, 77), keys(5, 6, 7, 8)
    whole = exponential(seeds[:, None], positions[:, None], TOKEN, count(0, 5000))
    for r in range(4):
        assert torch.equal(exponential(seeds[r], positions[r], TOKEN, count(0, 5000)), whole[r])
    chosen = torch.tensor([[4999, 0, 17], [1, 2, 3], [4998, 4998, 9], [0, 10, 20]])
    assert torch.equal(exponential(seeds[:, None], positions[:, None], TOKEN, chosen), whole.gather(1, chosen))
    assert torch.equal(exponential(seeds[:, None], positions[:, None], TOKEN, chosen.to(torch.int32)), whole.gather(1, chosen))
    assert torch.equal(exponential(seeds.flip(0)[:, None], positions.flip(0)[:, None], TOKEN, count(0, 5000)), whole.flip(0))
    purposes = keys(TOKEN, DRAFT, TOKEN, DRAFT)
    mixed = exponential(seeds[:, None], positions[:, None], purposes[:, None], count(0, 50), keys(0, 9, 0, 9)[:, None])
    assert torch.equal(mixed[0], whole[0, :50])
    assert torch.equal(mixed[1], exponential(seeds[1], positions[1], DRAFT, count(0, 50), 9))


def test_race_is_the_argmax_of_log_weight_plus_gumbel() -> None:
    weights = torch.softmax(torch.randn(12, 3000, generator=torch.Generator().manual_seed(0)) * 2, dim=-1)
    seeds, positions = count(0, 12), count(100, 12)
    noise = gumbel(seeds[:, None], positions[:, None], TOKEN, count(0, 3000))
    assert torch.equal(race(weights, seeds, positions), (weights.log() + noise).argmax(-1))


def test_race_is_the_same_in_chunks_over_ids_and_at_any_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.softmax(torch.randn(9, 2000, generator=torch.Generator().manual_seed(1)) * 3, dim=-1)
    seeds, positions = count(-4, 9), count(0, 9)
    whole = race(weights, seeds, positions, DRAFT, salt=3)
    assert torch.equal(race(weights * 2.0**-9, seeds, positions, DRAFT, salt=3), whole)
    values, ids = weights.topk(2000, dim=-1)
    assert torch.equal(ids.gather(1, race(values, seeds, positions, DRAFT, ids, 3)[:, None]).squeeze(1), whole)
    assert torch.equal(race(weights.flip(1), seeds, positions, DRAFT, count(0, 2000).flip(0), 3), 1999 - whole)
    monkeypatch.setattr(keyed_random, "CHUNK_ELEMENTS", 4096)
    assert torch.equal(race(weights, seeds, positions, DRAFT, salt=3), whole)
    assert torch.equal(ids.gather(1, race(values, seeds, positions, DRAFT, ids, 3)[:, None]).squeeze(1), whole)


def test_race_follows_its_weights() -> None:
    weights = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05, 0.0])
    num_rows = 200_000
    counts = torch.bincount(race(weights.expand(num_rows, -1), count(0, num_rows), keys(3)), minlength=6)
    assert int(counts[5]) == 0
    expected = num_rows * weights[:5]
    assert chi_square_p(float(((counts[:5] - expected).square() / expected).sum()), 4) > 1e-4


def test_race_gives_rare_ids_their_share() -> None:
    """49,999 ids of 1e-6 each beside one of 0.95: they win one draw in twenty, evenly over their range."""
    weights = torch.full((50_000,), 1e-6)
    weights[0] = 0.95
    num_rows = 2000
    winners = race(weights.expand(num_rows, -1), count(0, num_rows), keys(1))
    rare = winners[winners > 0]
    assert abs(len(rare) - num_rows * 0.05) < 5 * (num_rows * 0.05) ** 0.5
    assert even_p(rare.to(torch.float64) / 50_000, 8) > 1e-4


def test_two_laws_under_one_key_agree_as_often_as_they_overlap() -> None:
    left, right = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    seeds = count(0, 100_000)
    agree = float((race(left.expand(100_000, -1), seeds, keys(1)) == race(right.expand(100_000, -1), seeds, keys(1))).float().mean())
    overlap = float(torch.minimum(left, right).sum())
    assert overlap / (2 - overlap) - 0.01 < agree < overlap + 0.01


# --- the drafter's law and draw ---------------------------------------------------------------------------------------


def test_truncated_laws_are_renormalised_softmaxes() -> None:
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(2)) * 3
    temperature = torch.tensor([1.0, 0.5, 2.0, 0.0])
    ids, probs = truncate_law(logits, temperature, 40)
    assert ids.shape == probs.shape == (4, 40)
    for r in range(3):
        wanted = torch.softmax(logits[r].topk(40).values / temperature[r], dim=-1)
        assert torch.allclose(probs[r], wanted, atol=1e-6)
        assert torch.equal(logits[r, ids[r]], logits[r].topk(40).values)
    assert probs[3].tolist() == [1.0] + [0.0] * 39
    assert int(ids[3, 0]) == int(logits[3].argmax())


def test_truncation_takes_the_whole_row_when_it_is_short_and_any_temperature() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 3)
    ids, probs = truncate_law(logits, torch.tensor([1.0, 1e-45, 100.0]), 64)
    assert ids.tolist() == [[1, 2, 0]] * 3
    assert torch.allclose(probs.sum(-1), torch.ones(3))
    assert probs[1].tolist() == [1.0, 0.0, 0.0]


def test_log_odds_of_the_best_token() -> None:
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(2)) * 4
    best = torch.softmax(logits.double(), -1).amax(-1)
    assert torch.allclose(log_odds(logits).double(), torch.log(best / (1 - best)), atol=1e-4)
    assert torch.allclose(log_odds(logits.to(torch.bfloat16)), log_odds(logits.to(torch.bfloat16).float()))
    extreme = log_odds(torch.tensor([[300.0, 0.0, 0.0], [5.0, 5.0, -torch.inf], [1.0, -torch.inf, -torch.inf]]))
    assert extreme.tolist() == pytest.approx([MAX_MARGIN, 0.0, MAX_MARGIN], abs=1e-5)


def test_draw_uses_the_targets_noise_for_coupled_rows_and_salted_noise_for_ratio_rows() -> None:
    logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(3))
    ids, probs = truncate_law(logits, torch.ones(400), 50)
    seeds, positions, base_lens = count(0, 400), count(9, 400), count(5, 400)
    coupled = count(0, 400) % 2 == 0
    tokens = draw(ids, probs, seeds, positions, base_lens, coupled)
    target = race(torch.softmax(logits, -1), seeds, positions, TOKEN)
    own = race(torch.softmax(logits, -1), seeds, positions, DRAFT, salt=base_lens)
    assert torch.equal(tokens, torch.where(coupled, target, own))
    assert not torch.equal(tokens, draw(ids, probs, seeds, positions, base_lens + 1, coupled))
    assert torch.equal(tokens[::2], draw(ids, probs, seeds, positions, base_lens + 1, coupled)[::2])


def test_draw_at_temperature_0_is_the_argmax() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(4))
    ids, probs = truncate_law(logits, torch.zeros(20), 8)
    tokens = draw(ids, probs, count(0, 20), count(0, 20), count(0, 20), count(0, 20) % 2 == 0)
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.gpu
def test_cpu_and_gpu_draw_the_same_numbers() -> None:
    seeds, positions = keys(LOWEST, -1, 0, 42, HIGHEST)[:, None], keys(0, 1, 2**40, 7, 9)[:, None]
    here = exponential(seeds, positions, TOKEN, count(0, 1 << 16), 3)
    there = exponential(seeds.cuda(), positions.cuda(), TOKEN, count(0, 1 << 16).cuda(), 3).cpu()
    assert torch.allclose(here, there, rtol=3e-7, atol=0.0)
    assert torch.equal(uniform(seeds, positions, ACCEPT), uniform(seeds.cuda(), positions.cuda(), ACCEPT).cpu())
    words = keyed_random._mix_ids(count(0, 1 << 16))
    assert torch.equal(words, keyed_random._mix_ids(count(0, 1 << 16).cuda()).cpu())
    weights = torch.softmax(torch.randn(64, 49152, generator=torch.Generator().manual_seed(5)), dim=-1)
    rows = count(0, 64)
    assert torch.equal(race(weights, rows, rows), race(weights.cuda(), rows.cuda(), rows.cuda()).cpu())
