"""What requests do to their logits before a token is taken from them: bias, penalties, tokens that may not end the text yet.

The order is that of the verifier's laws: bias, then penalties (of repetition over all tokens so far, of frequency and presence over the
output), then the mask. Everything lies on the device, so that a captured graph does it for every step::

    logits       [N, V]         any float; out [N, V] fp32, the edited rows
    requests     [N] int32      whose row it is; -1: nobody's, and it is copied as it is
    depths       [N] int32      drafts of its request that the row follows: drafts [R, n] int64, the first of them
    positions    [N] int64      the position that the row predicts
    places       [R] int32      a row of counts; -1: no penalties
    counts       [P, V] int32   twice how often each id is in the output, and 1 more where it is in the prompt
    repetition, presence, frequency [R] fp32
    biases       starts [R + 1] int32, ids [B] int32, values [B] fp32: those of request r from starts[r] on, each id once
    stops        starts [R + 1] int32, ids [S] int32: masked in rows that predict positions below stops_from [R] int64
    tokens       [R, n + 1] int64, accepted [R] int32, judged [R] int32: of ``judge_chains``; judged -1 is padding
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 4096
LIST_BLOCK = 128


@dataclass(frozen=True, slots=True)
class EditRows:
    """Whose each row is; shapes in the module's docstring."""

    requests: Tensor
    depths: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class Edits:
    """What R requests do; shapes in the module's docstring."""

    places: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    bias_starts: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    stop_starts: Tensor
    stop_ids: Tensor
    stops_from: Tensor


def edit_logits(logits: Tensor, rows: EditRows, edits: Edits, drafts: Tensor, counts: Tensor, out: Tensor) -> None:
    """Fill ``out``; nothing waits for the device."""
    (launch if logits.is_cuda else reference)(logits, rows, edits, drafts, counts, out)


def count_tokens(tokens: Tensor, accepted: Tensor, judged: Tensor, places: Tensor, counts: Tensor) -> None:
    """Add what a step committed to ``counts``: the drafts that stand and the token behind them."""
    (launch_count if tokens.is_cuda else reference_count)(tokens, accepted, judged, places, counts)


def reference(logits: Tensor, rows: EditRows, edits: Edits, drafts: Tensor, counts: Tensor, out: Tensor) -> None:
    """``edit_logits`` in plain torch, a row at a time."""
    out.copy_(logits)
    for row, (request, depth) in enumerate(zip(rows.requests.tolist(), rows.depths.tolist(), strict=True)):
        if request < 0:
            continue
        part = slice(*edits.bias_starts[request : request + 2].tolist())
        out[row, edits.bias_ids[part].long()] += edits.bias_values[part]
        if (place := int(edits.places[request])) >= 0:
            number = (counts[place] >> 1).float()
            number.scatter_add_(0, drafts[request, :depth], torch.ones_like(drafts[request, :depth], dtype=torch.float32))
            values, is_output = out[row], number > 0
            repetition = edits.repetition[request]
            repeated = torch.where(values > 0, values / repetition, values * repetition)
            values = torch.where(is_output | (counts[place] & 1 != 0), repeated, values)
            out[row] = values - (number * edits.frequency[request] + is_output * edits.presence[request])
        if rows.positions[row] < edits.stops_from[request]:
            part = slice(*edits.stop_starts[request : request + 2].tolist())
            out[row, edits.stop_ids[part].long()] = -torch.inf


def reference_count(tokens: Tensor, accepted: Tensor, judged: Tensor, places: Tensor, counts: Tensor) -> None:
    """``count_tokens`` in plain torch."""
    for row, (place, count, drafts) in enumerate(zip(places.tolist(), accepted.tolist(), judged.tolist(), strict=True)):
        if place >= 0 and drafts >= 0:
            committed = tokens[row, : count + 1]
            counts[place].scatter_add_(0, committed, torch.full_like(committed, 2, dtype=torch.int32))


def launch(logits: Tensor, rows: EditRows, edits: Edits, drafts: Tensor, counts: Tensor, out: Tensor) -> None:
    """``edit_logits`` by a copy and two Triton kernels: sparse edits a row, penalties a chunk of a row."""
    from dspark.kernels import edit_triton as code

    num_rows, size = logits.shape
    assert out.shape == logits.shape
    assert counts.shape[1] == size
    assert out.stride(1) == drafts.stride(1) == 1
    assert counts.is_contiguous()
    out.copy_(logits)
    biases, stops = (edits.bias_starts, edits.bias_ids, edits.bias_values), (edits.stop_starts, edits.stop_ids, edits.stops_from)
    code.add_and_mask[(num_rows,)](out, rows.requests, rows.positions, *biases, *stops, out.stride(0), BLOCK=LIST_BLOCK)
    scales = (edits.places, edits.repetition, edits.presence, edits.frequency)
    asked = (rows.requests, rows.depths, drafts)
    strides = (out.stride(0), drafts.stride(0))
    code.penalise[(num_rows, -(-size // BLOCK))](out, *asked, *scales, counts, size, *strides, BLOCK=BLOCK, num_warps=8)


def launch_count(tokens: Tensor, accepted: Tensor, judged: Tensor, places: Tensor, counts: Tensor) -> None:
    """``count_tokens`` by the Triton kernel."""
    from dspark.kernels.edit_triton import count_tokens as kernel

    assert counts.is_contiguous()
    kernel[(tokens.shape[0],)](tokens, accepted, judged, places, counts, counts.shape[1], tokens.stride(0), num_warps=1)
