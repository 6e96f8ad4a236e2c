"""The planner on arrays against its definition, one request and one token after the other."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from helpers.draft_rounds import rounds

from dspark.sampling import SamplingParams
from dspark.types import DraftLaw, DraftSignals, DraftTree, Mode, Request, SignalRows, Speculation
from dspark.workers.verifier.costs import CostTable, Curve, LiveCosts
from dspark.workers.verifier.draft_planner import LAG, DraftPlanner
from dspark.workers.verifier.draft_policy import DraftPolicy
from dspark.workers.verifier.planner import LEVELS, MIN_GAIN, Pace, count_within, pack, rank
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.shares import Shares, num_drafted
from dspark.workers.verifier.survival import SIGNALS, SurvivalEstimator, make_estimator

GAMMA = 5
MOST = 120
PREFILL_S = 2e-4
LAW = DraftLaw(np.ones((GAMMA, 1), np.int64), np.ones((GAMMA, 1)))
TABLE = CostTable(Curve((1, 8, 64), (0.004, 0.005, 0.012)), verify_context_s=1e-7, prefill_s=PREFILL_S)
Token = tuple[float, int, int]  # survival, position, row


@dataclass(frozen=True)
class Traffic:
    """What the rows of a step are like."""

    modes: tuple[Mode, ...] = (Mode.ADAPTIVE,)
    law: DraftLaw | None = None
    temperature: float = 0.0
    has_trees: bool = False
    has_limits: bool = False
    whole_batch: bool = False  # all rows have a draft, as long, of one call of the drafter


TRAFFIC = {
    "greedy": Traffic(whole_batch=True),
    "mixed": Traffic((Mode.ADAPTIVE, Mode.STATIC, Mode.SHADOW, Mode.OFF), has_trees=True),
    "sampled": Traffic((Mode.ADAPTIVE, Mode.SHADOW), LAW, 1.0),
    "all sampled": Traffic((Mode.ADAPTIVE,), LAW, 1.0, whole_batch=True),
    "limited": Traffic((Mode.ADAPTIVE, Mode.STATIC), has_limits=True),
    "sampled, limited": Traffic((Mode.ADAPTIVE,), LAW, 1.0, has_limits=True),
}


def make_rows(random: np.random.Generator, traffic: Traffic, name: str) -> list[tuple[Sequence, int, float]]:
    """Requests with drafts, the tokens each is given and its limit."""
    count = int(random.integers(1, 14))
    size = (count, GAMMA)
    signals = SignalRows(np.round(random.uniform(0, 1, size), 1), np.round(random.normal(1, 2, size), 1))
    depth = int(random.integers(1, GAMMA + 1))
    rows = []
    for i in range(count):
        known = int(random.integers(2, 40))
        pending = 1 if traffic.whole_batch or random.random() < 0.8 else int(random.integers(1, known))
        mode = traffic.modes[random.integers(len(traffic.modes))]
        speculation = Speculation(mode, GAMMA if mode is Mode.STATIC else None)
        sampling = SamplingParams(temperature=traffic.temperature, max_tokens=None)
        sequence = Sequence.of(Request(f"{name}{i}", tuple(range(known)), sampling), speculation, 100)
        sequence.num_computed = known - pending
        sequence.draft_depth = sequence.drafts_wanted = depth if traffic.whole_batch else int(random.integers(1, GAMMA + 1))
        if traffic.whole_batch or (mode is not Mode.OFF and random.random() < 0.9):
            sequence.draft = make_draft(random, traffic, sequence, signals, i)
        limit_s = float(random.choice([math.inf, 0.002, 0.004, 0.02])) if traffic.has_limits else math.inf
        rows.append((sequence, pending if random.random() < 0.9 else max(1, pending - 1), limit_s))
    return rows


def make_draft(random: np.random.Generator, traffic: Traffic, sequence: Sequence, signals: SignalRows, row: int) -> DraftTree:
    base_len = sequence.num_known if traffic.whole_batch or random.random() < 0.9 else sequence.num_known - 1
    given = (signals, row) if traffic.whole_batch or random.random() < 0.5 else (None, 0)
    sure, margin = signals.confidence[row].tolist(), signals.margin[row].tolist()
    draft = DraftTree.chain(sequence.id, base_len, [1] * GAMMA, sure, traffic.law, margin, *given)
    if traffic.has_trees and random.random() < 0.3:
        sequence.drafts_wanted = GAMMA
        return replace(draft, parents=(-1, -1, 0, 1, 2), rows=None)
    return draft.first(sequence.drafts_wanted)


class Definition:
    """What ``DraftPlanner.plan`` decides."""

    def __init__(self, survival: SurvivalEstimator, costs: LiveCosts, looks_back: bool) -> None:
        self.survival, self.costs, self.looks_back = survival, costs, looks_back
        self.history: list[list[Token]] = []

    def plan(self, rows: list[tuple[Sequence, int, float]], left: int, draft_s: float) -> tuple[list[int], list[int]]:
        num_draft = [0] * len(rows)
        trimmed = []
        for i, (sequence, given, _) in enumerate(rows):
            draft = sequence.draft
            if draft is None or draft.base_len != sequence.num_known or given != sequence.num_pending:
                continue
            if sequence.speculation.mode is Mode.STATIC:
                num_draft[i] = min(num_drafted(sequence), left - sum(num_draft))
            else:
                trimmed.append(i)
        fixed = sum(num_draft)
        left -= fixed
        chains = {i: self.survival.survival([rows[i][0].draft])[0].tolist() for i in trimmed}  # type: ignore[list-item]
        tokens = [(value, k, i) for i, chain in chains.items() for k, value in enumerate(chain)]
        tokens.sort(key=lambda token: (int((1.0 - token[0]) * LEVELS), token[1], token[2]))
        for _, _, i in tokens[: self._count(rows, trimmed, chains, tokens, fixed, left, draft_s)]:
            num_draft[i] += 1
        self.history.append(tokens)
        num_commit = list(num_draft)
        for i in trimmed:
            sequence = rows[i][0]
            if sequence.speculation.mode is Mode.SHADOW:
                num_draft[i] = min(num_drafted(sequence), num_commit[i] + left)
                left -= num_draft[i] - num_commit[i]
        return num_draft, num_commit

    def _count(
        self,
        rows: list[tuple[Sequence, int, float]],
        trimmed: list[int],
        chains: dict[int, list[float]],
        tokens: list[Token],
        fixed: int,
        left: int,
        draft_s: float,
    ) -> int:
        num_rows = sum(given == sequence.num_pending for sequence, given, _ in rows)
        decode = sum(given == 1 for _, given, _ in rows)
        context = sum(sequence.num_computed + given for sequence, given, _ in rows)
        is_unbiased = all(rows[i][0].draft.law is None or rows[i][0].request.sampling.is_exact for i in trimmed)  # type: ignore[union-attr]
        survival = pack(list(chains.values()))
        seconds = self.costs.extra_seconds(decode, context, fixed + min(left, survival.size), is_unbiased or self.looks_back)
        seconds = (seconds + PREFILL_S * (sum(given for _, given, _ in rows) - decode))[fixed:]
        if is_unbiased:
            count = best(tokens, num_rows, seconds.tolist())
        elif not self.looks_back:
            count = early(tokens, num_rows, seconds.tolist())
        else:
            count = best(self.history[-LAG], num_rows, seconds.tolist()) if len(self.history) >= LAG else len(seconds) - 1
        limits = {i: limit_s for i, (_, _, limit_s) in enumerate(rows)}
        if not trimmed or min(limits.values()) == math.inf:
            return count
        usual = [sequence.tokens_per_round for sequence, _, _ in rows]
        others = min((limits[i] * usual[i] for i in limits if i not in trimmed), default=math.inf)
        prompt_s = PREFILL_S * (sum(given for _, given, _ in rows) - decode)
        pace = Pace(np.array([limits[i] for i in trimmed]), others, np.array([usual[i] for i in trimmed]), prompt_s)
        seconds = seconds + draft_s
        if is_unbiased:
            return count_within(rank(survival), survival, num_rows, seconds, pace, len(seconds) - 1)
        if len(self.history) < LAG:
            return count
        old = self.history[-LAG]
        expected = 1.0 + sum(value for value, _, _ in old) / max(len({i for _, _, i in old}), 1)
        tightest = min(*(limits[i] for i in trimmed), others)
        keeps = [k for k, value in enumerate(seconds) if value - prompt_s <= tightest * expected]
        return min(count, keeps[-1] if keeps else 0)


def best(tokens: list[Token], num_rows: int, seconds: list[float]) -> int:
    theta = thetas(tokens, num_rows, seconds)
    count = theta.index(max(theta))
    return count if theta[count] >= theta[0] * (1 + MIN_GAIN) else 0


def early(tokens: list[Token], num_rows: int, seconds: list[float]) -> int:
    theta = thetas(tokens, num_rows, seconds)
    for k in range(len(theta) - 1):
        if tokens[k][0] < (1 + MIN_GAIN) * theta[k] * (seconds[k + 1] - seconds[k]):
            return k
    return len(theta) - 1


def thetas(tokens: list[Token], num_rows: int, seconds: list[float]) -> list[float]:
    gained = [0.0, *itertools.accumulate(value for value, _, _ in tokens)]
    return [(num_rows + gain) / s for gain, s in zip(gained, seconds, strict=False)]


def learnt(name: str) -> SurvivalEstimator:
    """An estimator whose parameters are none that are easy."""
    estimator = make_estimator(name, GAMMA, DraftSignals(True, (0.6,), (0.05,)))
    for i, (tree, stood) in enumerate(rounds(lambda k, margin: 0.8 - 0.05 * k, GAMMA, 600, 1), start=1):
        estimator.observe(tree, GAMMA, range(stood))
        if i % 100 == 0:
            estimator.learn()
    return estimator


def filled(rows: list[tuple[Sequence, int, float]]) -> Shares:
    shares = Shares()
    for row in rows:
        shares.add(*row)
    return shares


@pytest.mark.parametrize("kind", TRAFFIC)
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("looks_back", [False, True])
def test_a_plan_is_what_its_definition_says(kind: str, name: str, looks_back: bool) -> None:
    random = np.random.default_rng(len(kind))
    costs, estimator = LiveCosts(TABLE, MOST, lambda size: -(-size // 8) * 8), learnt(name)
    planner = DraftPlanner(DraftPolicy(GAMMA), estimator, costs, looks_back)
    definition = Definition(estimator, costs, looks_back)
    for step in range(40):
        rows = make_rows(random, TRAFFIC[kind], f"{step}-")
        left = int(random.choice([3, 20, 70]))
        shares = filled(rows)
        planner.plan(shares, left, 0.001)
        assert (shares.num_draft, shares.num_commit) == definition.plan(rows, left, 0.001)
        for place in shares.places:
            assert rows[place][0].rest.is_due() == (shares.num_commit[place] > 0)


def test_without_a_cost_table_everything_is_verified_in_order() -> None:
    random = np.random.default_rng(0)
    planner = DraftPlanner(DraftPolicy(GAMMA), learnt("head"))
    for step in range(20):
        rows = make_rows(random, TRAFFIC["mixed"], f"{step}-")
        shares, left = filled(rows), 12
        planner.plan(shares, left, 0.0)
        for place, (sequence, _, _) in enumerate(rows):
            has_draft = place in shares.places or place in shares.whole
            expected = min(num_drafted(sequence), left) if has_draft else 0
            assert shares.num_draft[place] == shares.num_commit[place] == expected
            left -= expected


def test_what_was_dropped_was_never_added() -> None:
    random = np.random.default_rng(3)
    for step in range(20):
        rows = make_rows(random, TRAFFIC["mixed"], f"{step}-")
        shares, out = filled(rows), int(random.integers(len(rows)))
        shares.drop(rows[out][0])
        assert shares == filled(rows[:out] + rows[out + 1 :])
        shares.drop(rows[out][0])
        assert len(shares.sequences) == len(rows) - 1


def test_rows_that_were_drafted_together_say_what_each_says_alone() -> None:
    random = np.random.default_rng(4)
    signals = SignalRows(random.uniform(0, 1, (9, GAMMA)), random.normal(0, 3, (9, GAMMA)))
    numbers = zip(signals.confidence.tolist(), signals.margin.tolist(), strict=True)
    trees = [DraftTree.chain(f"r{i}", 4, [1] * GAMMA, sure, None, margin, signals, i) for i, (sure, margin) in enumerate(numbers)]
    for name, length in itertools.product(SIGNALS, (1, 3, GAMMA)):
        estimator = learnt(name)
        for order in (range(9), range(8, -1, -1), (5, 2), (7,)):
            chosen = [trees[i].first(length) for i in order]
            alone = np.concatenate([estimator.survival([replace(tree, rows=None)]) for tree in chosen])
            assert np.array_equal(estimator.survival(chosen), alone)
