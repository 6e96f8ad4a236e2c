"""Prefixes are fetched where that is predicted to be clearly faster, from whoever holds the most of them."""

from __future__ import annotations

import itertools

import pytest

from dspark.router.prefixes import CHUNK_TOKENS
from dspark.router.transfers import FIRST_BYTES_PER_S, LATENCY_S, MIN_GAIN, longest_holder, pays, speed

HOLDERS = [{"a", "b", "c"}, {"a", "b"}, {"b"}]


def anyone(name: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("tokens", "prefill_token_s", "bytes_per_token", "expected"),
    [
        (4096, 1e-3, 24_000, True),  # SmolLM2-135M on two cores: 4 s of prefill, 1 s of bytes
        (16, 1e-3, 24_000, False),  # the round trip alone takes as long
        (4096, 1e-5, 144_000, False),  # an 8B model on a GPU: 40 ms of prefill, 6 s of bytes at the speed of a first guess
        (4096, 0.0, 24_000, False),  # nobody knows what computing costs
        (0, 1e-3, 24_000, False),
        (4096, 1e-3, 0, False),
    ],
)
def test_fetching_pays_where_computing_takes_longer(tokens: int, prefill_token_s: float, bytes_per_token: float, expected: bool) -> None:
    assert pays(tokens, prefill_token_s, bytes_per_token, FIRST_BYTES_PER_S) is expected


def test_the_bound_is_where_it_is_said_to_be() -> None:
    fetch_s = LATENCY_S + 1000 * 1000 / 1e6
    assert pays(1000, MIN_GAIN * fetch_s / 1000 * 1.01, 1000, 1e6)
    assert not pays(1000, MIN_GAIN * fetch_s / 1000 * 0.99, 1000, 1e6)


def test_speed_is_measured_once_there_is_something_to_measure() -> None:
    assert speed(0.0, 0.0) == speed(1000.0, 1e-9) == FIRST_BYTES_PER_S
    assert speed(4e9, 2.0) == 2e9


def test_the_longest_holder_that_can_give_is_named() -> None:
    assert longest_holder(HOLDERS, "c", anyone) == ("b", 2 * CHUNK_TOKENS)
    assert longest_holder(HOLDERS, "a", anyone) == ("b", CHUNK_TOKENS)
    assert longest_holder(HOLDERS, "b", anyone) is None
    assert longest_holder(HOLDERS, "new", anyone) == ("b", 3 * CHUNK_TOKENS)
    assert longest_holder([], "new", anyone) is None


def test_every_case_of_two_replicas_and_three_chunks() -> None:
    for mine, theirs, can in itertools.product(range(4), range(4), (True, False)):
        holders = [{name for name, count in (("me", mine), ("other", theirs)) if count > i} for i in range(max(mine, theirs))]
        found = longest_holder(holders, "me", lambda name, can=can: can)  # type: ignore[misc]
        assert found == (("other", (theirs - mine) * CHUNK_TOKENS) if can and theirs > mine else None)
