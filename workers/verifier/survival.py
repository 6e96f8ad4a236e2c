"""How likely a drafted node is to be accepted together with everything before it (DSpark section 3.2).

Three estimators, one way to use them: ``survival`` before a step is planned, ``observe`` for every judged draft, ``learn`` once a step.
All learn from rounds as they are served, and only from what these show: a node is a trial if everything before it was accepted
and it was verified itself. A trimmed token is none.

``head``      the confidence of a trained head; learnt: its scale, a bias, and what the margin adds to it
``margin``    how sure the draft law is of itself, for any drafter; learnt: slope and intercept
``constant``  the acceptance of late at each position

None looks at a token of the draft it estimates: signals of node k are functions of the tokens before it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dspark.types import DraftSignals, DraftTree, chain_parents
from dspark.workers.verifier.acceptance_models import AcceptanceModel, OnlineLogistic, RunningRate
from dspark.workers.verifier.counters import MAX_POSITIONS
from dspark.workers.verifier.draft_nodes import (
    Bools,
    Floats,
    Ints,
    Nodes,
    along_branches,
    chain_nodes,
    gather,
    gather_rows,
    outcomes_of,
    shape_of,
)
from dspark.workers.verifier.reliability import Reliability

ROUNDS_A_REFIT = 64
MAX_ROUNDS_A_REFIT = 128  # of a step with more a sample teaches as much
SIGNALS = {"head": ("confidence", "margin"), "margin": ("margin",), "constant": ()}


@dataclass(frozen=True, slots=True)
class PositionReport:
    """One position of the draft: recent acceptance given that everything before was accepted, recent survival as predicted and as
    measured, their calibration error, and the estimator's parameters. ``outcomes`` that count (old ones less); 0: nothing was seen."""

    outcomes: float
    acceptance: float
    predicted: float
    measured: float
    error: float
    parameters: dict[str, float]


@dataclass(frozen=True, slots=True)
class SurvivalReport:
    """What an estimator has seen and learnt. ``mean_error`` is the mean calibration error of the positions that were seen."""

    estimator: str
    rounds: int
    refits: int
    mean_error: float
    positions: tuple[PositionReport, ...]


class _Round(NamedTuple):
    """A judged draft, without its laws (which may be large), and how it fared."""

    parents: tuple[int, ...]
    confidence: tuple[float, ...]
    margin: tuple[float, ...]
    num_verified: int
    accepted: Sequence[int]
    is_cut: bool


class SurvivalEstimator:
    """Survival of drafted nodes, learnt while serving."""

    def __init__(self, name: str, model: AcceptanceModel, num_slots: int) -> None:
        """``name`` is a key of ``SIGNALS``; ``num_slots``: positions of a draft, and one for later siblings."""
        self.name = name
        self._model = model
        self._num_slots = num_slots
        self._acceptance = RunningRate(num_slots)
        self._reliability = Reliability(num_slots - 1)
        self._rounds: list[_Round] = []
        self._num_rounds = 0
        self._num_refits = 0
        self._random = random.Random(0)

    def survival(self, trees: Sequence[DraftTree]) -> Floats:
        """Survival [R, n] of the nodes of R trees of at most n nodes, in (0, 1] and never rising along a row; 0 where there is no node."""
        if not trees:
            return np.zeros((0, 0))
        names, num_slots = SIGNALS[self.name], self._num_slots
        return self._survival(gather_rows(trees, names, num_slots) or gather(trees, names, num_slots), len(trees))

    def survival_of_chains(self, confidence: Floats, margin: Floats) -> Floats:
        """``survival`` of chains [R, n], all as long."""
        return self._survival(chain_nodes(confidence, margin, SIGNALS[self.name], self._num_slots), len(confidence))

    def observe(self, tree: DraftTree, num_verified: int, accepted: Sequence[int], is_cut: bool = False) -> None:
        """Note how a draft fared: its first ``num_verified`` nodes were verified and the nodes ``accepted`` (a range or tuple) stood.

        A draft that was trimmed away whole is worth noting, too. ``is_cut``: the request ended with the last accepted node.
        """
        self._rounds.append(_Round(tree.parents, tree.confidence, tree.margin, num_verified, accepted, is_cut))

    def observe_chains(
        self, confidence: Sequence[Sequence[float]], margin: Sequence[Sequence[float]], accepted: Sequence[int], is_cut: Sequence[bool]
    ) -> None:
        """``observe`` of chains [R, n] that were verified whole, of which so many tokens [R] stood."""
        for sure, clear, count, cut in zip(confidence, margin, accepted, is_cut, strict=True):
            parents = chain_parents(len(sure))
            self._rounds.append(_Round(parents, tuple(sure), tuple(clear), len(parents), range(count), cut))

    @property
    def has_enough(self) -> bool:
        """Whether ``learn`` has anything to do."""
        return len(self._rounds) >= ROUNDS_A_REFIT

    def learn(self) -> None:
        """Take in the rounds noted, once they are enough; call it once a step."""
        if not self.has_enough:
            return
        rounds, self._rounds = self._rounds, []
        rounds = rounds[:]  # the engine may be adding to the old list on its own thread
        self._num_rounds += len(rounds)
        self._num_refits += 1
        self._learn(rounds if len(rounds) <= MAX_ROUNDS_A_REFIT else self._random.sample(rounds, MAX_ROUNDS_A_REFIT))

    def _survival(self, nodes: Nodes, num_trees: int) -> Floats:
        conditional = self._model.probability(nodes.signals, nodes.slots)
        if conditional.ndim == 1:
            conditional = conditional.repeat(num_trees).reshape(-1, num_trees).T
        found = along_branches(conditional, nodes.parents)
        return found if nodes.is_node is None else np.where(nodes.is_node, found, 0.0)

    def _learn(self, rounds: Sequence[_Round]) -> None:
        """Score what would be predicted now of rounds that were not learnt from, then learn from them."""
        shown = [outcomes_of(r.parents, r.num_verified, r.accepted, r.is_cut, self._num_slots) for r in rounds]
        nodes = gather(rounds, SIGNALS[self.name], self._num_slots)
        predicted = self._survival(nodes, len(rounds))
        is_shown = np.arange(predicted.shape[1]) < np.array([one.count for one in shown])[:, None]
        stood = np.concatenate([one.stood for one in shown])
        self._reliability.add(np.concatenate([one.depths for one in shown]), predicted[is_shown], stood)
        slots = np.concatenate([one.slots for one in shown])
        is_tried = np.concatenate([one.is_tried for one in shown])
        signals = [one[is_shown][is_tried] for one in nodes.signals]
        self._model.learn(signals, slots[is_tried], stood[is_tried])
        self._acceptance.learn((), slots[is_tried], stood[is_tried])
        self._model.relax(self._starved(rounds, slots))

    def _starved(self, rounds: Sequence[_Round], slots: Ints) -> Bools:
        """The slots that were drafted and never verified; ``slots`` are those of verified nodes."""
        starved = np.zeros(self._num_slots, np.bool_)
        for parents in {one.parents for one in rounds}:
            starved[shape_of(parents, self._num_slots).slots] = True
        starved[slots] = False
        return starved

    def report(self) -> SurvivalReport:
        """What was seen and learnt so far."""
        scores, places = self._reliability, slice(self._num_slots - 1)
        outcomes, errors = scores.weights(), scores.errors()
        columns = (outcomes, self._acceptance.rates()[places], scores.predicted(), scores.survived(), errors)
        learnt = [dict(zip(self._model.names, row, strict=True)) for row in self._model.parameters()[places].tolist()]
        rows = zip(*(column.tolist() for column in columns), learnt, strict=True)
        positions = tuple(PositionReport(*row) for row in rows)
        seen = errors[outcomes > 0]
        mean = float(seen.mean()) if seen.size else 0.0
        return SurvivalReport(self.name, self._num_rounds, self._num_refits, mean, positions)

    def stats(self) -> dict[str, float]:
        """The report as counters and gauges; position 0 is the first of a draft; those not seen are left out."""
        report = self.report()
        stats = {
            "survival_rounds_total": float(report.rounds),
            "survival_refits_total": float(report.refits),
            "survival_ece_mean": report.mean_error,
        }
        for place, one in enumerate(report.positions[:MAX_POSITIONS]):
            if one.outcomes > 0:
                named = {"acceptance_rate": one.acceptance, "survival_predicted": one.predicted, "survival_measured": one.measured}
                named |= {"survival_ece": one.error} | {f"survival_{name}": value for name, value in one.parameters.items()}
                stats |= {f'{name}_per_pos{{position="{place}"}}': value for name, value in named.items()}
        return stats


def make_estimator(name: str, block_size: int, signals: DraftSignals) -> SurvivalEstimator:
    """The estimator ``name`` for a drafter that drafts ``block_size`` positions and reads as ``signals`` say."""
    num_slots = max(1, block_size) + 1
    if name == "constant":
        return SurvivalEstimator(name, RunningRate(num_slots), num_slots)
    if name == "head":
        start = np.tile([1.0, 0.0, 0.0], (num_slots, 1))
        return SurvivalEstimator(name, OnlineLogistic(("scale", "margin", "bias"), start), num_slots)
    start = np.array([(_at(signals.margin_slope, k), _at(signals.margin_intercept, k)) for k in range(num_slots)])
    start[-1] = 1.0, 0.0  # the margin of a later sibling is a logit already
    return SurvivalEstimator(name, OnlineLogistic(("slope", "intercept"), start), num_slots)


def _at(values: Sequence[float], place: int) -> float:
    return values[min(place, len(values) - 1)]
