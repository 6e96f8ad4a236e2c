"""Judge a step: which drafted tokens stand, and the one token the target adds. Exactly the target's law.

::

    logits      [N, V]     fp32 or bf16; an item owns rows first_row .. first_row + len(draft)
    row j       of a chain predicts position len(prompt) + len(output) + j, after drafts 0 .. j - 1
    draft law   ids, probs [n, k], the law each draft was drawn from (one-hot when the tree carries none)

Two rules (DSpark section 3.1, and docs/adr), one and the same at temperature 0:

* greedy and **coupled**: each row has its token, the argmax of the processed logits, plus keyed Gumbel noise when
  sampling; drafts stand while they equal it, and the first that does not is replaced by it.
* **ratio**: the longest prefix of drafts stands that their joint ratios target / draft allow, and is followed by a draw from the
  residual of the laws behind it; if all stand, trimmed or not, the next token comes from the full target law (``ratio.py``).

Drafts that may branch are judged in ``tree_judge.py``: the same rules, but ratio node by node. Whether such a draft does branch
may depend on its tokens, and a rule may not.

Random numbers are keyed by (request seed, position, purpose) and rows are processed one by one in effect, so that a
verdict depends on nothing but its own rows. A pass takes many rows at once and reads back twice. On an accelerator one
pass takes them all; on CPU a pass takes about what fits a cache, and rows behind a rejected draft are never looked at, except
under the ratio rule: a draft that would fall alone may stand with the ones behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dspark.kernels.keyed_random import ACCEPT, uniform
from dspark.kernels.top import first_argmax
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import DraftLaw, TokenLogprob
from dspark.workers.verifier.laws import Block, TargetLaws, edit, has_penalties, target_laws
from dspark.workers.verifier.logprobs import prompt_logprobs, score
from dspark.workers.verifier.ratio import DraftRows, block_chances, residual_weights, token_ratios
from dspark.workers.verifier.tree_judge import judge_trees
from dspark.workers.verifier.verdict import JudgeItem, Verdict

__all__ = ["JudgeItem", "Verdict", "follow", "judge", "prompt_logprobs"]

PASS_ELEMENTS = 1 << 20  # logits looked at in one pass on CPU


@dataclass(slots=True)
class _Round:
    """What is decided of an item so far: its first ``accepted`` drafts stand; ``own`` is the token after them, once known."""

    item: JudgeItem
    accepted: int = 0
    own: int | None = None

    @property
    def num_left(self) -> int:
        """Rows not decided yet."""
        return len(self.item.drafted) + 1 - self.accepted

    def verdict(self) -> Verdict:
        """The verdict of a round that is decided."""
        assert self.own is not None
        return Verdict((*self.item.drafted[: self.accepted], self.own), self.accepted)

    def next_span(self, num_rows: int) -> _Span:
        return _Span(self, self.item, self.accepted, min(num_rows, self.num_left))


@dataclass(frozen=True, slots=True)
class _Span:
    """Rows ``start .. start + num_rows - 1`` of an item, judged together. Every row but the item's last decides on a draft."""

    round: _Round
    item: JudgeItem
    start: int
    num_rows: int

    @property
    def rows(self) -> range:
        first = self.item.first_row + self.start
        return range(first, first + self.num_rows)

    @property
    def positions(self) -> range:
        first = self.item.base_len + self.start
        return range(first, first + self.num_rows)

    @property
    def drafted(self) -> tuple[int, ...]:
        """The drafts the rows decide on: one a row, none at the item's last row."""
        return self.item.drafted[self.start : self.start + self.num_rows]

    @property
    def law(self) -> DraftLaw | None:
        """The law of ``drafted``; None: one-hot."""
        tree = self.item.draft
        if tree is None or tree.law is None:
            return None
        part = slice(self.start, self.start + len(self.drafted))
        return DraftLaw(tree.law.ids[part], tree.law.probs[part])

    @property
    def block(self) -> Block:
        item, stop = self.item, self.start + self.num_rows - 1
        output = [*item.output, *item.drafted[: self.start]] if self.start else item.output
        return Block(item.sampling, item.prompt, output, item.drafted[self.start : stop], item.stop_ids)

    def decide(self, num_standing: int, own: int | None) -> None:
        """The first ``num_standing`` drafts of the span stand and ``own`` follows; None: all stand and more rows follow."""
        self.round.accepted += num_standing
        self.round.own = own

    def match(self, tokens: Sequence[int]) -> None:
        """Greedy and coupled: drafts stand while they equal the row's own token; the first other one is replaced by it."""
        pairs = enumerate(zip(self.drafted, tokens, strict=False))
        count = next((j for j, (draft, token) in pairs if draft != token), len(self.drafted))
        self.decide(count, tokens[count] if count < self.num_rows else None)


def judge(logits: Tensor, items: Sequence[JudgeItem]) -> list[Verdict]:
    """Judge every item over its rows of logits [N, V]; verdicts in the order of ``items``. The logits are not changed."""
    is_tree = [item.draft is not None and (item.may_branch or not item.draft.is_chain) for item in items]
    walks = iter(judge_trees(logits, [item for item, branches in zip(items, is_tree, strict=True) if branches], _max_rows(logits)))
    rounds = iter(_judge_chains(logits, [item for item, branches in zip(items, is_tree, strict=True) if not branches]))
    verdicts = [next(walks).verdict() if branches else next(rounds).verdict() for branches in is_tree]
    scores = _score_items(logits, items, verdicts)
    return [dataclasses.replace(verdict, logprobs=scores[place]) if place in scores else verdict for place, verdict in enumerate(verdicts)]


def follow(tokens: Sequence[int], drafted: Sequence[int]) -> Verdict:
    """The verdict of a greedy chain whose rows' best tokens are known: [len(drafted) + 1]."""
    count = next((j for j, (draft, token) in enumerate(zip(drafted, tokens, strict=False)) if draft != token), len(drafted))
    return Verdict((*drafted[:count], tokens[count]), count)


def _judge_chains(logits: Tensor, items: Sequence[JudgeItem]) -> list[_Round]:
    rounds = [_Round(item) for item in items]
    whole = [turn.next_span(turn.num_left) for turn in rounds]
    is_plain = [span.item.sampling.is_greedy and not span.block.needs_edit for span in whole]
    _judge_plain(logits, [span for span, plain in zip(whole, is_plain, strict=True) if plain])
    pending = [turn for turn, plain in zip(rounds, is_plain, strict=True) if not plain]
    while pending:
        spans = _next_pass(pending, logits)
        _judge_pass(logits, spans)
        pending = pending[len(spans) :] + [span.round for span in spans if span.round.own is None]
    return rounds


def _max_rows(logits: Tensor) -> int:
    """How many rows a pass takes on CPU."""
    return max(1, PASS_ELEMENTS // logits.shape[1])


def _next_pass(pending: Sequence[_Round], logits: Tensor) -> list[_Span]:
    """The next rows to judge together: all that are left on an accelerator, otherwise at most what fits a cache, spread evenly."""
    limit = sum(turn.num_left for turn in pending) if logits.is_cuda else _max_rows(logits)
    share = max(1, limit // len(pending)) if not logits.is_cuda else limit
    spans: list[_Span] = []
    for turn in pending:
        span = turn.next_span(turn.num_left if _takes_all(turn.item.sampling) else share)
        limit -= span.num_rows
        if spans and limit < 0:
            break
        spans.append(span)
    return spans


def _takes_all(sampling: SamplingParams) -> bool:
    """Whether an item's rows belong together: ratio looks at the whole draft; penalties count the history once, not once a pass."""
    return has_penalties(sampling) or (not sampling.is_greedy and sampling.rule is AcceptanceRule.RATIO)


def _gather(logits: Tensor, spans: Sequence[_Span]) -> Tensor:
    """The spans' rows of the logits: a copy, or the logits themselves where the spans have them all, in order."""
    rows = [row for span in spans for row in span.rows]
    if rows == list(range(logits.shape[0])):
        return logits
    return logits.index_select(0, torch.tensor(rows, dtype=torch.int64, device=logits.device))


def _judge_plain(logits: Tensor, spans: Sequence[_Span]) -> None:
    """Greedy items without processors: the argmax of the raw rows."""
    if spans:
        tokens: list[int] = first_argmax(_gather(logits, spans)).tolist()
        _match_all(spans, tokens)


def _match_all(spans: Sequence[_Span], tokens: Sequence[int]) -> None:
    start = 0
    for span in spans:
        span.match(tokens[start : start + span.num_rows])
        start += span.num_rows


def _judge_pass(logits: Tensor, spans: Sequence[_Span]) -> None:
    """Process the rows of the spans, then decide each by its rule."""
    greedy = [span for span in spans if span.item.sampling.is_greedy]
    sampled = [span for span in spans if not span.item.sampling.is_greedy]
    coupled = [span for span in sampled if span.item.sampling.rule is AcceptanceRule.COUPLED]
    ratio = [span for span in sampled if span.item.sampling.rule is AcceptanceRule.RATIO]
    ordered = [*greedy, *coupled, *ratio]
    rows = _gather(logits, ordered)
    rows = rows.to(torch.float32, copy=rows is logits)
    start = 0
    for span in ordered:
        block = span.block
        if block.needs_edit:
            edit(rows[start : start + span.num_rows], block)
        start += span.num_rows
    num_greedy = sum(span.num_rows for span in greedy)
    samplings = [span.item.sampling for span in (*coupled, *ratio) for _ in range(span.num_rows)]
    laws = target_laws(rows[num_greedy:], samplings)
    num_coupled = sum(span.num_rows for span in coupled)
    drafts, joint, flags = _accept_flags(laws, num_coupled, ratio)
    found: list[int] = torch.cat([first_argmax(rows[:num_greedy]), _coupled_tokens(laws, coupled), flags]).tolist()
    _match_all([*greedy, *coupled], found)
    _decide_ratio(laws, num_coupled, ratio, _Judged(drafts, joint, found[num_greedy + num_coupled :]))


def _keys(spans: Sequence[_Span], picks: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(seeds, positions) [n] of the rows ``picks[i]`` of each span."""
    seeds = [span.item.noise_seed for span, pick in zip(spans, picks, strict=True) for _ in pick]
    positions = [span.positions[j] for span, pick in zip(spans, picks, strict=True) for j in pick]
    return torch.tensor(seeds, dtype=torch.int64, device=device), torch.tensor(positions, dtype=torch.int64, device=device)


def _coupled_tokens(laws: TargetLaws, spans: Sequence[_Span]) -> Tensor:
    """The token of every row of the coupled spans (the first laws): the target's law raced under the noise of its position."""
    num_rows = sum(span.num_rows for span in spans)
    if not num_rows:
        return torch.empty(0, dtype=torch.int64, device=laws.probs.device)
    seeds, positions = _keys(spans, [range(span.num_rows) for span in spans], laws.probs.device)
    return laws.draw(laws.probs[:num_rows], range(num_rows), seeds, positions)


def _accept_flags(laws: TargetLaws, first: int, spans: Sequence[_Span]) -> tuple[DraftRows, Tensor, Tensor]:
    """The ratio spans' drafts in a row, the joint ratio before each, and whether the prefix it ends is taken, 0 or 1.

    Their laws begin at ``first``.
    """
    device = laws.probs.device
    tokens = [token for span in spans for token in span.drafted]
    counts = [len(span.drafted) for span in spans]
    drafts = DraftRows.gather(tokens, [(len(span.drafted), span.law) for span in spans], device)
    if not tokens:
        return drafts, torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    rows = [start + j for start, count in zip(_starts(first, spans), counts, strict=True) for j in range(count)]
    at = torch.tensor(rows, dtype=torch.int64, device=device)
    seeds, positions = _keys(spans, [range(count) for count in counts], device)
    rounds = torch.tensor([-span.item.base_len for span in spans for _ in span.drafted], dtype=torch.int64, device=device)
    ratios = token_ratios(laws.probs[at, drafts.tokens].to(torch.float64), drafts.token_probs.to(torch.float64))
    support = laws.probs[at.unsqueeze(1), drafts.ids].to(torch.float64)
    joint, chance = block_chances(ratios, support, drafts.probs.to(torch.float64), counts)
    # A position drafted again in a later round must be judged afresh: hence the salt, negative because siblings count up from 0.
    return drafts, joint, (uniform(seeds, positions, ACCEPT, rounds) < chance).to(torch.int64)


def _starts(first: int, spans: Sequence[_Span]) -> list[int]:
    """Where each span's rows begin, the first at ``first``."""
    return list(accumulate((span.num_rows for span in spans), initial=first))[:-1]


@dataclass(frozen=True, slots=True)
class _Judged:
    """All drafts of the ratio spans in a row, the joint ratio before each, and whether the prefix that it ends is taken."""

    drafts: DraftRows
    joint: Tensor
    flags: Sequence[int]


def _decide_ratio(laws: TargetLaws, first: int, spans: Sequence[_Span], judged: _Judged) -> None:
    """Let the longest prefix stand that each span took, and draw the token behind it."""
    if not spans:
        return
    counts: list[int] = []
    fallen: list[tuple[int, int]] = []  # (span, its first draft that falls)
    draft = 0
    for place, span in enumerate(spans):
        flags = judged.flags[draft : draft + len(span.drafted)]
        counts.append(max((j for j, flag in enumerate(flags, start=1) if flag), default=0))
        if counts[-1] < len(flags):
            fallen.append((place, draft + counts[-1]))
        draft += len(flags)
    rows = [start + count for start, count in zip(_starts(first, spans), counts, strict=True)]
    weights = laws.probs[torch.tensor(rows, device=laws.probs.device)]
    if fallen:
        at, which = torch.tensor(fallen, device=weights.device).unbind(1)
        scaled = weights[at] * judged.joint[which].to(weights.dtype).unsqueeze(1)
        weights[at] = residual_weights(scaled, judged.drafts.ids[which], judged.drafts.probs[which])
    seeds, positions = _keys(spans, [[count] for count in counts], weights.device)
    tokens: list[int] = laws.draw(weights, rows, seeds, positions).tolist()
    for span, count, token in zip(spans, counts, tokens, strict=True):
        span.decide(count, token)


def _score_items(logits: Tensor, items: Sequence[JudgeItem], verdicts: Sequence[Verdict]) -> dict[int, tuple[TokenLogprob, ...]]:
    """Log-probabilities of the tokens of every item that asks for them, by its place."""
    asked = [(place, item.sampling.logprobs) for place, item in enumerate(items) if item.sampling.logprobs is not None]
    if not asked:
        return {}
    rows = [items[place].first_row + node + 1 for place, _ in asked for node in (-1, *verdicts[place].nodes)]
    chosen = [token for place, _ in asked for token in verdicts[place].tokens]
    tops = [top for place, top in asked for _ in verdicts[place].tokens]
    scored = iter(score(logits[torch.tensor(rows, device=logits.device)], chosen, tops))
    return {place: tuple(next(scored) for _ in verdicts[place].tokens) for place, _ in asked}
