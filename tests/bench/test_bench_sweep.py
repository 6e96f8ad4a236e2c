"""Levels, what a cut-off sweep holds, and how long the rest takes."""

from __future__ import annotations

import pytest

from dspark.bench.sweep import Held, Level, Remaining, as_time, make_levels
from dspark.errors import ConfigError


def test_levels_from_flags() -> None:
    assert make_levels((1, 4), None, (128,)) == (Level(1, 8, 128), Level(4, 4, 128))
    assert make_levels((1, 4), (3, 6), (64, 32)) == (Level(1, 3, 64), Level(4, 8, 32))
    assert make_levels((16,), (3,), (64,)) == (Level(16, 16, 64),)


@pytest.mark.parametrize(
    ("requests", "max_tokens", "message"), [((1, 2, 3), (64,), "--requests has 3 values for 2"), (None, (1, 2, 3), "--max-tokens has 3")]
)
def test_lists_of_another_length(requests: tuple[int, ...] | None, max_tokens: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_levels((1, 4), requests, max_tokens)


def test_what_is_left() -> None:
    """As long as before at the same level; at another one by the tokens of the nearest."""
    one, four, many = Level(1, 8, 100), Level(4, 4, 100), Level(64, 64, 100)
    remaining = Remaining([one, four, many, one, four, many])
    with pytest.raises(ValueError, match="nothing has been measured"):
        remaining.seconds()
    remaining.took(80.0)
    assert remaining.seconds() == pytest.approx(40 + 640 + 80 + 40 + 640)
    remaining.took(20.0)
    assert remaining.seconds() == pytest.approx(320 + 80 + 20 + 320)
    remaining.skip()
    remaining.took(100.0)
    assert remaining.seconds() == pytest.approx(20 + 320)
    remaining.skip()
    remaining.skip()
    assert remaining.seconds() == 0


def test_times_are_short() -> None:
    assert [as_time(seconds) for seconds in (12.4, 89.0, 90.0, 3000.0, 7200.0)] == ["12 s", "89 s", "2 min", "50 min", "2.0 h"]


def test_records_of_other_kinds_and_engines_are_not_held() -> None:
    assert Held([{"kind": "online", "commit": "a"}, {"engine": "vllm", "mode": "plain"}]).find([]) == []
