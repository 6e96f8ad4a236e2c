"""Figure 7 of the paper from results: curves, matched throughput and speed; and bars that results must meet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark.bench.cli import main
from dspark.bench.demands import Demand, demand_lines
from dspark.bench.frontier import Curve, frontier_lines, gain
from dspark.errors import ConfigError

SINGLE = [(100.0, 100.0), (80.0, 320.0), (50.0, 800.0), (25.0, 1600.0)]  # 1, 4, 16, 64 streams


def line(mode: str, draft_len: int, level: int, rate: float, **extra: object) -> dict[str, object]:
    fields = {"engine": "dspark-0.1", "mode": mode, "draft_len": draft_len, "prompt_set": "code", "concurrency": level}
    return {**fields, "tokens_per_s": rate, "drafter": "mine", **extra}


def test_beaten_points_are_left_out() -> None:
    assert Curve.of([(10.0, 100.0), (100.0, 50.0), (20.0, 120.0), (20.0, 90.0), (5.0, 120.0)]).points == ((100.0, 50.0), (20.0, 120.0))


def test_a_curve_is_straight_on_logarithmic_axes() -> None:
    curve = Curve.of([(100.0, 100.0), (25.0, 1600.0)])
    assert curve.throughput_at(50.0) == pytest.approx(400.0)
    assert curve.speed_at(400.0) == pytest.approx(50.0)
    assert [curve.speed_at(100.0), curve.speed_at(1600.0), curve.throughput_at(25.0)] == pytest.approx([100.0, 25.0, 1600.0])
    assert (curve.speed_at(99.0), curve.speed_at(1601.0), curve.throughput_at(101.0), curve.throughput_at(24.0)) == (None,) * 4
    assert curve.peak == 1600.0


def test_gain_over_a_curve() -> None:
    """Half again as fast at every load: the same at matched throughput only where the slope allows; here the axes do."""
    faster = Curve.of([(1.5 * speed, 1.5 * rate) for speed, rate in SINGLE])
    found = gain(faster, Curve.of(SINGLE))
    assert found.speed_at_half == pytest.approx(faster.speed_at(800.0) / 50.0)
    assert found.throughput_at_half == pytest.approx(faster.throughput_at(50.0) / 800.0)
    assert 1.5 < found.speed_at_half < 2.5
    assert found.throughput_at_half > 1.5
    assert len(found.speeds) == 3  # at 100 the faster one is not measured: it has 150 at one stream
    same = gain(Curve.of(SINGLE), Curve.of(SINGLE))
    assert [*same.speeds, same.speed_at_half, same.throughput_at_half] == pytest.approx([1.0] * 6)


def test_what_was_not_measured_is_not_made_up() -> None:
    slow = Curve.of([(300.0, 300.0), (260.0, 500.0)])  # not loaded enough to be as slow, or to reach 800
    found = gain(slow, Curve.of(SINGLE))
    assert found.speeds == (pytest.approx(slow.speed_at(320.0) / 80.0),)
    assert found.speed_at_half is None
    assert found.throughput_at_half is None


def test_lines_of_the_report() -> None:
    records = [line("static", 1, level, rate) for level, (_, rate) in zip((1, 4, 16, 64), SINGLE, strict=True)]
    records += [line("adaptive", 5, level, rate) for level, rate in ((1, 200.0), (4, 640.0), (16, 1600.0), (64, 2400.0))]
    records += [line("static", 7, 1, 999.0), line("static", 1, 1, 5.0, engine="vllm-0.26.0")]
    (text,) = frontier_lines(records)
    assert text == (
        "adaptive:5 over static:1, code: +128 % to +300 % tok/s/user at matched throughput; at half the peak throughput of the"
        " latter +185 % tok/s/user, and at its speed there +166 % throughput"
    )
    two = frontier_lines([*records, *({**record, "prompt_set": "chat"} for record in records)])
    assert [text.partition(":")[0] for text in two] == ["adaptive"] * 3
    assert "geometric mean of the sets" in two[-1]
    assert frontier_lines([record for record in records if record["mode"] != "static"]) == []


def test_demands() -> None:
    records = [line("plain", 0, level, rate, drafter="none") for level, rate in ((1, 30.0), (64, 90.0))]
    records += [line("plain", 0, level, rate, engine="vllm-0.26.0") for level, rate in ((1, 10.0), (64, 100.0))]
    bars = [Demand.parse("plain / vllm-0.26.0 plain @ 1,64 >= 1.5"), Demand.parse("plain / vllm-0.26.0 plain >= 0.5")]
    lines, all_met = demand_lines(records, bars)
    assert lines == [
        "plain / vllm-0.26.0 plain at 1: 3.00x (lowest 3.00x, code at 1), >= 1.5x asked: met",
        "plain / vllm-0.26.0 plain at 64: 0.90x (lowest 0.90x, code at 64), >= 1.5x asked: NOT met",
        "plain / vllm-0.26.0 plain at 1: 3.00x (lowest 3.00x, code at 1), >= 0.5x asked: met",
        "plain / vllm-0.26.0 plain at 64: 0.90x (lowest 0.90x, code at 64), >= 0.5x asked: met",
    ]
    assert not all_met
    assert demand_lines(records, bars[1:])[1]
    assert demand_lines(records, [Demand.parse("tree:8 / plain @256 >= 1")]) == (
        ["tree:8 / plain at 256: not measured, >= 1x asked: NOT met"],
        False,
    )
    with pytest.raises(ConfigError, match="use LABEL / LABEL"):
        Demand.parse("plain > 2")


def test_bars_decide_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.jsonl"
    records = [line("plain", 0, 1, 10.0, drafter="none"), line("static", 1, 1, 15.0)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["report", str(file), "--bar", "static:1 / plain @ 1 >= 1.2"]) == 0
    assert main(["report", str(file), "--bar", "static:1 / plain @ 1 >= 1.2", "--bar", "static:1 / plain @ 1 >= 2"]) == 1
    assert capsys.readouterr().out.count("NOT met") == 1
