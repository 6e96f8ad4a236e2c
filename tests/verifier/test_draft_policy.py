"""How deep to draft: by what drafts would bring and cost at the present load, and never for ever not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from dspark.workers.verifier.costs import CostTable, Curve, Floats
from dspark.workers.verifier.draft_policy import (
    DECIDE_EVERY,
    DEEPER_GAIN,
    LONGEST_PAUSE,
    LOOK_DEEPER_EVERY,
    MAX_REST,
    MIN_GAIN,
    RESTED,
    RETURN_GAIN,
    DraftPolicy,
    Outlook,
)

GAMMA = 7


def survival(confidence: float, rows: int = 64) -> Floats:
    return np.cumprod(np.full((rows, GAMMA), confidence), axis=1)


def table(draft_s: float, deeper_s: float) -> CostTable:
    return CostTable(Curve((1,), (1.0,)), Curve((1,), (draft_s,)), draft_deeper=Curve((1,), (deeper_s,)))


def linear(base: float, token: float, most: int = 600) -> Floats:
    return base + token * np.arange(most + 1)


def look(rows: int, costs: CostTable, seconds: Floats) -> Callable[[], Outlook]:
    """All of so many requests may draft."""
    drafting = np.array([costs.draft_seconds(rows, depth) for depth in range(1, GAMMA + 1)])
    return lambda: Outlook(rows, rows, float(seconds[0]), seconds, drafting)


def taught(confidence: float) -> DraftPolicy:
    policy = DraftPolicy(GAMMA)
    policy.observe(survival(confidence))
    return policy


def test_nothing_is_known_at_first() -> None:
    assert DraftPolicy(GAMMA).depth(look(4, table(0.1, 0.1), linear(1.0, 0.1))) == GAMMA


def test_depth_is_the_best_of_all() -> None:
    """Against every depth and count of admitted tokens, written out for equal requests; a deeper one must be clearly better."""
    for confidence in (0.3, 0.6, 0.9):
        for draft_s, deeper_s, token in ((0.1, 0.0, 0.01), (0.1, 0.05, 0.01), (0.5, 0.2, 0.05), (3.0, 0.1, 0.1)):
            rows = 4

            def value(depth: int, admitted: int) -> float:
                gains = sorted((confidence**k for k in range(1, depth + 1) for _ in range(rows)), reverse=True)  # noqa: B023
                cost = 1.0 + token * admitted + draft_s + deeper_s * (depth - 1)  # noqa: B023
                return (rows + sum(gains[:admitted])) / cost  # noqa: B023

            best = {d: max(value(d, k) for k in range(rows * d + 1)) for d in range(1, GAMMA + 1)}
            most = max(best.values())
            expected = (
                min(depth for depth, found in best.items() if found >= most * (1 - DEEPER_GAIN)) if most > rows * (1 + MIN_GAIN) else 0
            )
            assert taught(confidence).depth(look(rows, table(draft_s, deeper_s), linear(1.0, token))) == expected


def test_drafts_that_are_verified_whole_are_judged_whole() -> None:
    """Where half of the requests can be drafted for, and a plan would verify what is drafted for them alone."""
    for token, planned, whole in ((0.1, 6, 2), (0.18, 2, 0)):
        seen = look(4, table(0.1, 0.0), linear(1.0, token))()
        for verifies_all, depth in ((False, planned), (True, whole)):
            policy = DraftPolicy(GAMMA)
            policy.observe(np.concatenate([survival(0.95, 32), survival(0.05, 32)]))
            assert policy.depth(lambda: dataclasses.replace(seen, verifies_all=verifies_all)) == depth  # noqa: B023


def test_plain_decoding_comes_and_goes_with_the_load() -> None:
    policy, costs = taught(0.7), table(0.3, 0.05)
    steep, flat = linear(1.0, 0.8), linear(1.0, 0.02)
    assert policy.depth(look(8, costs, steep)) == 0
    later = [policy.depth(look(8, costs, flat)) for _ in range(DECIDE_EVERY)]
    assert later[-1] > 0


def test_coming_back_takes_more_than_going_on() -> None:
    costs = table(0.1, 0.0)
    near, far = (look(4, costs, linear(1.0, token)) for token in (0.13, 0.6))  # 1.05 times as fast as plain decoding, and slower
    going_on = taught(0.7)
    assert going_on.depth(near) > 0
    coming_back = taught(0.7)
    assert coming_back.depth(far) == 0
    for _ in range(2 * DECIDE_EVERY):
        assert not coming_back.depth(near) or coming_back.is_look
    assert 1 + MIN_GAIN < going_on.gain < 1 + RETURN_GAIN


def test_while_nothing_is_drafted_acceptance_is_looked_at_more_and_more_rarely() -> None:
    policy, costs = taught(0.2), table(5.0, 1.0)
    looks = [step for step in range(600) if policy.depth(look(8, costs, linear(1.0, 1.0))) == GAMMA]
    gaps = np.diff(looks)
    assert list(gaps) == sorted(gaps)
    assert gaps[-1] == LONGEST_PAUSE + 1


def test_short_drafts_are_deepened_now_and_then() -> None:
    policy, costs = taught(0.5), table(0.1, 0.4)
    depths = [policy.depth(look(4, costs, linear(1.0, 0.05))) for _ in range(2 * LOOK_DEEPER_EVERY)]
    assert sum(depth == GAMMA for depth in depths) == 2
    assert set(depths) > {GAMMA}


def test_shorter_drafts_keep_what_is_known_of_later_positions() -> None:
    policy = taught(0.9)
    for _ in range(DECIDE_EVERY):
        policy.observe(survival(0.9)[:, :1])
    assert policy.depth(look(4, table(0.1, 0.0), linear(1.0, 0.01))) == GAMMA


def test_a_request_rests_longer_and_longer() -> None:
    rest, waits = RESTED, []
    for _ in range(7):
        rest = rest.after(0)
        wait = 0
        while not rest.is_due():
            wait += 1
        waits.append(wait)
    assert waits == [1, 2, 4, 8, 16, MAX_REST, MAX_REST]
    rest = rest.after(3)
    assert rest.is_due()


@pytest.mark.parametrize("rows", [1, 3, 64, 700])
def test_few_requests_are_judged_by_all_recent_drafts(rows: int) -> None:
    """Half of the drafts stand whole and half not at all: whichever was seen first, drafts of one request bring half of their tokens."""
    for first in (0.999, 0.001):
        policy = DraftPolicy(GAMMA)
        for confidence in (first, 1.0 - first):
            policy.observe(survival(confidence))
            for _ in range(DECIDE_EVERY - 1):
                policy.pass_over()
        costs, token = table(0.5 * rows, 0.0), 1e-4
        assert policy.depth(look(rows, costs, linear(1.0 * rows, token, rows * GAMMA))) == GAMMA
        assert policy.gain == pytest.approx((1 + GAMMA / 2) / 1.5, rel=0.02)
