"""How honest predicted survival is: running expected calibration error, by position in the draft.

Every verified node is an outcome: it stood together with everything before it, or it did not. Old outcomes fade.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_BINS = 15  # of equal width
WINDOW = 4000.0  # outcomes of a position that count, the older ones less


class Reliability:
    """Binned predictions and outcomes of ``num_positions`` positions."""

    def __init__(self, num_positions: int) -> None:
        self._shape = (num_positions, NUM_BINS)
        self._weight = np.zeros(self._shape)
        self._predicted = np.zeros(self._shape)
        self._survived = np.zeros(self._shape)

    def add(self, positions: NDArray[np.int64], predicted: Floats, survived: NDArray[np.bool_]) -> None:
        """Take in nodes [N]: where they are in the draft, what was expected of them, and whether they stood."""
        cells = positions * NUM_BINS + np.minimum((predicted * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        keep = ((1.0 - 1.0 / WINDOW) ** np.bincount(positions, minlength=self._shape[0]))[:, None]
        self._weight = self._weight * keep + self._sums(cells, np.ones(len(cells)))
        self._predicted = self._predicted * keep + self._sums(cells, predicted)
        self._survived = self._survived * keep + self._sums(cells, survived.astype(np.float64))

    def errors(self) -> Floats:
        """Expected calibration error of every position, 0 where nothing was seen."""
        gaps: Floats = np.abs(self._predicted - self._survived).sum(1) / self._total()
        return gaps

    def predicted(self) -> Floats:
        """Mean predicted survival of every position, 0 where nothing was seen."""
        means: Floats = self._predicted.sum(1) / self._total()
        return means

    def survived(self) -> Floats:
        """Measured survival of every position, 0 where nothing was seen."""
        means: Floats = self._survived.sum(1) / self._total()
        return means

    def weights(self) -> Floats:
        """Outcomes that count at every position, faded ones as fractions."""
        weights: Floats = self._weight.sum(1)
        return weights

    def _total(self) -> Floats:
        return np.maximum(self.weights(), 1e-9)

    def _sums(self, cells: NDArray[np.int64], values: Floats) -> Floats:
        sums: Floats = np.bincount(cells, values, self._weight.size).astype(np.float64).reshape(self._shape)
        return sums
