"""Which estimator knows best what will be accepted? Rounds of real text, every draft verified, replayed through all of them.

A replay goes through the rounds in the order in which they were served: an estimator predicts a round, then learns from it, so
every prediction is of a round that it has not seen. ``trim`` replays what a schedule does to learning: tokens whose predicted
survival is below it count as never verified, while predictions are still scored against what would have come of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.prompt_sets import load_set, take
from dspark.bench.tables import Column, Table
from dspark.errors import ConfigError
from dspark.sampling import SamplingParams
from dspark.types import DraftTree

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FULL = "static:64"  # more than any block: whatever is drafted is verified
NUM_BINS = 15
GROUP = 64  # rounds that compete for a budget
BUDGETS = (1, 2)  # drafted tokens verified a round, on average
MIN_ROUNDS = 4 * GROUP
COLUMNS = [
    Column("estimator", 15, is_text=True),
    Column("trim", 5),
    Column("rounds", 7),
    Column("AUC token", 9),
    Column("AUC survival", 12),
    Column("ECE %", 6),
    *(Column(f"accepted at {budget}", 13) for budget in BUDGETS),
]


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What is served to get the rounds, and how they are replayed. ``requests`` of every set at every temperature."""

    folder: Path
    sets: tuple[str, ...]
    requests: int
    temperatures: tuple[float, ...]
    max_tokens: int
    concurrency: int
    trims: tuple[float, ...]
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Judged:
    """A chain that was verified whole."""

    tree: DraftTree
    accepted: int
    is_cut: bool


@dataclass(frozen=True, slots=True)
class ReplayRecord:
    """How well an estimator predicted. ``auc_token``: of P(accepted | all before accepted) over the tokens that were tried;
    ``auc_survival`` and ``ece``: of the survival of all tokens of whole drafts; ``accepted``: tokens a round if only the likeliest
    are verified, by how many a round."""

    estimator: str
    trim: float
    rounds: int
    auc_token: float
    auc_survival: float
    ece: float
    accepted: dict[int, float]
    drafter: str
    machine: str
    commit: str
    kind: str = "survival"


def run_replay(plan: ReplayPlan, llm: Any, encode: Callable[[str], list[int]], out: TextIO | None) -> None:
    """Serve, replay, print a table, append JSON lines to ``out``. ConfigError if too few drafts were judged."""
    machine, commit = describe_machine(llm.config.dtype), source_commit()
    drafter = Path(llm.config.drafter).name
    print(f"{machine}; {commit}; drafter {drafter}")
    judged = serve(plan, llm, encode)
    if len(judged) < MIN_ROUNDS:
        raise ConfigError(f"only {len(judged)} drafts were judged, and {MIN_ROUNDS} are needed: raise --requests or --max-tokens")
    signals = llm.engine.drafter.signals
    names = [*(["head unlearnt", "head"] if signals.has_head else []), "margin unlearnt", "margin", "constant"]
    table = Table(COLUMNS)
    for name in names:
        for trim in plan.trims if "unlearnt" not in name else (0.0,):
            predicted = replay(judged, name, llm.engine.drafter.block_size, signals, trim, plan.concurrency)
            record = ReplayRecord(name, trim, len(judged), *score(judged, predicted), drafter, machine, commit)
            quality = (f"{value:.3f}" for value in (record.auc_token, record.auc_survival))
            table.row(name, trim, record.rounds, *quality, 100 * record.ece, *(f"{record.accepted[budget]:.3f}" for budget in BUDGETS))
            if out is not None:
                print(json.dumps(dataclasses.asdict(record)), file=out, flush=True)


def serve(plan: ReplayPlan, llm: Any, encode: Callable[[str], list[int]]) -> list[Judged]:
    """Answer all prompts with every draft verified; the drafts in the order in which they were judged."""
    from dspark.workers.verifier.acceptance_models import RunningRate
    from dspark.workers.verifier.survival import SurvivalEstimator

    judged: list[Judged] = []

    class Recorder(SurvivalEstimator):
        def observe(self, tree: DraftTree, num_verified: int, accepted: Sequence[int], is_cut: bool = False) -> None:
            if num_verified == len(tree.tokens):
                judged.append(Judged(dataclasses.replace(tree, law=None), len(accepted), is_cut))

    num_slots = llm.engine.drafter.block_size + 1
    llm.engine.drafts.survival = Recorder("constant", RunningRate(num_slots), num_slots)
    texts = [text for name in plan.sets for text in take(load_set(plan.folder, name), plan.requests)]
    prompts = [encode(text) for text in texts for _ in plan.temperatures]
    sampling = [
        SamplingParams(temperature=heat, max_tokens=plan.max_tokens, ignore_eos=plan.ignore_eos)
        for _ in texts
        for heat in plan.temperatures
    ]
    order = np.random.default_rng(0).permutation(len(prompts)).tolist()
    llm.generate([prompts[i] for i in order], [sampling[i] for i in order], speculation=FULL, max_concurrency=plan.concurrency)
    llm.rest()
    return judged


def replay(judged: Sequence[Judged], name: str, block_size: int, signals: Any, trim: float, step: int) -> list[Floats]:
    """Predicted survival of every draft, ``step`` of them at a time; an estimator "unlearnt" stays as it starts."""
    from dspark.workers.verifier.survival import make_estimator

    estimator = make_estimator(name.split()[0], block_size, signals)
    predicted: list[Floats] = []
    for start in range(0, len(judged), step):
        rounds = judged[start : start + step]
        for one, row in zip(rounds, estimator.survival([one.tree for one in rounds]), strict=True):
            survival = row[: len(one.tree.tokens)]
            verified = int((survival >= trim).sum())
            is_cut = one.is_cut and one.accepted <= verified
            estimator.observe(one.tree, verified, range(min(one.accepted, verified)), is_cut)
            predicted.append(survival)
        if "unlearnt" not in name:
            estimator.learn()
    return predicted


def score(judged: Sequence[Judged], predicted: Sequence[Floats]) -> tuple[float, float, float, dict[int, float]]:
    """(AUC of tokens, AUC of survival, calibration error, accepted tokens a round by budget) over drafts that nothing cut short."""
    longest = max(len(one.tree.tokens) for one in judged)
    whole = [i for i, one in enumerate(judged) if len(one.tree.tokens) == longest and not one.is_cut]
    survival = np.stack([predicted[i] for i in whole])
    accepted = np.array([judged[i].accepted for i in whole])
    stood = np.arange(longest) < accepted[:, None]
    conditional = survival / np.concatenate([np.ones((len(whole), 1)), survival[:, :-1]], axis=1)
    is_tried = np.arange(longest) <= accepted[:, None]
    errors = [calibration_error(survival[:, k], stood[:, k]) for k in range(longest)]
    return (
        ranking_quality(conditional[is_tried], stood[is_tried]),
        ranking_quality(survival.ravel(), stood.ravel()),
        float(np.mean(errors)),
        {budget: accepted_within(survival, stood, budget) for budget in BUDGETS},
    )


def calibration_error(predicted: Floats, came: Bools) -> float:
    """Expected calibration error over bins of equal width."""
    places = np.minimum((predicted * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gaps = np.bincount(places, predicted, NUM_BINS) - np.bincount(places, came.astype(np.float64), NUM_BINS)
    return float(np.abs(gaps).sum() / len(predicted))


def ranking_quality(predicted: Floats, came: Bools) -> float:
    """AUC: how often one that came was predicted above one that did not; ties count half."""
    _, places, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[places]
    positives = int(came.sum())
    negatives = len(came) - positives
    return float((ranks[came].sum() - positives * (positives + 1) / 2.0) / max(positives * negatives, 1))


def accepted_within(survival: Floats, stood: Bools, budget: int) -> float:
    """Accepted tokens a round when groups of rounds verify their likeliest tokens, ``budget`` a round, ties by position."""
    order = np.random.default_rng(0).permutation(len(survival))
    groups = [order[start : start + GROUP] for start in range(0, len(order) - GROUP + 1, GROUP)]
    total = 0
    for group in groups:
        best = np.argsort(-survival[group].T.ravel(), kind="stable")[: budget * GROUP]
        total += int(stood[group].T.ravel()[best].sum())
    return total / (GROUP * len(groups))
