"""P(a drafted token is accepted | everything before it was): models that learn while they serve.

::

    signals        D arrays [N] or [R, n]  what is known of each node before its token: logits and margins
    slots          same shape, int         whose parameters a node uses: its position in the draft
    outcomes  [N]  bool                    whether it was accepted; only nodes whose path up to them was

Learning is damped: an estimate moves by little at a time, and old outcomes fade, so that it follows the traffic.
A slot that is drafted and never verified learns nothing; ``relax`` then leads it back to where it started, so that no estimate
stays low for good because nobody looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

WINDOW = 2000.0  # outcomes of a slot that count, the older ones less
RELAX = 1.0 / 128.0


class AcceptanceModel(Protocol):
    """Conditional acceptance by slot; ``names`` are those of its parameters."""

    names: tuple[str, ...]

    def probability(self, signals: Sequence[Floats], slots: Ints) -> Floats:
        """Estimates in (0, 1], in the shape of signals and slots together: one row of slots [n] may serve R rows of signals."""

    def learn(self, signals: Sequence[Floats], slots: Ints, outcomes: Bools) -> None:
        """Take in outcomes of N nodes."""

    def relax(self, slots: Bools) -> None:
        """Lead the marked slots a step back to their start."""

    def parameters(self) -> Floats:
        """[slots, parameters]."""


class RunningRate:
    """The share that was accepted of late; 1 where nothing was seen. It looks at no signal."""

    names: tuple[str, ...] = ("rate",)

    def __init__(self, num_slots: int) -> None:
        self._counts = np.zeros((2, num_slots))  # accepted, tried; replaced whole, for readers on other threads

    def probability(self, signals: Sequence[Floats], slots: Ints) -> Floats:
        rates: Floats = self.rates()[slots]
        return rates

    def learn(self, signals: Sequence[Floats], slots: Ints, outcomes: Bools) -> None:
        num_slots = self._counts.shape[1]
        tried = np.bincount(slots, minlength=num_slots)
        accepted = np.bincount(slots[outcomes], minlength=num_slots)
        self._counts = self._counts * (1.0 - 1.0 / WINDOW) ** tried + np.stack([accepted, tried])

    def relax(self, slots: Bools) -> None:
        part = np.where(slots, RELAX, 0.0)
        accepted, tried = self._counts
        self._counts = np.stack([accepted + part * (tried - accepted), tried]) * (1.0 - part)

    def rates(self) -> Floats:
        """Acceptance of every slot, with one accepted token as prior."""
        accepted, tried = self._counts + 1.0
        rates: Floats = accepted / tried
        return rates

    def parameters(self) -> Floats:
        return self.rates()[:, None]


class OnlineLogistic:
    """logit = sum of weight * signal + bias, each slot with weights of its own, refitted by one damped Newton step at a time.

    The steps are those of an online Bayesian logistic regression with forgetting: the information of faded outcomes is the
    gain's denominator, ``RIDGE`` bounds it while there is little, and no parameter moves by more than ``MAX_STEP`` at once.
    """

    RIDGE = 4.0
    MAX_STEP = 0.3
    LIMIT = 8.0  # of every parameter, so that nothing overflows

    def __init__(self, names: tuple[str, ...], start: Floats) -> None:
        """``start`` [slots, parameters]: the weights of the signals in order, then the bias."""
        self.names = names
        self._start = np.clip(start, -self.LIMIT, self.LIMIT)
        self._set_theta(self._start)
        self._information = np.zeros((*start.shape, start.shape[1]))

    def probability(self, signals: Sequence[Floats], slots: Ints) -> Floats:
        *weights, bias = self._negative.take(slots, axis=1)
        z: Floats = signals[0] * weights[0]
        for signal, weight in zip(signals[1:], weights[1:], strict=True):
            z += signal * weight
        z += bias
        np.exp(z, out=z)
        z += 1.0
        np.reciprocal(z, out=z)
        return z

    def learn(self, signals: Sequence[Floats], slots: Ints, outcomes: Bools) -> None:
        found = self.probability(signals, slots)
        spread = found * (1.0 - found)
        columns: list[Any] = [*signals, 1.0]
        num_slots, size = self._theta.shape
        gradient = np.empty((num_slots, size))
        information = np.empty((num_slots, size, size))
        for i, one in enumerate(columns):
            gradient[:, i] = np.bincount(slots, (outcomes - found) * one, num_slots)
            for j, other in enumerate(columns[: i + 1]):
                information[:, i, j] = information[:, j, i] = np.bincount(slots, spread * one * other, num_slots)
        keep = (1.0 - 1.0 / WINDOW) ** np.bincount(slots, minlength=num_slots)
        self._information = self._information * keep[:, None, None] + information
        step = np.linalg.solve(self._information + self.RIDGE * np.eye(size), gradient[:, :, None])[:, :, 0]
        step /= np.maximum(1.0, np.abs(step).max(1, keepdims=True) / self.MAX_STEP)
        self._set_theta(np.clip(self._theta + step, -self.LIMIT, self.LIMIT))

    def relax(self, slots: Bools) -> None:
        part = np.where(slots, RELAX, 0.0)[:, None]
        self._set_theta(self._theta + part * (self._start - self._theta))
        self._information = self._information * (1.0 - part[:, :, None])

    def parameters(self) -> Floats:
        return self._theta

    def _set_theta(self, theta: Floats) -> None:
        """Parameters [slots, parameters]; the logistic function asks for their negatives [parameters, slots]."""
        self._theta = theta
        self._negative = np.ascontiguousarray(-theta.T)
