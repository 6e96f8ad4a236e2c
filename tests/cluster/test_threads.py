"""How many compute threads the processes of one machine get."""

from __future__ import annotations

import os
from typing import Any

import pytest

from dspark.cluster.serve import _with_threads
from dspark.config import EngineConfig, ServeConfig


@pytest.mark.parametrize(
    ("cores", "settings", "engine", "expected"),
    [
        (8, {}, {}, None),
        (8, {"num_verifiers": 2}, {}, 4),
        (8, {"num_verifiers": 2, "topology": "disaggregated", "num_draft_workers": 1}, {}, 2),
        (8, {"num_verifiers": 2}, {"tensor_parallel": 2}, 2),
        (2, {"num_verifiers": 3}, {}, 1),
        (8, {"num_verifiers": 2}, {"threads": 3}, 3),
    ],
)
def test_processes_share_the_cores(
    cores: int, settings: dict[str, Any], engine: dict[str, Any], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    config = ServeConfig(engine=EngineConfig(**engine), **settings)
    assert _with_threads(config).engine.threads == expected


def test_the_shell_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _with_threads(ServeConfig(num_verifiers=2)).engine.threads == 5
    assert _with_threads(ServeConfig(engine=EngineConfig(threads=2))).engine.threads == 2
