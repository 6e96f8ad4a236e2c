"""The cost table follows the machine, damped and bounded; it is kept for the next start under a fingerprint."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dspark.workers.verifier.cost_cache import fingerprint, load, save
from dspark.workers.verifier.costs import CostTable, Curve, LiveCosts

TABLE = CostTable(
    verify=Curve((1, 8, 64), (0.030, 0.040, 0.120)),
    draft=Curve((1, 16), (0.008, 0.020)),
    verify_context_s=8e-6,
    prefill_s=9e-4,
    draft_deeper=Curve((1, 16), (0.0005, 0.002)),
    draft_context_s=1e-6,
)


def test_steps_that_cost_more_are_learned_and_undisturbed_sizes_follow() -> None:
    live = LiveCosts(TABLE, 128)
    for _ in range(400):
        live.observe_verify(8, 1000, 1.5 * TABLE.step_seconds(8, 1000))
    assert live.table.step_seconds(8, 1000) == pytest.approx(1.5 * TABLE.step_seconds(8, 1000), rel=0.05)
    assert live.table.verify(64) > 1.05 * TABLE.verify(64), "a slower machine is slower everywhere"
    assert live.table.draft == TABLE.draft


def test_a_single_slow_step_changes_little_and_nothing_runs_away() -> None:
    live = LiveCosts(TABLE, 128)
    for _ in range(LiveCosts.REFRESH_EVERY):
        live.observe_verify(8, 0, TABLE.step_seconds(8))
    live.observe_verify(8, 0, 100.0)
    for _ in range(LiveCosts.REFRESH_EVERY):
        live.observe_verify(8, 0, TABLE.step_seconds(8))
    assert live.table.verify(8) < 1.1 * TABLE.verify(8)
    for _ in range(5000):
        live.observe_draft(4, 3, 100, 100.0)
    assert live.table.draft(4) <= 3.001 * TABLE.draft(4)


def test_noise_around_the_truth_stays_around_the_truth() -> None:
    draw, live = random.Random(0), LiveCosts(TABLE, 128)
    for _ in range(3000):
        size = draw.choice([1, 3, 8, 20, 64, 100])
        live.observe_verify(size, 500, TABLE.step_seconds(size, 500) * draw.lognormvariate(0.0, 0.2))
    for size in (1, 8, 64, 128):
        assert live.table.verify(size) == pytest.approx(TABLE.verify(size), rel=0.15)
    assert all(a <= b for a, b in zip(live.table.verify.seconds, live.table.verify.seconds[1:], strict=False))


def test_extra_seconds_are_the_table() -> None:
    live = LiveCosts(TABLE, 32)
    seconds = live.extra_seconds(4, 100, 10)
    assert seconds == pytest.approx([TABLE.step_seconds(4 + k, 100) for k in range(11)])
    assert len(live.extra_seconds(30, 0, 10)) == 3, "no step is larger than the table"
    assert np.all(np.diff(seconds) >= 0)


def test_tables_are_kept_and_damaged_ones_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "costs"
    assert load(folder, "a") is None
    save(folder, "a", TABLE)
    assert load(folder, "a") == TABLE
    file = folder / "a.json"
    values = json.loads(file.read_text())
    for damage in (
        "",
        "[]",
        "{}",
        json.dumps(values | {"verify": {"sizes": [2, 1], "seconds": [1, 1]}}),
        json.dumps(values | {"prefill_s": "x"}),
    ):
        file.write_text(damage)
        assert load(folder, "a") is None


def test_a_fingerprint_changes_with_every_fact() -> None:
    names = {fingerprint({"model": model, "threads": threads}) for model in ("a", "b") for threads in (1, 2)}
    assert len(names) == 4
    assert fingerprint({"threads": 1, "model": "a"}) in names, "the order of facts does not matter"


def test_rounds_that_are_launched_ahead_are_priced_as_they_were_measured() -> None:
    table = CostTable(Curve((1, 64), (1.0, 4.0)), Curve((1,), (2.0,)))
    costs = LiveCosts(table, 64)
    assert costs.flown_factor(8) is None
    predicted = table.step_seconds(40) + table.draft_seconds(8, 4)
    costs.observe_flown(8, 4, 0, predicted / 2)
    assert costs.flown_factor(8) == pytest.approx(0.5), "the first one is believed"
    costs.observe_flown(8, 4, 0, predicted * 100)
    assert costs.flown_factor(8) == pytest.approx(0.5 * 6.0**0.1), "a disturbance counts as three times the table, and little"
    assert costs.flown_factor(9) == costs.flown_factor(15) == costs.flown_factor(1000) == costs.flown_factor(8), (
        "the nearest level stands in"
    )
    costs.observe_flown(64, 0, 0, 4.0)
    assert costs.flown_factor(1000) == pytest.approx(1.0)
