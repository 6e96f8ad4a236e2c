"""Sizes that steps are padded to on a CPU: few, never smaller, never much larger; padding changes no result."""

from __future__ import annotations

import torch

from dspark.kernels.buckets import SMALL, bucket, pad_rows, padded_size

CPU = torch.device("cpu")


def test_buckets_are_few_and_tight() -> None:
    sizes = [bucket(n) for n in range(513)]
    assert sizes[: SMALL + 1] == list(range(SMALL + 1))
    assert sizes == sorted(sizes)
    assert all(n <= size <= n + max(7, n // 4) for n, size in enumerate(sizes))
    assert all(bucket(size) == size for size in sizes)
    assert len(set(sizes)) < 50


def test_only_16_bit_types_on_a_cpu_are_padded() -> None:
    assert padded_size(17, CPU, torch.bfloat16) == 24
    assert padded_size(17, CPU, torch.float32) == 17
    assert padded_size(17, torch.device("cuda"), torch.bfloat16) == 17


def test_padding_is_zeros_behind_the_rows() -> None:
    rows = torch.randn(19, 3, dtype=torch.bfloat16)
    padded = pad_rows(rows)
    assert padded.shape == (24, 3)
    assert torch.equal(padded[:19], rows)
    assert not padded[19:].any()
    assert pad_rows(rows[:16]).data_ptr() == rows.data_ptr()
    assert pad_rows(rows.float()).shape == (19, 3)
