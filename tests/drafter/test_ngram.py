"""The n-gram drafter: an exact index, copies that continue periods, and a confidence that is a function of the match."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.sampling import SamplingParams
from dspark.types import DraftSignals, DraftTree, DraftTurn
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.drafter.ngram_index import NgramIndex
from dspark.workers.drafter.none import NoDrafter


def turn(request_id: str, base_len: int, tokens: list[int], max_draft: int = 8) -> DraftTurn:
    return DraftTurn(request_id, base_len, tuple(tokens), 0, None, max_draft, SamplingParams(), 0)


def brute_force(tokens: list[int], min_ngram: int, max_ngram: int) -> tuple[int, int, int] | None:
    """(length, end, recent_end) by looking at every earlier place."""

    def latest(length: int) -> int:
        suffix = tokens[len(tokens) - length :]
        ends = [end for end in range(length - 1, len(tokens) - 1) if tokens[end - length + 1 : end + 1] == suffix]
        return ends[-1] if ends else -1

    found = [(n, latest(n)) for n in range(min_ngram, min(max_ngram, len(tokens) - 1) + 1) if latest(n) >= 0]
    return (found[-1][0], found[-1][1], found[0][1]) if found else None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 3), st.integers(0, 5), st.integers(1, 7))
def test_index_finds_what_brute_force_finds(tokens: list[int], min_ngram: int, more: int, stride: int) -> None:
    index = NgramIndex(min_ngram, min_ngram + more)
    for start in range(0, len(tokens), stride):
        index.extend(tokens[start : start + stride])
        expected = brute_force(index.tokens, min_ngram, min_ngram + more)
        assert (index.match and (index.match.length, index.match.end, index.match.recent_end)) == expected


def test_index_is_lazy() -> None:
    index = NgramIndex(2, 8)
    index.extend(range(1000))
    assert len(index) == 999
    index.extend(range(1000))
    assert len(index) <= 9 * 1000


def test_copy_continues_a_period() -> None:
    index = NgramIndex(2, 8)
    index.extend([9, 1, 2, 3, 1, 2, 3])
    assert index.match is not None
    assert index.match.length == 3
    assert index.continuation(index.match.end, 7) == [1, 2, 3, 1, 2, 3, 1]


def collect_one(drafter: NgramDrafter, limit: int = 8) -> DraftTree | None:
    return drafter.collect({"r": limit}, 0.0).get("r")


def test_longest_then_latest_match_wins() -> None:
    drafter = NgramDrafter(block_size=2)
    drafter.propose([turn("r", 12, [1, 2, 3, 50, 7, 2, 3, 60, 9, 1, 2, 3])])
    tree = collect_one(drafter)
    assert tree is not None
    assert (tree.tokens, tree.base_len, tree.law) == ((50, 7), 12, None)
    assert tree.is_chain
    drafter.propose([turn("s", 9, [5, 2, 3, 50, 2, 3, 60, 2, 3])])
    assert drafter.collect({"s": 1}, 0.0)["s"].tokens == (60,)


def test_limits_feed_only_unknown_and_closed_requests() -> None:
    drafter = NgramDrafter(block_size=4)
    drafter.propose([turn("r", 6, [1, 2, 3, 4, 1, 2], max_draft=2)])
    tree = collect_one(drafter, 3)
    assert tree is not None
    assert tree.tokens == (3, 4)
    assert drafter.collect({"r": 0, "unknown": 3}, 0.0) == {}
    drafter.propose([turn("r", 7, [3], max_draft=0)])
    assert collect_one(drafter) is None
    drafter.propose([turn("r", 7, [], max_draft=4)])  # a resumed request: nothing new, and all is still there
    tree = collect_one(drafter)
    assert tree is not None
    assert (tree.base_len, tree.tokens) == (7, (4, 1, 2, 3))
    drafter.close(["r", "unknown"])
    assert collect_one(drafter) is None
    assert drafter._states == {}


def test_a_missing_turn_stops_drafting_until_the_request_starts_over() -> None:
    drafter = NgramDrafter()
    drafter.propose([turn("r", 6, [1, 2, 3, 4, 1, 2])])
    drafter.propose([turn("r", 8, [4])])
    assert collect_one(drafter) is None
    drafter.propose([turn("r", 6, [1, 2, 3, 4, 1, 2])])
    assert collect_one(drafter) is not None


def test_a_turn_that_comes_twice_changes_nothing() -> None:
    drafter = NgramDrafter()
    drafter.propose([turn("r", 11, PROMPT)])
    drafter.propose([turn("r", 13, [3, 4])])
    first = collect_one(drafter)
    for _ in range(3):
        drafter.propose([turn("r", 13, [3, 4])])
    assert collect_one(drafter) == first
    drafter.propose([turn("r", 13, [3, 99])])  # not the same turn: the history is in doubt
    assert collect_one(drafter) is None


def test_requests_do_not_see_each_other() -> None:
    drafter = NgramDrafter()
    drafter.propose([turn("a", 4, [1, 2, 3, 4]), turn("r", 4, [7, 8, 1, 2])])
    assert collect_one(drafter) is None


@given(st.lists(st.integers(0, 1), min_size=2, max_size=30), st.integers(1, 4))
def test_proposals_do_not_depend_on_how_tokens_arrive(tokens: list[int], stride: int) -> None:
    whole, parts = NgramDrafter(), NgramDrafter()
    whole.propose([turn("r", len(tokens), tokens)])
    for start in range(0, len(tokens), stride):
        chunk = tokens[start : start + stride]
        parts.propose([turn("r", start + len(chunk), chunk)])
    one, other = collect_one(whole), collect_one(parts)
    assert (one and one.tokens) == (other and other.tokens)


def confidence_of(drafter: NgramDrafter, prompt: list[int]) -> tuple[float, ...]:
    drafter.propose([turn("probe", len(prompt), prompt)])
    tree = drafter.collect({"probe": 8}, 0.0)["probe"]
    drafter.close(["probe"])
    return tree.confidence


def test_margin_is_the_logit_of_confidence() -> None:
    drafter = NgramDrafter()
    drafter.propose([turn("r", len(PROMPT), PROMPT)])
    tree = collect_one(drafter)
    assert tree is not None
    assert [1 / (1 + math.exp(-m)) for m in tree.margin] == pytest.approx(tree.confidence)
    assert drafter.signals == DraftSignals(False, (1.0,), (0.0,))


def test_confidence_rises_with_length_of_match_and_position() -> None:
    drafter = NgramDrafter()
    by_length = [confidence_of(drafter, [*range(40), *range(30 - length, 30)]) for length in (2, 4, 8)]
    assert by_length[0][0] < by_length[1][0] < by_length[2][0]
    for confidence in by_length:
        assert list(confidence) == sorted(confidence)
        assert all(0 < c < 1 for c in confidence)


PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]  # proposes 3, 4, 5, …


def test_bad_lengths_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="block_size"):
        NgramDrafter(block_size=0)
    with pytest.raises(ValueError, match="n-gram"):
        NgramDrafter(min_ngram=4, max_ngram=3)


def test_no_drafter_drafts_nothing() -> None:
    drafter = NoDrafter()
    drafter.propose([turn("r", 2, [1, 2])])
    assert drafter.collect({"r": 4}, 0.0) == {}
    drafter.close(["r"])
