"""Judge drafted chains on the device: which drafts stand, and the one token the target adds. Exactly the target's law.

The rules are those of the verifier's judge (there for drafts that branch, edits and log-probabilities); here every size is known
before anything is computed, so that a captured graph fits every outcome and nothing waits for the device::

    logits      [N, V]             edited already; request r owns rows first_rows[r] .. first_rows[r] + counts[r]
    rows        SamplingRows [N]   of each row; positions are base_lens[r] + 0, 1, … and seeds the request's
    rules       [R] int32          0 greedy, 1 coupled, 2 ratio
    first_rows  [R] int32
    counts      [R] int32          drafts that are judged, 0 .. n; -1: no request (padding)
    seeds, base_lens  [R] int64
    drafts      [R, n] int64       what stands behind counts[r] is not looked at
    law_ids     [R, n, k] int64    the law each draft was drawn from; a place of probability 0 is unused
    law_probs   [R, n, k] fp32     a one-hot draft has 1 at its own id; a law that denies its own draft is forgotten and the draft falls
    tokens      [R, n + 1] int64   the drafts that stand, one token of the target's own, then -1
    accepted    [R] int32          how many drafts stand

Ratio verifies drafts as a block (Sun et al. 2024): see the verifier's ``ratio.py`` for the chances and why they are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.kernels.keyed_random import ACCEPT, TOKEN, race, uniform
from dspark.kernels.sampling import CHUNK, SamplingRows, key_bits, laws_reference, num_chunks, sample_reference, settle

GREEDY, COUPLED, RATIO = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Chains:
    """The drafts of R requests; shapes in the module's docstring."""

    rules: Tensor
    first_rows: Tensor
    counts: Tensor
    seeds: Tensor
    base_lens: Tensor
    drafts: Tensor
    law_ids: Tensor
    law_probs: Tensor


def judge_chains(logits: Tensor, rows: SamplingRows, chains: Chains) -> tuple[Tensor, Tensor]:
    """(tokens [R, n + 1], accepted [R])."""
    return launch(logits, rows, chains) if logits.is_cuda else reference(logits, rows, chains)


def reference(logits: Tensor, rows: SamplingRows, chains: Chains) -> tuple[Tensor, Tensor]:
    """``judge_chains`` in plain torch, a request at a time."""
    own, laws = sample_reference(logits, rows), laws_reference(logits, rows)
    num_requests, length = chains.drafts.shape
    tokens = torch.full((num_requests, length + 1), -1, dtype=torch.int64, device=logits.device)
    accepted = torch.zeros(num_requests, dtype=torch.int32, device=logits.device)
    for r, (rule, count, first) in enumerate(zip(chains.rules.tolist(), chains.counts.tolist(), chains.first_rows.tolist(), strict=True)):
        if count < 0:
            continue
        drafts = chains.drafts[r, :count]
        if rule == RATIO:
            stand, token = _judge_ratio(laws[first : first + count + 1], chains, r, count)
        else:
            equal = drafts == own[first : first + count]
            stand, token = int(equal.long().cumprod(0).sum()), None
        accepted[r] = stand
        tokens[r, :stand] = drafts[:stand]
        tokens[r, stand] = own[first + stand] if token is None else token
    return tokens, accepted


def _judge_ratio(laws: Tensor, chains: Chains, r: int, count: int) -> tuple[int, Tensor | None]:
    """(drafts that stand, token of the residual) of one request; None: the target's own token."""
    probs = chains.law_probs[r, :count].double()
    ids, drafts = chains.law_ids[r, :count], chains.drafts[r, :count]
    drawn = (probs * (ids == drafts.unsqueeze(1))).sum(-1)
    probs = probs * (drawn > 0).unsqueeze(1)
    support = laws[:count].gather(1, ids).double()
    ratios = torch.where(drawn > 0, laws[:count].gather(1, drafts.unsqueeze(1)).squeeze(1).double() / drawn, 0.0)
    joint, taken = [torch.ones((), dtype=torch.float64, device=laws.device)], 0
    for j in range(count):
        after = (joint[-1] * ratios[j]).clamp(max=1.0)
        behind = torch.minimum(after * support[j + 1], probs[j + 1]).sum() if j + 1 < count else after.new_zeros(())
        chance = ((after - behind) / (1.0 - behind)).clamp(0.0, 1.0) if bool(after < 1.0) else torch.ones_like(after)
        base_len = chains.base_lens[r : r + 1]
        taken = j + 1 if bool(uniform(chains.seeds[r : r + 1], base_len + j, ACCEPT, -base_len) < chance) else taken
        joint.append(after)
    if taken == count:
        return count, None
    left = laws[taken] * joint[taken].float()
    residual = left.scatter_add(0, ids[taken], -probs[taken].float()).clamp_(min=0.0)
    weights = (residual if bool(residual.max() > 0) else left).unsqueeze(0)
    return taken, race(weights, chains.seeds[r : r + 1], chains.base_lens[r : r + 1] + taken, TOKEN)[0]


def launch(logits: Tensor, rows: SamplingRows, chains: Chains) -> tuple[Tensor, Tensor]:
    """``judge_chains`` by five Triton kernels: the laws and their tokens, the drafts that stand, residuals chunk by chunk and whole."""
    from triton import next_power_of_2

    from dspark.kernels import sampling_triton as code

    num_requests, length = chains.drafts.shape
    width, size, device = chains.law_ids.shape[2], logits.shape[1], logits.device
    settled = settle(logits, rows)
    tokens = torch.empty(num_requests, length + 1, dtype=torch.int64, device=device)
    accepted = torch.empty(num_requests, dtype=torch.int32, device=device)
    joints = torch.empty(num_requests, dtype=torch.float32, device=device)
    marks = torch.zeros(num_requests, -(-size // 32), dtype=torch.int32, device=device)
    if not num_requests:
        return tokens, accepted
    chunks = num_chunks(size)
    raced = [torch.empty(num_requests, chunks, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)]
    law = (settled.peaks, settled.norms, settled.leasts, settled.lasts, settled.masses)
    asked = (chains.rules, chains.first_rows, chains.counts, chains.seeds, chains.base_lens)
    drafted = (chains.drafts, chains.law_ids, chains.law_probs)
    sizes = {"LENGTH": length, "WIDTH": width, "BITS": key_bits(logits)}
    chunked = {"CHUNKS": chunks, "BITS": key_bits(logits)}
    strides = (logits.stride(0), marks.stride(0))
    laws, verdict = (logits, rows.temperature), (tokens, accepted, joints)
    law_block = next_power_of_2(width)
    code.accept[(num_requests,)](*laws, settled.tokens, *law, *asked, *drafted, *verdict, marks, *strides, **sizes, BLOCK=law_block)
    grid, behind = (num_requests, chunks), (accepted, joints, marks, *raced, size)
    code.survey_residual[grid](*laws, *law, *asked, *behind, *strides, **chunked, BLOCK=CHUNK, num_warps=8)
    chunked |= sizes | {"CHUNK_BLOCK": next_power_of_2(chunks), "LAW_BLOCK": law_block}
    code.draw_residual[(num_requests,)](*laws, *law, *asked, *drafted, *verdict, *raced, size, strides[0], **chunked)
    return tokens, accepted
