"""Metrics on hand-made timelines with exact answers."""

from __future__ import annotations

import pytest

from dspark.bench.metrics import (
    Limits,
    Spread,
    Timeline,
    accepted_length,
    median,
    percentile,
    poisson_arrivals,
    rate_while_full,
    summarize,
)

FAST = Timeline(sent_s=1.0, chunk_s=(1.25, 1.5, 2.25), num_tokens=5)
SLOW = Timeline(sent_s=0.0, chunk_s=(2.0, 4.0), num_tokens=3)
SHORT = Timeline(sent_s=0.5, chunk_s=(1.0,), num_tokens=1)


def test_timeline() -> None:
    assert (FAST.ttft_s, FAST.e2e_s, FAST.tpot_s, FAST.gaps_s) == (0.25, 1.25, 0.25, (0.25, 0.75))
    assert (SHORT.ttft_s, SHORT.e2e_s, SHORT.tpot_s, SHORT.gaps_s) == (0.5, 0.5, None, ())


@pytest.mark.parametrize(("chunks", "tokens"), [((), 1), ((1.0,), 0)])
def test_an_empty_answer_has_no_timeline(chunks: tuple[float, ...], tokens: int) -> None:
    with pytest.raises(ValueError, match="at least one chunk"):
        Timeline(0.0, chunks, tokens)


def test_the_last_streams_do_not_count_where_streams_are_to_be_busy() -> None:
    first, second = Timeline(0.0, (1.0, 2.0), 4), Timeline(0.0, (1.0, 3.0), 4)
    third = Timeline(2.0, (3.0, 4.0, 5.0, 6.0), 8)  # when the second ends, at 3, nothing follows it
    assert rate_while_full([first, second, third], 2) == pytest.approx((4 + 4 + 2) / 3.0)
    assert rate_while_full([third, first, second], 1) == pytest.approx(16 / 6.0)
    assert rate_while_full([first, second, third], 3) == pytest.approx((4 + 2 + 0) / 2.0)
    with pytest.raises(ValueError, match="3 answers never kept 4 streams busy"):
        rate_while_full([first, second, third], 4)


def test_percentile_interpolates() -> None:
    assert [percentile([40.0, 10.0, 30.0, 20.0], p) for p in (0, 50, 90, 100)] == [10.0, 25.0, 37.0, 40.0]
    assert percentile([7.0], 99) == 7.0
    assert (median([3.0, 1.0, 2.0]), median([1.0, 2.0])) == (2.0, 1.5)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_percentile_refuses(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, percent)


def test_limits_must_all_hold() -> None:
    assert Limits().are_met(SLOW)
    assert Limits(ttft_ms=250, tpot_ms=250).are_met(FAST)
    assert not Limits(ttft_ms=249, tpot_ms=250).are_met(FAST)
    assert not Limits(ttft_ms=250, tpot_ms=249).are_met(FAST)
    assert Limits(ttft_ms=500, tpot_ms=0).are_met(SHORT)


def test_summary() -> None:
    summary = summarize([(one, Limits(ttft_ms=500)) for one in (FAST, SLOW, SHORT)], errors=1, seconds=4.5)
    assert (summary.requests, summary.errors, summary.output_tokens) == (4, 1, 9)
    assert (summary.tokens_per_s, summary.requests_per_s) == (2.0, 0.667)
    assert summary.ttft_ms == Spread(500.0, 1700.0, 1970.0)
    assert summary.tpot_ms == Spread(625.0, 925.0, 992.5)
    assert summary.itl_ms == Spread(750.0, 1750.0, 1975.0)
    assert (summary.tokens_per_chunk, summary.goodput_per_s, summary.goodput_share) == (1.5, 0.444, 0.5)


def test_every_answer_has_limits_of_its_own() -> None:
    summary = summarize([(FAST, Limits(ttft_ms=200)), (SLOW, Limits(ttft_ms=2000)), (SHORT, Limits())], errors=0, seconds=1.0)
    assert summary.goodput_per_s == 2.0


def test_summary_of_failures_only() -> None:
    summary = summarize([], errors=2, seconds=1.0)
    assert (summary.requests, summary.tokens_per_s, summary.goodput_share, summary.tokens_per_chunk) == (2, 0.0, 0.0, 0.0)
    assert summary.ttft_ms == Spread(None, None, None)
    with pytest.raises(ValueError, match="takes time"):
        summarize([], errors=0, seconds=0.0)


def test_accepted_length() -> None:
    assert accepted_length(accepted=0, drafted_rounds=0) == 1.0
    assert accepted_length(accepted=15, drafted_rounds=10) == 2.5


def test_poisson_arrivals() -> None:
    arrivals = poisson_arrivals(rate_per_s=4.0, count=20_000, seed=7)
    assert arrivals == poisson_arrivals(4.0, 20_000, 7) != poisson_arrivals(4.0, 20_000, 8)
    gaps = [later - earlier for earlier, later in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) > 0
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, rel=0.03)
    assert sum(gap < 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.02)  # 1 - 1/e: exponential, not regular
    with pytest.raises(ValueError, match="rate"):
        poisson_arrivals(0.0, 1, 0)
