"""One token a row from the law that the request asked for, or the law itself, without sorting the vocabulary.

::

    logits       [N, V]   fp32, bf16 or fp16, edited already (bias, penalties, masks); columns dense
    temperature  [N] fp32          0: the argmax, the lowest id among equals; no law is made
    top_k        [N] int32         0: off; below 0: no row (padding), nothing is said of it
    top_p  [N] fp64   1: off         min_p  [N] fp64   0: off
    seeds, positions  [N] int64    keys of the noise
    tokens       [N] int64         the argmax of log law + Gumbel noise keyed by (seed, position, TOKEN)
    probs        [N, V] fp32       each row of a temperature over 0 sums to 1

As in the verifier's laws a truncation keeps a prefix of one order: from the most likely id down, equal probabilities by ascending
id; top_p is a share of what top_k and min_p left. Every chunk of a row is looked at once. For the end of a truncated law a kernel then
searches for its logit, two bits a pass over the row: for bf16 mostly 5 passes for each of top_k (or min_p) and top_p, otherwise 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.kernels.draft_draw import MIN_TEMPERATURE
from dspark.kernels.keyed_random import TOKEN, race
from dspark.kernels.top import first_argmax

CHUNK = 4096  # ids of a row that one program looks at
CHUNK_TYPES = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int32)  # what it says of them
BLOCK = 8192
BLOCK_OF_LAW = 2048


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """What each row asks for: tensors [N]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class SettledRows:
    """The kernel's short form of N laws, and the token of each: tensors [N]."""

    tokens: Tensor
    peaks: Tensor
    norms: Tensor
    leasts: Tensor
    lasts: Tensor
    masses: Tensor


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The token of every row."""
    return settle(logits, rows).tokens if logits.is_cuda else sample_reference(logits, rows)


def laws(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The law of every row; rows of temperature 0 hold nothing of use."""
    return write_laws(logits, rows, settle(logits, rows)) if logits.is_cuda else laws_reference(logits, rows)


def sample_reference(logits: Tensor, rows: SamplingRows) -> Tensor:
    """``sample`` in plain torch."""
    drawn = race(laws_reference(logits, rows), rows.seeds, rows.positions, TOKEN)
    return torch.where(rows.temperature == 0, first_argmax(logits), drawn)


def laws_reference(logits: Tensor, rows: SamplingRows) -> Tensor:
    """``laws`` in plain torch: the rows are sorted."""
    size = logits.shape[1]
    scaled = logits.float() / rows.temperature.clamp(min=MIN_TEMPERATURE).unsqueeze(1)
    probs = torch.softmax(torch.where((rows.temperature == 0).unsqueeze(1), logits.float(), scaled), dim=-1)
    values, order = probs.sort(dim=-1, descending=True, stable=True)
    exact = values.double()
    cumulated = exact.cumsum(-1)
    top_k = torch.where((rows.top_k > 0) & (rows.top_k < size), rows.top_k, size).long()
    base = torch.minimum(top_k, (exact >= rows.min_p.unsqueeze(1) * exact[:, :1]).sum(-1)).clamp(min=1)  # a row of padding may be NaN
    mass = torch.where(base == size, 1.0, cumulated.gather(1, base.unsqueeze(1) - 1).squeeze(1))
    reached = (cumulated < (rows.top_p * mass).unsqueeze(1)).sum(-1) + 1
    keep = torch.where(rows.top_p >= 1.0, base, torch.minimum(base, reached)).unsqueeze(1)
    kept = exact.masked_fill(torch.arange(size, device=logits.device) >= keep, 0.0)
    return torch.zeros_like(probs).scatter_(1, order, (kept / kept.sum(-1, keepdim=True)).float())


def settle(logits: Tensor, rows: SamplingRows) -> SettledRows:
    """Draw every row's token and keep its law in short form, by two Triton kernels: one program a chunk, then one a row."""
    from triton import next_power_of_2

    from dspark.kernels import sampling_triton as code

    count, size = logits.shape
    assert logits.stride(1) == 1
    types = (torch.int64, torch.float32, torch.float32, torch.int32, torch.int32, torch.float64)
    settled = SettledRows(*(torch.empty(count, dtype=dtype, device=logits.device) for dtype in types))
    if not count:
        return settled
    chunks = num_chunks(size)
    found = [torch.empty(count, chunks, dtype=dtype, device=logits.device) for dtype in CHUNK_TYPES]
    asked = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.positions)
    code.survey[(count, chunks)](logits, *asked, *found, size, logits.stride(0), CHUNKS=chunks, BLOCK=CHUNK, num_warps=8)
    code.settle[(count,)](
        logits,
        *asked,
        *found,
        settled.tokens,
        settled.peaks,
        settled.norms,
        settled.leasts,
        settled.lasts,
        settled.masses,
        size,
        logits.stride(0),
        CHUNKS=chunks,
        CHUNK_BLOCK=next_power_of_2(chunks),
        BITS=key_bits(logits),
        BLOCK=min(BLOCK, next_power_of_2(size)),
        num_warps=16,
    )
    return settled


def num_chunks(size: int) -> int:
    """How many chunks a row of so many logits has."""
    return -(-size // CHUNK)


def key_bits(logits: Tensor) -> int:
    """How many bits of a logit tell it from others."""
    return 16 if logits.dtype == torch.bfloat16 else 32


def write_laws(logits: Tensor, rows: SamplingRows, settled: SettledRows) -> Tensor:
    """The settled laws in full, by the Triton kernel."""
    from triton import cdiv

    from dspark.kernels import sampling_triton as code

    count, size = logits.shape
    out = torch.empty(count, size, dtype=torch.float32, device=logits.device)
    if count:
        code.write_laws[(count, cdiv(size, BLOCK_OF_LAW))](
            logits,
            rows.temperature,
            settled.peaks,
            settled.norms,
            settled.leasts,
            settled.lasts,
            settled.masses,
            out,
            size,
            logits.stride(0),
            BITS=key_bits(logits),
            BLOCK=BLOCK_OF_LAW,
        )
    return out
