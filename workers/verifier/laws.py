"""The target's law as the user asked for it: logits in, next-token laws out.

Order: logit_bias, penalties, min_tokens mask (``edit``), then temperature, min_p, top_k, top_p (``target_laws``)::

    rows      [R, V]  fp32, edited in place; row 0 of a block predicts the token after ``output``, row j + 1 that after draft j
    probs     [R, V]  fp32, each row sums to 1; 0 outside a truncated row's support
    support   [S, W]  int64, for the rows whose mass lies on few ids: those ids, so that a draw need not visit all V

All truncations keep a prefix of one order: from the most likely id down, equal probabilities by ascending id. So the
law is a function of the row alone, never of the batch, and ties are not broken by chance.

A row without a feature does no work for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.errors import BadRequest
from dspark.kernels.draft_draw import MIN_TEMPERATURE
from dspark.kernels.keyed_random import TOKEN, race
from dspark.kernels.top import largest
from dspark.sampling import SamplingParams
from dspark.workers.verifier.tree import depths, visible

NARROW = 80  # candidates looked at before a truncated row is sorted whole: top_k 64 with room for ties
ONE_BITS = 0x3F800000  # fp32 1.0 as an integer; the bits of probabilities order as the probabilities do


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids the vocabulary does not have: BadRequest naming ``logit_bias`` or ``stop_token_ids``."""
    for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        if outside := [token for token in tokens if not 0 <= token < vocab_size]:
            raise BadRequest(f"{name} names token {outside[0]}; the vocabulary has ids 0 to {vocab_size - 1}", name)


def has_penalties(sampling: SamplingParams) -> bool:
    """Whether the law depends on the tokens so far."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Block:
    """One request's rows of a step: row 0 predicts the token after ``output``, row j + 1 the one after draft j and its path.

    ``parents`` None: the drafts are a chain, so row j follows ``output + drafted[:j]``.
    """

    sampling: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    drafted: Sequence[int]
    stop_ids: Sequence[int]
    parents: Sequence[int] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.drafted) + 1

    @property
    def unstoppable(self) -> list[int]:
        """The rows that would end the request before ``min_tokens``."""
        missing = self.sampling.min_tokens - len(self.output)
        if missing <= 0 or not self.stop_ids:
            return []
        lengths = range(len(self.drafted)) if self.parents is None else depths(self.parents)
        return [0, *(node + 1 for node, length in enumerate(lengths) if length + 1 < missing)]

    @property
    def needs_edit(self) -> bool:
        return bool(self.sampling.logit_bias) or has_penalties(self.sampling) or bool(self.unstoppable)

    def drafts_before(self) -> Tensor:
        """Which drafts each row follows, [R, drafts] bool."""
        seen = torch.ones(len(self.drafted), len(self.drafted), dtype=torch.bool).tril() if self.parents is None else visible(self.parents)
        return torch.cat([seen.new_zeros(1, len(self.drafted)), seen])


def edit(rows: Tensor, block: Block) -> None:
    """Apply logit_bias, penalties and the min_tokens mask to a block's rows [R, V] fp32, in place."""
    if block.sampling.logit_bias:
        ids = torch.tensor(list(block.sampling.logit_bias), device=rows.device)
        rows[:, ids] += torch.tensor(list(block.sampling.logit_bias.values()), dtype=rows.dtype, device=rows.device)
    if has_penalties(block.sampling):
        _penalise(rows, block)
    if unstoppable := block.unstoppable:
        at = torch.tensor(unstoppable, device=rows.device)
        rows[at[:, None], torch.tensor(block.stop_ids, device=rows.device)] = -torch.inf


def _penalise(rows: Tensor, block: Block) -> None:
    """Repetition penalty over all tokens so far, then frequency and presence over the output, drafts before a row included."""
    s = block.sampling
    prompt = block.prompt if s.repetition_penalty != 1.0 else ()
    history = torch.tensor([*prompt, *block.output, *block.drafted], dtype=torch.int64)
    ids, places = torch.unique(history, return_inverse=True)
    in_prompt, in_output, in_draft = places.split([len(prompt), len(block.output), len(block.drafted)])
    counts = torch.bincount(in_output, minlength=len(ids)).to(torch.float32)
    if block.drafted:
        is_token = torch.zeros(len(block.drafted), len(ids)).scatter_(1, in_draft[:, None], 1.0)
        counts = counts + block.drafts_before().to(torch.float32) @ is_token
    is_output = counts > 0
    at = ids.to(rows.device)
    values = rows[:, at]
    if s.repetition_penalty != 1.0:
        seen = is_output.index_fill(-1, in_prompt, True).to(rows.device)
        repeated = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        values = torch.where(seen, repeated, values)
    if s.frequency_penalty != 0.0 or s.presence_penalty != 0.0:
        values -= counts.mul_(s.frequency_penalty).add_(is_output, alpha=s.presence_penalty).to(rows.device)
    rows[:, at] = values


@dataclass(frozen=True, slots=True)
class TargetLaws:
    """Next-token laws of some rows: ``probs`` [R, V]; ``support[slots[r]]`` holds every id of row r's law where ``slots[r]`` >= 0."""

    probs: Tensor
    support: Tensor
    slots: Sequence[int]

    def draw(self, weights: Tensor, rows: Sequence[int], seeds: Tensor, positions: Tensor) -> Tensor:
        """Draw one token a row with the target's own noise: tokens [n] int64.

        weights [n, V] >= 0 need no normalisation; weights[i] must be 0 outside the support of law ``rows[i]``.
        seeds, positions [n] int64.
        """
        narrow = [i for i, row in enumerate(rows) if self.slots[row] >= 0]
        if not narrow:
            return race(weights, seeds, positions, TOKEN)
        device = weights.device
        slots = torch.tensor([self.slots[rows[i]] for i in narrow], device=device)
        at = torch.tensor(narrow, device=device)
        ids = self.support[slots]
        columns = race(weights[at[:, None], ids], seeds[at], positions[at], TOKEN, ids)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
        tokens[at] = ids.gather(1, columns[:, None]).squeeze(1)
        if len(narrow) < len(rows):
            wide = torch.tensor([i for i, row in enumerate(rows) if self.slots[row] < 0], device=device)
            tokens[wide] = race(weights[wide], seeds[wide], positions[wide], TOKEN)
        return tokens


def is_truncated(sampling: SamplingParams, vocab_size: int) -> bool:
    """Whether top_k, top_p or min_p can remove an id."""
    return sampling.top_p < 1.0 or sampling.min_p > 0.0 or 0 < sampling.top_k < vocab_size


def target_laws(rows: Tensor, samplings: Sequence[SamplingParams]) -> TargetLaws:
    """Temperature, min_p, top_k and top_p over edited logits [R, V] fp32 (overwritten), one ``SamplingParams`` a row, none greedy."""
    temperatures = [max(s.temperature, MIN_TEMPERATURE) for s in samplings]
    if any(temperature != 1.0 for temperature in temperatures):
        rows.div_(torch.tensor(temperatures, device=rows.device)[:, None])
    probs = torch.softmax(rows, dim=-1)
    vocab_size = rows.shape[1]
    cut = [i for i, s in enumerate(samplings) if is_truncated(s, vocab_size)]
    slots = [-1] * len(samplings)
    if not cut:
        return TargetLaws(probs, torch.empty(0, 0, dtype=torch.int64, device=rows.device), slots)
    support, settled = _truncate(probs, cut, [samplings[i] for i in cut])
    for slot, row in enumerate(cut):
        if settled[slot]:
            slots[row] = slot
    return TargetLaws(probs, support, slots)


@dataclass(frozen=True, slots=True)
class _Limits:
    """Truncation settings of some rows as columns: top_k [n] int64 (V: none), top_p, min_p [n] fp64, open [n] bool (top_p alone)."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    is_open: Tensor

    @staticmethod
    def of(samplings: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> _Limits:
        top_k = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in samplings]
        floats = torch.tensor([[s.top_p for s in samplings], [s.min_p for s in samplings]], dtype=torch.float64, device=device)
        limits = torch.tensor(top_k, device=device)
        return _Limits(limits, floats[0], floats[1], (limits == vocab_size) & (floats[1] == 0.0))

    def pick(self, index: Tensor) -> _Limits:
        return _Limits(self.top_k[index], self.top_p[index], self.min_p[index], self.is_open[index])


def _truncate(probs: Tensor, cut: Sequence[int], samplings: Sequence[SamplingParams]) -> tuple[Tensor, list[bool]]:
    """Truncate rows ``cut`` of probs in place; returns (support [len(cut), W], which of them have all their mass there)."""
    vocab_size = probs.shape[1]
    limits = _Limits.of(samplings, vocab_size, probs.device)
    index = torch.tensor(cut, device=probs.device)
    chosen = probs if len(cut) == probs.shape[0] else probs[index]
    values, ids = _candidates(chosen)
    keep, is_settled = _prefix(values, limits, vocab_size)
    settled: list[bool] = is_settled.tolist()
    narrow = [slot for slot, done in enumerate(settled) if done]
    wide = [slot for slot, done in enumerate(settled) if not done]
    if narrow:
        at = torch.tensor(narrow, device=probs.device)
        kept = _keep_prefix(values[at], keep[at])
        probs.index_fill_(0, index[at], 0.0)
        probs[index[at][:, None], ids[at]] = kept
    if wide:
        at = torch.tensor(wide, device=probs.device)
        all_values, order = _sort_rows(probs[index[at]])
        keep, _ = _prefix(all_values, limits.pick(at), vocab_size)
        probs[index[at]] = torch.empty_like(all_values).scatter_(1, order, _keep_prefix(all_values, keep))
    return ids, settled


def _candidates(probs: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probabilities of each row in order, equal ones by ascending id: (values, ids) [n, min(V, NARROW)].

    Which ids stand for the smallest value is arbitrary where more of the row hold it; ``_prefix`` does not settle such rows.
    """
    values, columns = largest(probs, min(NARROW, probs.shape[1]))
    ids, by_id = columns.sort(dim=-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _sort_rows(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Whole rows in order, equal probabilities by ascending id: (values, ids) [n, V]."""
    if probs.is_cuda:
        return probs.sort(dim=-1, descending=True, stable=True)
    # One-dimensional integer keys take torch's radix sort on CPU: five times as fast as sorting floats.
    keys = ONE_BITS - probs.view(torch.int32).to(torch.int64)
    order = torch.stack([row.sort(stable=True).indices for row in keys])
    return probs.gather(1, order), order


def _prefix(values: Tensor, limits: _Limits, vocab_size: int) -> tuple[Tensor, Tensor]:
    """How many leading ids each row keeps, from its largest probabilities in order [n, W]: (keep [n], is_settled [n]).

    A row is not settled when more than the W values must be seen to know which ids are kept.
    """
    width = values.shape[1]
    is_whole = width == vocab_size
    exact = values.to(torch.float64)
    cumulated = exact.cumsum(-1)
    num_likely = (exact >= (limits.min_p * exact[:, 0])[:, None]).sum(-1)
    base = torch.minimum(limits.top_k, num_likely)
    is_known = (limits.top_k <= width) | (num_likely < width) | limits.is_open | is_whole
    mass = torch.where(limits.is_open, 1.0, cumulated.gather(1, base[:, None] - 1).squeeze(1))
    reached = (cumulated < (limits.top_p * mass)[:, None]).sum(-1) + 1
    is_enough = is_whole | (reached <= width)
    keep = torch.where(limits.top_p >= 1.0, base, torch.minimum(base, reached))
    # Ids of probability 0 take no part in the law; they would only look like a tie at the end.
    keep = torch.minimum(keep, (values > 0).sum(-1)).clamp(min=1)
    is_unique = values.gather(1, keep[:, None] - 1).squeeze(1) > values[:, -1]
    return keep, is_known & is_enough & (is_unique | is_whole)


def _keep_prefix(values: Tensor, keep: Tensor) -> Tensor:
    """The first ``keep`` values of each row, renormalised, and zeros: [n, W] fp32."""
    exact = values.to(torch.float64)
    kept = exact.masked_fill_(torch.arange(values.shape[1], device=values.device) >= keep[:, None], 0.0)
    total = kept.cumsum(-1).gather(1, keep[:, None] - 1)
    return (kept / total).to(torch.float32)
