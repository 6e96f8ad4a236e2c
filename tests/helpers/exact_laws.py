"""What the tests of losslessness measure with: a naive law, the exact law of a round by enumeration, tests of fit, a tiny world.

``reference_law``    the law of one token as the issue's parameters define it, in plain Python and fp64
``Enumeration``      every draft, acceptance and own token of some rounds, with its probability, through a ``Rule``
``fit``              p-values of sampled tokens against the laws they should follow
``World``            a Markov target and drafter on tables, driven through the judge round by round
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark.kernels.draft_draw import draw, truncate_law
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import DraftLaw, DraftTree
from dspark.workers.verifier.judge import JudgeItem, judge
from dspark.workers.verifier.ratio import accept_probability, block_chances, residual_weights

Tokens = tuple[int, ...]


def reference_law(
    logits: Sequence[float], sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int], stop_ids: Sequence[int] = ()
) -> list[float]:
    """The target's law for the token after ``output``, one id at a time; one-hot when greedy."""
    values = [float(value) for value in logits]
    for token, bias in sampling.logit_bias.items():
        values[token] += bias
    for token in set(prompt) | set(output):
        rate = sampling.repetition_penalty
        values[token] = values[token] / rate if values[token] > 0 else values[token] * rate
    for token in set(output):
        values[token] -= sampling.frequency_penalty * list(output).count(token) + sampling.presence_penalty
    if len(output) < sampling.min_tokens:
        for token in stop_ids:
            values[token] = -math.inf
    best = max(values)
    if sampling.is_greedy:
        return [float(i == values.index(best)) for i in range(len(values))]
    weights = [math.exp((value - best) / sampling.temperature) for value in values]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = [token for token in order if weights[token] >= sampling.min_p]
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    total = math.fsum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token]
        if sampling.top_p < 1.0 and mass >= sampling.top_p * total:
            break
    total = math.fsum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


# --- enumeration -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """An acceptance rule as laws: ``accept(target, draft)`` [V] is P(x stands | x drafted); ``own_after_rejection(target, draft)``
    [V, V], row x, and ``own_after_all(target, draft of the next position or None)`` [V] are the laws of the own token."""

    accept: Callable[[Tensor, Tensor], Tensor]
    own_after_rejection: Callable[[Tensor, Tensor], Tensor]
    own_after_all: Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class BlockRule:
    """Verification of a whole draft. ``chances(ratios, support, probs, counts)``: the joint ratio before each draft and what the
    prefix that it ends is taken with; ``own(target, draft, joint)`` [V]: the law of the token behind a prefix that is not the last.
    """

    chances: Callable[[Tensor, Tensor, Tensor, Sequence[int]], tuple[Tensor, Tensor]]
    own: Callable[[Tensor, Tensor, Tensor], Tensor]


def _sparse(draft: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The draft law as the judge gets it: its support alone, for ``count`` rows."""
    ids = draft.nonzero().squeeze(1)
    return ids.expand(count, -1), draft[ids].expand(count, -1)


def _residual(target: Tensor, draft: Tensor) -> Tensor:
    count = len(target)
    weights = residual_weights(target.expand(count, -1), *_sparse(draft, count))
    return weights / weights.sum(-1, keepdim=True)


def _block_residual(target: Tensor, draft: Tensor, joint: Tensor) -> Tensor:
    return _residual(target * joint, draft)[0]


def _chances_of_a_longer_draft(ratios: Tensor, support: Tensor, probs: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As if each draft were followed by one more like it: h_j where h_n belongs."""
    joint, _ = block_chances(ratios, support, probs, counts)
    after = (joint * ratios).clamp(max=1.0)
    shared = torch.minimum(after[:, None] * support, probs).sum(-1)
    return joint, torch.where(after < 1, (after - shared) / (1 - shared), 1.0)


# The judge's own arithmetic. Its control flow is tested by sampling and by the coupled rule's equality.
BLOCK = BlockRule(block_chances, _block_residual)
BLOCK_WITHOUT_JOINT = BlockRule(block_chances, lambda target, draft, joint: _residual(target, draft)[0])
BLOCK_BEYOND_ITS_END = BlockRule(_chances_of_a_longer_draft, _block_residual)
BLOCK_TOKEN_BY_TOKEN = BlockRule(lambda ratios, *others: (torch.ones_like(ratios), ratios.clamp(max=1.0)), _block_residual)
RATIO = Rule(accept_probability, _residual, lambda target, trimmed: target)
RESIDUAL_AFTER_TRIM = Rule(
    accept_probability, _residual, lambda target, trimmed: target if trimmed is None else _residual(target, trimmed)[0]
)
ACCEPT_ARGMAX = Rule(lambda target, draft: (target == target.max()).to(target.dtype), _residual, lambda target, trimmed: target)
TARGET_AFTER_REJECTION = Rule(accept_probability, lambda target, draft: target.expand(len(target), -1), lambda target, trimmed: target)

Law = Callable[[Tokens], Tensor]  # committed or drafted tokens so far -> [V] fp64
DraftLawOf = Callable[[int, Tokens, Tokens], Tensor]  # round, tokens at its start, drafted since -> [V] fp64
NumVerified = Callable[[int, Tokens, Tokens], int]  # round, tokens at its start, the whole drafted block -> drafts verified


@dataclass
class Enumeration:
    """All outcomes of consecutive rounds of ``block_size`` drafts over a vocabulary, exactly.

    ``num_verified`` sees the whole block, so that a schedule that looks at what it may not can be written too.
    """

    vocab_size: int
    block_size: int
    target: Law
    draft: DraftLawOf
    num_verified: NumVerified
    rule: Rule | BlockRule
    _cache: dict[tuple[int, Tokens, Tokens], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def run(self, num_rounds: int) -> dict[Tokens, float]:
        """P(tokens committed after the rounds); tokens have different lengths."""
        laws: dict[Tokens, float] = {(): 1.0}
        for index in range(num_rounds):
            after: dict[Tokens, float] = {}
            for start, prob in laws.items():
                for tokens, share in self._round(index, start):
                    after[start + tokens] = after.get(start + tokens, 0.0) + prob * share
            laws = after
        return laws

    def _round(self, index: int, start: Tokens) -> list[tuple[Tokens, float]]:
        outcomes: list[tuple[Tokens, float]] = []
        for block in itertools.product(range(self.vocab_size), repeat=self.block_size):
            weight = 1.0
            for j, token in enumerate(block):
                weight *= float(self.draft(index, start, block[:j])[token])
            if weight:
                count = self.num_verified(index, start, block)
                outcomes += [(tokens, weight * share) for tokens, share in self._verify(index, start, block[:count])]
        return outcomes

    def _verify(self, index: int, start: Tokens, block: Tokens) -> list[tuple[Tokens, float]]:
        if isinstance(self.rule, BlockRule):
            return self._verify_whole(self.rule, index, start, block)
        outcomes: list[tuple[Tokens, float]] = []
        alive = 1.0
        for j, token in enumerate(block):
            accept, own = self._node(index, start, block[:j])
            stands = float(accept[token])
            outcomes += [((*block[:j], v), alive * (1 - stands) * float(own[token, v])) for v in range(self.vocab_size)]
            alive *= stands
        trimmed = self.draft(index, start, block) if len(block) < self.block_size else None
        last = self.rule.own_after_all(self.target(start + block), trimmed)
        return outcomes + [((*block, v), alive * float(last[v])) for v in range(self.vocab_size)]

    def _verify_whole(self, rule: BlockRule, index: int, start: Tokens, block: Tokens) -> list[tuple[Tokens, float]]:
        """The longest prefix that is taken stands."""
        count = len(block)
        laws = [(self.target(start + block[:j]), self.draft(index, start, block[:j])) for j in range(count)]
        ratios = torch.tensor([float(target[x] / draft[x]) for (target, draft), x in zip(laws, block, strict=True)], dtype=torch.float64)
        ids = [draft.nonzero().squeeze(1) for _, draft in laws]
        width = max(map(len, ids), default=1)
        support, probs = (torch.zeros(count, width, dtype=torch.float64) for _ in range(2))
        for j, (target, draft) in enumerate(laws):
            support[j, : len(ids[j])], probs[j, : len(ids[j])] = target[ids[j]], draft[ids[j]]
        joint, chances = rule.chances(ratios, support, probs, [count])
        outcomes: list[tuple[Tokens, float]] = []
        alive = 1.0
        for length in range(count, -1, -1):
            taken = float(chances[length - 1]) if length else 1.0
            own = self.target(start + block) if length == count else rule.own(*laws[length], joint[length])
            outcomes += [((*block[:length], v), alive * taken * float(own[v])) for v in range(self.vocab_size)]
            alive *= 1 - taken
        return outcomes

    def _node(self, index: int, start: Tokens, drafted: Tokens) -> tuple[Tensor, Tensor]:
        assert isinstance(self.rule, Rule)
        key = (index, start, drafted)
        if key not in self._cache:
            target, draft = self.target(start + drafted), self.draft(index, start, drafted)
            self._cache[key] = (self.rule.accept(target, draft), self.rule.own_after_rejection(target, draft))
        return self._cache[key]

    def worst_error(self, laws: Mapping[Tokens, float], length: int) -> float:
        """Largest deviation, over all texts of ``length`` tokens, from the product of target laws."""
        return worst_error(laws, self.target, length)


def worst_error(laws: Mapping[Tokens, float], target: Law, length: int) -> float:
    """Largest deviation, over all texts of ``length`` tokens, of laws of committed tokens from the product of target laws.

    Rounds that committed fewer tokens go on by the target's own law; those that committed more are cut.
    """
    found: dict[Tokens, float] = {}
    for tokens, prob in laws.items():
        for text, share in _texts(target, tokens[:length], length):
            found[text] = found.get(text, 0.0) + prob * share
    return max(abs(found.get(text, 0.0) - wanted) for text, wanted in _texts(target, (), length))


def _texts(target: Law, tokens: Tokens, length: int) -> list[tuple[Tokens, float]]:
    texts = [(tokens, 1.0)]
    for _ in range(length - len(tokens)):
        texts = [((*text, v), prob * float(p)) for text, prob in texts for v, p in enumerate(target(text)) if p > 0]
    return texts


# --- tests of fit ------------------------------------------------------------------------------------------------------


def chi_square_p(statistic: float, freedom: int) -> float:
    """P(a chi-square variable of ``freedom`` degrees is over ``statistic``)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def fit(tokens: Sequence[int], laws: Tensor, groups: Sequence[int]) -> tuple[float, float]:
    """Two p-values of tokens [n] against the laws they should follow [n, V], each law given all tokens before.

    The first is a chi-square over (group, id) counts with the exact covariance of the laws; the second is ``even_rank_p`` by
    the laws themselves, which sees what cancels out over ids.
    """
    laws = laws.to(torch.float64)
    chosen = torch.tensor(tokens)
    member = torch.tensor(groups)
    statistic, freedom = 0.0, 0
    for group in sorted(set(groups)):
        part = laws[member == group]
        counts = torch.bincount(chosen[member == group], minlength=laws.shape[1]).to(torch.float64)
        covariance = part.sum(0).diag() - part.T @ part
        seen = part.sum(0) > 5.0  # ids expected too rarely for a normal count
        excess = (counts - part.sum(0))[seen]
        inverse = torch.linalg.pinv(covariance[seen][:, seen], hermitian=True, rtol=1e-9)
        statistic += float(excess @ inverse @ excess)
        freedom += int(torch.linalg.matrix_rank(covariance[seen][:, seen], hermitian=True, rtol=1e-9))
    return chi_square_p(statistic, freedom), even_rank_p(tokens, laws, laws)


def even_rank_p(tokens: Sequence[int], laws: Tensor, scores: Tensor) -> float:
    """p-value of tokens [n] against laws [n, V], from 32 bins of each token's randomised rank by descending scores [n, V].

    Any scores known before the token do; the sharpest are those a suspected error favours.
    """
    laws = laws.to(torch.float64)
    order = scores.sort(descending=True, stable=True, dim=-1).indices
    ranked = laws.gather(1, order)
    place = (order == torch.tensor(tokens)[:, None]).to(torch.int64).argmax(-1)[:, None]
    jitter = torch.rand(len(tokens), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at = ranked.cumsum(-1).gather(1, place).squeeze(1) - jitter * ranked.gather(1, place).squeeze(1)
    bins = torch.bincount((at * 32).long().clamp(0, 31), minlength=32).to(torch.float64)
    return chi_square_p(float((bins - len(tokens) / 32).square().sum() / (len(tokens) / 32)), 31)


# --- a tiny world ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """One generated text: its prompt, its output, and how many drafts were verified and accepted."""

    prompt: Tokens
    output: Tokens
    verified: int
    accepted: int


@dataclass(frozen=True)
class Drafting:
    """How drafts are made: logits ``table`` [V, V, V] (None: a one-hot guess), law width, block size, and a trim.

    ``trim(rng)`` picks how many of a block are verified; ``shipped`` replaces the law that is told to the judge (a lie).
    """

    table: Tensor | None
    width: int = 8
    block_size: int = 3
    trim: Callable[[random.Random], int] = lambda rng: 3
    shipped: Callable[[DraftLaw], DraftLaw] = lambda law: law


class World:
    """A target whose logits depend on the last two tokens, [V, V, V]; the judge does everything else."""

    def __init__(self, table: Tensor, stop_ids: Tokens = ()) -> None:
        self.table = table
        self.vocab_size = table.shape[-1]
        self.stop_ids = stop_ids

    def generate(
        self, sampling: SamplingParams, prompts: Sequence[Tokens], seeds: Sequence[int], num_tokens: int, drafting: Drafting | None
    ) -> list[Text]:
        """Decode all prompts at once, round by round, ``num_tokens`` tokens each (the last round's surplus is cut)."""
        rng = random.Random(0)
        outputs: list[list[int]] = [[] for _ in prompts]
        counts = [[0, 0] for _ in prompts]
        while running := [i for i, output in enumerate(outputs) if len(output) < num_tokens]:
            texts = [(*prompts[i], *outputs[i]) for i in running]
            trees = self._draft(sampling, texts, [seeds[i] for i in running], drafting, rng)
            items: list[JudgeItem] = []
            rows: list[tuple[int, int]] = []
            for i, text, tree in zip(running, texts, trees, strict=True):
                items.append(JudgeItem(str(i), sampling, seeds[i], prompts[i], tuple(outputs[i]), tree, len(rows), self.stop_ids))
                whole = (*text, *(tree.tokens if tree else ()))
                rows += [(whole[p - 1], whole[p]) for p in range(len(text) - 1, len(whole))]
            index = torch.tensor(rows)
            for i, tree, verdict in zip(running, trees, judge(self.table[index[:, 0], index[:, 1]], items), strict=True):
                outputs[i] += verdict.tokens
                counts[i][0] += len(tree.tokens) if tree else 0
                counts[i][1] += verdict.accepted
        return [
            Text(prompt, tuple(output[:num_tokens]), verified, accepted)
            for prompt, output, (verified, accepted) in zip(prompts, outputs, counts, strict=True)
        ]

    def _draft(
        self, sampling: SamplingParams, texts: Sequence[Tokens], seeds: Sequence[int], drafting: Drafting | None, rng: random.Random
    ) -> list[DraftTree | None]:
        if drafting is None:
            return [None] * len(texts)
        if drafting.table is None:
            guesses = [tuple((3 * text[-1] + j) % self.vocab_size for j in range(drafting.trim(rng))) for text in texts]
            return [DraftTree.chain("", len(text), guess, [0.5] * len(guess)) for text, guess in zip(texts, guesses, strict=True)]
        coupled = torch.full((len(texts),), sampling.rule is AcceptanceRule.COUPLED)
        base_lens = torch.tensor([len(text) for text in texts])
        before, last = (torch.tensor([text[k] for text in texts]) for k in (-2, -1))
        tokens, ids, probs = [], [], []
        for j in range(drafting.block_size):
            top_ids, top_probs = truncate_law(drafting.table[before, last], torch.full((len(texts),), sampling.temperature), drafting.width)
            before, last = last, draw(top_ids, top_probs, torch.tensor(seeds), base_lens + j, base_lens, coupled)
            tokens.append(last)
            ids.append(top_ids)
            probs.append(top_probs)
        trees: list[DraftTree | None] = []
        for r, text in enumerate(texts):
            count = drafting.trim(rng)
            law = drafting.shipped(DraftLaw(torch.stack([part[r] for part in ids]), torch.stack([part[r] for part in probs])))
            kept = DraftLaw(law.ids[:count], law.probs[:count])
            trees.append(DraftTree.chain("", len(text), [int(part[r]) for part in tokens[:count]], [0.5] * count, kept))
        return trees

    def fit(self, sampling: SamplingParams, texts: Sequence[Text], drafting: Drafting | None = None) -> list[float]:
        """p-values of all output tokens against ``reference_law`` given what came before each.

        Those of ``fit``, and with a drafting one more that ranks ids by target / draft: where acceptance errs, it errs there.
        """
        tokens, laws, groups, contexts = [], [], [], []
        for text in texts:
            whole = (*text.prompt, *text.output)
            for j, token in enumerate(text.output):
                before, last = whole[len(text.prompt) + j - 2 : len(text.prompt) + j]
                tokens.append(token)
                laws.append(reference_law(self.table[before, last].tolist(), sampling, text.prompt, text.output[:j], self.stop_ids))
                groups.append(last % 4)
                contexts.append((before, last))
        target = torch.tensor(laws, dtype=torch.float64)
        values = list(fit(tokens, target, groups))
        if drafting is not None and drafting.table is not None:
            index = torch.tensor(contexts)
            ids, probs = truncate_law(
                drafting.table[index[:, 0], index[:, 1]], torch.full((len(index),), sampling.temperature), drafting.width
            )
            draft = torch.zeros_like(target).scatter_(1, ids, probs.to(torch.float64))
            values.append(even_rank_p(tokens, target, target / (draft + 1e-6)))
        return values


def markov_table(vocab_size: int, seed: int, scale: float = 1.5) -> Tensor:
    """Random logits for every pair of last tokens, [V, V, V] fp32."""
    return torch.randn(vocab_size, vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
