"""Draft workers keep their keys, and none carries much more than the others."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

from dspark.router.drafters import DraftWorkerView, assign

KEYS = [f"verifier-{i}" for i in range(400)]


def workers(*loads: float) -> list[DraftWorkerView]:
    return [DraftWorkerView(f"d{i}", load) for i, load in enumerate(loads)]


def firsts(views: list[DraftWorkerView]) -> dict[str, str]:
    return {key: assign(key, views)[0] for key in KEYS}


def test_everybody_agrees_and_every_usable_worker_is_named_once() -> None:
    views = [*workers(3, 1, 2), DraftWorkerView("leaving", draining=True), DraftWorkerView("silent", age_s=9.0)]
    for order in itertools.permutations(views):
        assert assign("k", order) == assign("k", views)
    assert sorted(assign("k", views)) == ["d0", "d1", "d2"]
    assert assign("k", []) == []


def test_a_worker_that_comes_or_goes_moves_only_its_own_keys() -> None:
    three, four = firsts(workers(0, 0, 0)), firsts(workers(0, 0, 0, 0))
    moved = {key for key in KEYS if three[key] != four[key]}
    assert {four[key] for key in moved} == {"d3"}
    assert 60 < len(moved) < 140
    lost = firsts([view for view in workers(0, 0, 0, 0) if view.id != "d1"])
    assert all(lost[key] == four[key] for key in KEYS if four[key] != "d1")


def test_a_full_worker_is_passed_over_until_others_catch_up() -> None:
    for loads in itertools.product(range(5), repeat=3):
        views = workers(*loads)
        bound = -(-5 * (sum(loads) + 1) // 12)  # 1.25 times the mean, rounded up
        for key in KEYS[:20]:
            first = views[int(assign(key, views)[0][1:])]
            assert first.load + 1 <= bound
    views = workers(0, 0, 0)
    for key in KEYS:
        chosen = assign(key, views)[0]
        views = [dataclasses.replace(view, load=view.load + (view.id == chosen)) for view in views]
    assert max(view.load for view in views) <= 1.25 * len(KEYS) / 3 + 1


def test_keys_are_shared_by_weight() -> None:
    counts = Counter(firsts([DraftWorkerView("slow"), DraftWorkerView("fast", weight=3.0)]).values())
    assert 0.68 < counts["fast"] / len(KEYS) < 0.82
