"""Drafting or plain decoding: the kind that is faster is used, whatever was predicted; the other is tried now and then."""

from __future__ import annotations

import dataclasses
import random

import pytest
from helpers.engines import FLAT, greedy, make_engine, run, tiny_target

from dspark.types import Speculation
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.draft_worth import CLEAR_GAIN, CLEAR_LOSS, MIN_STEPS, MOST_EVERY, TRY_EVERY, TRY_FOR, DraftWorth


def share_of_drafts(worth: DraftWorth, rows: int, gain: float, predicted: float, steps: int = 12_000) -> float:
    """How many of the last two thousand steps drafted, when drafting brings ``gain`` times the tokens a second; noisy steps."""
    draw, used = random.Random(1), []
    for _ in range(steps):
        drafts = worth.allows_drafts(rows, predicted, is_predicted=predicted > 1.05)
        used.append(drafts)
        tokens = sum(draw.randint(1, 5) for _ in range(rows)) if drafts else rows
        worth.observe(rows, drafts, tokens, 0.01 * rows * (3 / gain if drafts else 1.0) * draw.uniform(0.9, 1.1))
    return sum(used[-2000:]) / 2000


@pytest.mark.parametrize("rows", [1, 3, 64, 200])
def test_the_faster_kind_is_found_though_the_other_was_predicted(rows: int) -> None:
    tries = TRY_FOR / MOST_EVERY
    assert share_of_drafts(DraftWorth(), rows, 1.25, predicted=1.2) == pytest.approx(1 - tries, abs=0.01)
    assert share_of_drafts(DraftWorth(), rows, 0.8, predicted=1.2) == pytest.approx(tries, abs=0.01)
    assert share_of_drafts(DraftWorth(), rows, 1.25, predicted=0.95) == pytest.approx(1 - tries, abs=0.01)


def test_what_is_about_as_fast_is_tried_again_soon() -> None:
    worth, used = DraftWorth(), []
    for _ in range(4000):
        used.append(worth.allows_drafts(8, 1.1, is_predicted=True))
        worth.observe(8, used[-1], 8, 1.0)
    assert used[-2000:].count(False) / 2000 == pytest.approx(TRY_FOR / TRY_EVERY, abs=0.01)


def test_plain_decoding_is_not_tried_where_drafting_is_far_ahead() -> None:
    assert share_of_drafts(DraftWorth(), 1, 2.0, predicted=CLEAR_GAIN) == 1.0


def test_levels_of_load_are_told_apart() -> None:
    worth = DraftWorth()
    share_of_drafts(worth, 64, 0.8, predicted=1.2)
    assert all(worth.allows_drafts(4, 1.2, is_predicted=True) for _ in range(TRY_EVERY - TRY_FOR - 1))


def test_what_was_slower_once_comes_back_when_it_is_faster() -> None:
    worth = DraftWorth()
    share_of_drafts(worth, 8, 0.8, predicted=1.2)
    assert share_of_drafts(worth, 8, 1.4, predicted=1.2, steps=40_000) == pytest.approx(1 - TRY_FOR / MOST_EVERY, abs=0.01)


def test_where_nothing_was_measured_the_prediction_decides() -> None:
    worth = DraftWorth()
    assert not any(worth.allows_drafts(4, 1.02, is_predicted=False) for _ in range(TRY_EVERY - TRY_FOR))
    assert all(worth.allows_drafts(4, 1.02, is_predicted=False) for _ in range(TRY_FOR))
    assert worth.allows_drafts(4, 1.1, is_predicted=True)


def test_drafting_is_not_tried_where_it_would_lose_much() -> None:
    assert share_of_drafts(DraftWorth(), 8, 2.0, predicted=CLEAR_LOSS) == 0.0


def test_drafts_that_are_far_ahead_by_now_come_back_soon() -> None:
    """They were slower with other text; what was measured then counts less and less."""
    worth = DraftWorth()
    share_of_drafts(worth, 8, 0.8, predicted=1.2)
    assert share_of_drafts(worth, 8, 1.4, predicted=1.4, steps=2000 + 10 * TRY_EVERY) > 0.95
    assert MIN_STEPS > TRY_FOR


def test_what_requests_ask_for_themselves_says_nothing_of_what_the_policy_would_do() -> None:
    """A fixed length that does not pay must not stop adaptive drafts, which would be shorter."""
    engine = make_engine(tiny_target(), NgramDrafter(), costs=FLAT)
    prompt = [5, 6, 7, 8] * 6

    def drafting_steps(speculation: str) -> float:
        request = dataclasses.replace(greedy(f"{speculation}", prompt, 60), speculation=Speculation.parse(speculation))
        run(engine, [request])
        engine.aside.close()
        return sum(level.drafting.steps for level in engine.drafts.worth._levels.values())

    assert drafting_steps("static:3") == 0
    assert drafting_steps("tree:5") == 0
    assert drafting_steps("adaptive:2") > 5
