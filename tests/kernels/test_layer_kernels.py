"""Norm, rotary, gate and tap kernels against their references; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_checks import DEVICE, DTYPES, assert_close_to_exact, random, strided
from torch import Tensor

from dspark.kernels import rms_norm, rotary, step_end, swiglu, tap_projection

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 64), (5, 576), (3, 1000)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype: torch.dtype, rows: int, size: int, offset: float) -> None:
    x, residual, weight = strided(rows, size, dtype, 1), strided(rows, size, dtype, 2), random(size, dtype=dtype, seed=3)
    before = x.clone(), residual.clone()
    normed, total = rms_norm.launch(x, residual, weight, 1e-5, offset)
    exact = rms_norm.reference(x.double(), residual.double(), weight.double(), 1e-5, offset)
    assert_close_to_exact(normed, exact[0])
    assert torch.equal(total, x + residual)
    assert_close_to_exact(
        rms_norm.launch(x, None, weight, 1e-5, offset)[0], rms_norm.reference(x.double(), None, weight.double(), 1e-5, offset)[0]
    )
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_rms_norm_of_tiny_rows_keeps_eps() -> None:
    x = torch.full((1, 16), 1e-4, device=DEVICE)
    normed, _ = rms_norm.launch(x, None, torch.ones(16, device=DEVICE), 1e-5, 0.0)
    torch.testing.assert_close(normed, x / (1e-8 + 1e-5) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "dim"), [(0, 2, 1, 8), (3, 9, 3, 64), (2, 4, 2, 24), (1, 32, 8, 16)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotary(dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int, has_norm: bool) -> None:
    merged = strided(tokens, (heads + 2 * kv_heads) * dim, dtype, 4).view(tokens, heads + 2 * kv_heads, dim)
    angles = random(tokens, dim, seed=5)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # the two halves differ, so that mixing them up is seen
    norms = rotary.HeadNorms(random(dim, dtype=dtype, seed=6), random(dim, dtype=dtype, seed=7), 1e-6) if has_norm else None
    exact_norms = None if norms is None else rotary.HeadNorms(norms.query.double(), norms.key.double(), norms.eps)
    before = merged.clone()
    turned = rotary.launch(merged, cos, sin, heads, kv_heads, norms)
    assert_close_to_exact(turned, rotary.reference(merged.double(), cos.double(), sin.double(), heads, kv_heads, exact_norms))
    assert torch.equal(merged, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [4, 24])
def test_angles_of_positions(dtype: torch.dtype, half: int) -> None:
    positions = torch.tensor([0, 1, 7, 4095, 100_003], device=DEVICE)
    frequencies = 1.0 / 10_000.0 ** (torch.arange(half, device=DEVICE) / half)
    wanted = rotary.reference_cos_sin(positions, frequencies, 1.25, dtype)
    for ours, theirs in zip(rotary.launch_cos_sin(positions, frequencies, 1.25, dtype), wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=0.0)


def test_best_tokens_are_kept_and_compared_with_the_tokens_behind() -> None:
    torch.manual_seed(0)
    best, ids = torch.randint(0, 3, (300,), device=DEVICE), torch.randint(0, 3, (300,), device=DEVICE)
    wanted = torch.cat((torch.randint(0, 300, (290,), device=DEVICE), torch.full((10,), 299, device=DEVICE)))
    found, expected = (
        (torch.empty(300, dtype=torch.int64, device=DEVICE), torch.empty(300, dtype=torch.bool, device=DEVICE)) for _ in range(2)
    )
    step_end.launch(best, ids, wanted, *found)
    step_end.reference(best, ids, wanted, *expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_judged_chains_are_left_row_by_row() -> None:
    """Rows of no request and those behind a request's own keep what was there."""
    tokens = torch.tensor([[5, 6, -1], [7, -1, -1], [8, -1, -1], [1, 2, 3]], device=DEVICE)
    accepted, counts = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([1, 0, 0, 2], [2, 1, 0, -1]))
    first_rows = torch.tensor([0, 3, 6, 0], dtype=torch.int32, device=DEVICE)
    own, matched = torch.full((9,), 99, device=DEVICE), torch.ones(9, dtype=torch.bool, device=DEVICE)
    others = own.clone(), matched.clone()
    step_end.launch_chains(tokens, accepted, first_rows, counts, own, matched)
    step_end.note_chains(tokens.cpu(), accepted.cpu(), first_rows.cpu(), counts.cpu(), *(cpu := [part.cpu() for part in others]))
    assert own.tolist() == [5, 6, -1, 7, -1, 99, 8, 99, 99]
    assert matched.tolist() == [True, False, False, False, False, True, False, True, True]
    assert own.tolist() == cpu[0].tolist()
    assert matched.tolist() == cpu[1].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 96), (4, 1536), (3, 2050)])
def test_swiglu(dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = strided(rows, 2 * size, dtype, 8)
    assert_close_to_exact(swiglu.launch(gate_up), swiglu.reference(gate_up.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_taps", [1, 3])
@pytest.mark.parametrize("rows", [[], [4, 0, 4, -1, 2], [-1]])
def test_taps_are_gathered(dtype: torch.dtype, num_taps: int, rows: list[int]) -> None:
    taps = [strided(5, 70, dtype, 10 + tap) for tap in range(num_taps)]
    at = torch.tensor(rows, dtype=torch.int64, device=DEVICE)
    for tap in taps:
        tap[1], tap[3] = torch.nan, torch.nan  # rows that nobody asks for
    gathered = tap_projection.launch(taps, at)
    expected = [
        torch.cat([tap[row] for tap in taps]) if row >= 0 else torch.zeros(70 * num_taps, dtype=dtype, device=DEVICE) for row in rows
    ]
    assert gathered.shape == (len(rows), 70 * num_taps)
    for found, wanted in zip(gathered, expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(tap_projection.reference(taps, at), gathered)


def test_features_are_the_normed_projection() -> None:
    taps: list[Tensor] = [random(6, 8, seed=20 + tap) for tap in range(3)]
    weight, norm_weight = random(10, 24, seed=23), random(10, seed=24)
    found = tap_projection.project_taps(taps, torch.tensor([5, 1], device=DEVICE), weight, norm_weight, 1e-6)
    projected = torch.cat(taps, dim=-1)[[5, 1]] @ weight.T
    wanted = projected / (projected.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm_weight
    torch.testing.assert_close(found, wanted, atol=1e-4 if DEVICE.type == "cuda" else 1e-5, rtol=1e-4)
