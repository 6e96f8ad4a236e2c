"""Running calibration error, against a computation over the whole history."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.workers.verifier.reliability import NUM_BINS, WINDOW, Reliability

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def batches(count: int, size: int, seed: int = 0) -> list[Batch]:
    random = np.random.default_rng(seed)
    return [(random.integers(0, 3, size), random.random(size), random.random(size) < 0.3 + 0.4 * random.random()) for _ in range(count)]


def brute_force(history: list[Batch], position: int) -> tuple[float, float, float]:
    """(error, mean prediction, mean outcome) with a weight for each node: one batch more fades it once for each of its nodes."""
    nodes: list[tuple[float, float, float]] = []
    for positions, predicted, survived in history:
        here = positions == position
        fade = (1.0 - 1.0 / WINDOW) ** int(here.sum())
        nodes = [(weight * fade, p, s) for weight, p, s in nodes]
        nodes += [(1.0, float(p), float(s)) for p, s in zip(predicted[here], survived[here], strict=True)]
    total = sum(weight for weight, _, _ in nodes)
    error = 0.0
    for b in range(NUM_BINS):
        inside = [node for node in nodes if b / NUM_BINS <= node[1] < (b + 1) / NUM_BINS or (b == NUM_BINS - 1 and node[1] == 1.0)]
        error += abs(sum(weight * (p - s) for weight, p, s in inside)) / total
    return error, sum(w * p for w, p, _ in nodes) / total, sum(w * s for w, _, s in nodes) / total


def test_errors_equal_brute_force() -> None:
    history = batches(40, 50)
    history.append((np.array([0, 1, 2]), np.array([1.0, 0.0, 1.0]), np.array([True, False, False])))
    meter = Reliability(3)
    for batch in history:
        meter.add(*batch)
    for position in range(3):
        expected = brute_force(history, position)
        found = (meter.errors()[position], meter.predicted()[position], meter.survived()[position])
        assert found == pytest.approx(expected, abs=1e-9)


def test_the_error_follows_the_traffic() -> None:
    """Honest predictions, then ones that are half too high: the error goes from near 0 to near 0.5, and back."""
    random = np.random.default_rng(1)
    meter = Reliability(1)

    def serve(shift: float) -> float:
        for _ in range(150):
            predicted = random.random(100)
            meter.add(np.zeros(100, np.int64), predicted, random.random(100) < predicted - shift)
        return float(meter.errors()[0])

    assert serve(0.0) < 0.05
    assert 0.3 < serve(1.0) < 0.6
    assert serve(0.0) < 0.08


def test_nothing_seen() -> None:
    meter = Reliability(2)
    meter.add(np.array([1, 1]), np.array([0.2, 0.4]), np.array([False, True]))
    assert meter.errors().tolist() == pytest.approx([0.0, (0.2 + 0.6) / 2])
    assert meter.weights().tolist() == [0.0, 2.0]
    assert (meter.predicted()[0], meter.survived()[0]) == (0.0, 0.0)
