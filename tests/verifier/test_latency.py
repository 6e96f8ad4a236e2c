"""Latency budgets: who goes first, who waits, how much prefill fits. Small cases, enumerated."""

from __future__ import annotations

import itertools
import math

import pytest

from dspark.workers.verifier.latency import (
    AIM,
    AMPLE,
    CATCH_UP,
    EFFICIENCY,
    HASTE,
    INF,
    LEAST_PACE,
    MIN_CHUNK,
    PATIENCE_S,
    Prefill,
    Stake,
    choose_rows,
    chunk_tokens,
    line_key,
    stake,
)


def seconds(num_rows: int, context: int) -> float:
    return 0.010 + 0.010 * num_rows + 1e-6 * context


def test_without_budgets_everybody_takes_part() -> None:
    assert choose_rows([], seconds) == []
    assert choose_rows([Stake(100)] * 5, seconds) == [True] * 5


def test_a_tight_budget_makes_those_wait_who_can() -> None:
    """One request that must run within 45 ms, five without a budget: two of them fit beside it, the longest left out first."""
    others = [Stake(0, left_out=n) for n in (0, 3, 1, 2, 0)]
    tight = Stake(0, allowed_s=0.045, slack_s=0.0)
    assert choose_rows([tight, *others], seconds) == [True, False, True, False, True, False]


@pytest.mark.parametrize("allowed", [0.005, 0.025, 0.045, INF])
def test_what_a_choice_keeps(allowed: float) -> None:
    """All cases of 4 requests, each urgent, able to wait a little or without a budget."""
    kinds = [Stake(0, allowed, slack_s=0.0), Stake(0, allowed, slack_s=0.2), Stake(0)]
    for stakes in itertools.product(kinds, repeat=4):
        chosen = choose_rows(stakes, seconds)
        took = [s for s, is_in in zip(stakes, chosen, strict=True) if is_in]
        assert took, "every step moves somebody"
        assert all(is_in for s, is_in in zip(stakes, chosen, strict=True) if s.slack_s == 0.0), "who cannot wait runs"
        if len(took) < 4:
            assert seconds(len(took), 0) <= min(s.limit_s for s in took), "nobody waits for a budget that is not kept"
            assert len(took) / seconds(len(took), 0) >= EFFICIENCY * 4 / seconds(4, 0), "nor where much less would be done"


def test_who_has_ample_time_makes_room_whatever_it_costs() -> None:
    """Two in a hurry beside six that could wait for nine seconds: these fill what is left, and run together where nobody is in a hurry."""
    patient = [Stake(0, allowed_s=2.0, slack_s=9.0, left_out=n) for n in range(6)]
    assert choose_rows([Stake(0, 0.04, slack_s=0.0)] * 2 + patient, seconds) == [True] * 2 + [False] * 6
    assert choose_rows([Stake(0, 0.06, slack_s=0.0)] * 2 + patient, seconds) == [True] * 2 + [False] * 5 + [True], "longest left out"
    assert choose_rows(patient, seconds) == [True] * 6
    late = [Stake(0, 0.01, slack_s=0.0)] * 2
    assert choose_rows(late + patient, seconds) == [True] * 2 + [False] * 6, "the others are late, but less so"


def test_nobody_with_a_budget_is_left_out_until_it_breaks() -> None:
    """Left out again and again, a request with ample time takes part before its own time is up."""
    tight, slack, steps = Stake(0, 0.03, slack_s=0.0), 9.0, 0
    while not choose_rows([tight, tight, Stake(0, 2.0, slack_s=slack)], seconds)[2]:
        slack -= seconds(2, 0)
        steps += 1
    assert steps > 100
    assert slack > 20 * seconds(3, 0)


def test_everybody_moves_in_turn() -> None:
    """Seven requests without a budget beside one that leaves room for one of them: all of them run within seven steps."""
    tight = Stake(0, allowed_s=0.031, slack_s=0.0)
    left_out = [0] * 7
    ran = [0] * 7
    for _ in range(7):
        chosen = choose_rows([tight, *(Stake(0, left_out=n) for n in left_out)], seconds)[1:]
        left_out = [0 if is_in else n + 1 for n, is_in in zip(left_out, chosen, strict=True)]
        ran = [n + is_in for n, is_in in zip(ran, chosen, strict=True)]
    assert min(ran) >= 1


def test_a_stake_follows_the_average() -> None:
    assert stake(7, None, 5, 1.0, 2.0, 3) == Stake(7, expected=2.0, left_out=3)
    tpot_ms = 50.0 / AIM
    on_time = stake(0, tpot_ms, 10, 0.5, 1.0, 0)
    assert on_time.allowed_s == pytest.approx(0.05)
    assert on_time.slack_s == pytest.approx(0.05)
    ahead = stake(0, tpot_ms, 10, 0.2, 2.0, 0)
    assert ahead.allowed_s == pytest.approx(0.1), "at most twice the budget"
    assert ahead.limit_s == pytest.approx(0.2)
    assert ahead.slack_s == pytest.approx(0.4)
    behind = stake(0, tpot_ms, 10, 0.6, 1.0, 0)
    assert behind.allowed_s == pytest.approx(0.05 - 0.1 / CATCH_UP), "back on its pace within some tokens"
    assert behind.slack_s == 0.0
    far_behind = stake(0, tpot_ms, 40, 2.9, 1.0, 0)
    assert far_behind.allowed_s == pytest.approx(0.05 * LEAST_PACE)
    assert math.isinf(stake(0, 50.0, 10, 0.8, 1.0, 0).allowed_s), "a missed budget makes nobody wait"


def test_the_line_goes_by_deadline() -> None:
    now = 100.0
    soon, later = line_key(0, 99.9, 500.0, now, 0.1), line_key(0, 99.0, 3000.0, now, 0.1)
    free, hopeless = line_key(0, 98.0, None, now, 0.1), line_key(0, 99.0, 1050.0, now, 0.1)
    assert soon < later < free < hopeless
    assert line_key(1, 0.0, None, now, 0.1) > hopeless, "priority first"
    assert line_key(0, now - PATIENCE_S - 1, None, now, 0.1) < soon, "nobody waits for ever"


def test_chunks_keep_the_pace_of_those_who_decode() -> None:
    most = 512
    assert chunk_tokens([Prefill(400, INF)], 0.04, INF, 0.001, most) == most
    assert chunk_tokens([Prefill(400, INF)], 0.04, 0.10, 0.001, most) == 60
    assert chunk_tokens([Prefill(400, INF)], 0.04, 0.041, 0.001, most) == 40, "as long as those who decode"
    assert chunk_tokens([Prefill(400, INF)], 0.004, 0.0041, 0.001, most) == MIN_CHUNK
    assert chunk_tokens([Prefill(400, INF)], 0.04, 0.03, 0.001, most) == most, "they are late without any prompt"
    assert chunk_tokens([], 0.04, 0.03, 0.0, most) == most


def test_chunks_grow_when_the_first_token_would_come_too_late() -> None:
    """400 tokens in 0.3 s beside a pace of 0.1 s: chunks of 60 would take 0.7 s; the chosen one has the least worst overshoot."""

    def worst(chunk: int) -> float:
        step = 0.04 + 0.001 * chunk
        return max(step / 0.1, math.ceil(400 / chunk) * step / 0.3)

    chosen = chunk_tokens([Prefill(400, 0.3 / HASTE)], 0.04, 0.10, 0.001, 512)
    assert chosen == 120
    assert worst(chosen) == min(worst(c) for c in (60, 120, 240, 480, 512))
    assert chunk_tokens([Prefill(400, 0.9)], 0.04, 0.50, 0.001, 512) == 460


def test_prompts_with_ample_time_wait_for_an_emptier_step() -> None:
    """They fill what is left of 70 % of the step that those who decode allow, and let hurried ones pass."""
    patient = Prefill(400, 5.0)
    assert chunk_tokens([patient], 0.04, 0.12, 0.001, 512) == 43
    assert chunk_tokens([patient], 0.08, 0.10, 0.001, 512) == 0
    assert chunk_tokens([Prefill(50, 0.9), patient], 0.08, 0.10, 0.001, 512) == 50
    assert chunk_tokens([Prefill(50, INF), patient], 0.08, 0.07, 0.001, 512) == 50, "those who decode are late in any case"
    assert chunk_tokens([Prefill(400, 0.9 * AMPLE * 0.04)], 0.04, 0.10, 0.001, 512) == 60
