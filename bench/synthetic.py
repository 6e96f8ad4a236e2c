"""Synthetic acceptance: drafting and verifying cost what they cost, how much is accepted follows a stated curve.

For figures of a drafter that is not at hand. The text is worthless, so nothing of this can be reached from a server or from
its configuration: a benchmark puts it into an engine of its own process.

A curve names tau_k, the tokens committed a round with k drafts (k = 1, 2, …, the target's own token included)::

    survival_k    = tau_k - tau_(k-1), tau_0 = 1       P(draft k accepted with all before it)
    conditional_k = survival_k / survival_(k-1)        P(draft k accepted | all before it accepted)

A rate is the same conditional acceptance at every position. Beyond a curve nothing is accepted.
"""

from __future__ import annotations

import dataclasses
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dspark.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from dspark.workers.verifier.acceptance_models import Bools, Floats, Ints
    from dspark.workers.verifier.engine import Engine, Judge
    from dspark.workers.verifier.judge import JudgeItem, Verdict

_MASK = 2**64 - 1
_SLACK = 1e-9  # of rounding when lengths are subtracted


@dataclass(frozen=True, slots=True)
class SyntheticAcceptance:
    """A curve, or a rate (a curve of one value that never ends). ``text`` is what the user wrote: it goes into every record."""

    text: str
    conditional: tuple[float, ...]
    is_rate: bool

    @staticmethod
    def parse(text: str) -> SyntheticAcceptance:
        """Read ``0.8`` (a rate) or ``1.84,2.51,…`` (lengths for 1, 2, … drafts); ConfigError if nothing could behave so."""
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            raise ConfigError(f"synthetic acceptance {text!r}: use a rate such as 0.8, or accepted lengths such as 1.84,2.51") from None
        if len(values) == 1 and values[0] <= 1:
            if values[0] < 0:
                raise ConfigError(f"synthetic acceptance {text!r}: a rate is from 0 to 1")
            return SyntheticAcceptance(text, (values[0],), True)
        return SyntheticAcceptance(text, tuple(_conditional(text, values)), False)

    def at(self, position: int) -> float:
        """P(the draft at ``position``, from 0, is accepted | all before it are)."""
        if self.is_rate:
            return self.conditional[0]
        return self.conditional[position] if position < len(self.conditional) else 0.0

    def expected_length(self, num_drafts: int) -> float:
        """Tokens committed a round with ``num_drafts`` drafts."""
        length = survival = 1.0
        for position in range(num_drafts):
            survival *= self.at(position)
            length += survival
        return length


def _conditional(text: str, lengths: Sequence[float]) -> list[float]:
    """Conditional acceptance by position. A curve that falls (longer drafts that were worse) accepts nothing from there on."""
    found: list[float] = []
    best = survival = 1.0
    for count, length in enumerate(lengths, start=1):
        gain = max(0.0, length - best)
        if not 1 <= length < float("inf") or gain > survival + _SLACK:
            raise ConfigError(
                f"synthetic acceptance {text!r}: an accepted length of {length:g} with {count} drafts is not possible;"
                f" it is from 1, and at most {best + survival:g} after those before it"
            )
        found.append(min(1.0, gain / survival) if survival else 0.0)
        survival, best = gain, max(best, length)
    return found


class SyntheticModel:
    """What the planner is told: the curve itself, whatever the drafter thinks of its tokens. It learns nothing."""

    names: tuple[str, ...] = ()

    def __init__(self, acceptance: SyntheticAcceptance, num_slots: int) -> None:
        self._rates = np.array([acceptance.at(position) for position in range(num_slots)])

    def probability(self, signals: Sequence[Floats], slots: Ints) -> Floats:
        """The curve's conditional acceptance."""
        rates: Floats = self._rates[slots]
        return rates

    def learn(self, signals: Sequence[Floats], slots: Ints, outcomes: Bools) -> None:
        """Outcomes change nothing."""

    def relax(self, slots: Bools) -> None:
        """Nothing was learnt."""

    def parameters(self) -> Floats:
        """None."""
        return np.zeros((len(self._rates), 0))


class SyntheticJudge:
    """The real judge does its work, then each verdict is replaced by one that accepts as the curve says.

    Whether a position's draft is accepted is keyed by the prompt and the position: the same for all modes and repeats.
    """

    def __init__(self, judge: Judge, acceptance: SyntheticAcceptance) -> None:
        self._judge = judge
        self._acceptance = acceptance
        self._keys: dict[str, int] = {}  # by request id

    def __call__(self, logits: Tensor, items: Sequence[JudgeItem]) -> list[Verdict]:
        """Verdicts in the order of ``items``."""
        verdicts = self._judge(logits, items)
        return [self._forced(item, verdict) for item, verdict in zip(items, verdicts, strict=True)]

    def _forced(self, item: JudgeItem, verdict: Verdict) -> Verdict:
        drafted = item.drafted
        if not drafted:
            return verdict
        key = self._keys.get(item.request_id)
        if key is None:
            key = self._keys[item.request_id] = zlib.crc32(array("q", item.prompt).tobytes()) << 32
        first = len(item.prompt) + len(item.output)
        chances = (_uniform(key + first + place) < self._acceptance.at(place) for place in range(len(drafted)))
        accepted = next((place for place, is_accepted in enumerate(chances) if not is_accepted), len(drafted))
        if accepted <= verdict.accepted:
            return dataclasses.replace(verdict, tokens=verdict.tokens[: accepted + 1], accepted=accepted)
        return dataclasses.replace(verdict, tokens=(*drafted[:accepted], verdict.tokens[-1]), accepted=accepted)


def _uniform(key: int) -> float:
    """A number in [0, 1) that is a function of the key (the finaliser of splitmix64, Steele, Lea and Flood 2014)."""
    word = (key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return (word ^ (word >> 31)) / 2**64


def force(engine: Engine, acceptance: SyntheticAcceptance) -> None:
    """From now on this engine accepts as the curve says, and its planner believes it. Its text is worthless."""
    from dspark.workers.verifier.survival import SurvivalEstimator

    engine.judge = SyntheticJudge(engine.judge, acceptance)
    num_slots = engine.drafter.block_size + 1
    engine.drafts.survival = SurvivalEstimator("constant", SyntheticModel(acceptance, num_slots), num_slots)
