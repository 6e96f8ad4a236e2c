"""What is read out of result files: labels, ratios, what adaptive is worth, and the picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dspark.bench.bars import bar_lines
from dspark.bench.plots import _rows, draw
from dspark.bench.report import print_report, report, summary_lines
from dspark.bench.results import geometric_mean, label_of, rates_by_point, ratios_to, read_lines, scaling
from dspark.errors import ConfigError


def line(mode: str, rate: float, **extra: object) -> dict[str, object]:
    return {"engine": "dspark-0.1", "mode": mode, "prompt_set": "code", "concurrency": 1, "tokens_per_s": rate} | extra


def test_ratios() -> None:
    records = [
        line("plain", 10.0),
        line("plain", 14.0),
        line("static", 18.0, draft_len=3),
        line("transformers", 8.0, engine="transformers-5"),
        line("static", 60.0, draft_len=7, engine="vllm-1"),
        line("adaptive", 24.0, acceptance="coupled", temperature=1.0),
        line("plain", 48.0, concurrency=4),
        line("static", 24.0, concurrency=4, draft_len=3),
    ]
    rates = rates_by_point(records)
    assert rates["code", 1, 0.0] == {"plain": 12.0, "static:3": 18.0, "transformers": 8.0, "vllm-1 static:7": 60.0}
    assert rates["code", 1, 1.0] == {"adaptive coupled": 24.0}
    assert set(ratios_to(rates, "plain")) == {("code", 1, 0.0), ("code", 4, 0.0)}
    assert ratios_to(rates, "plain")["code", 1, 0.0]["static:3"] == 1.5
    assert scaling(rates, "plain") == {("code", 4, 0.0): 4.0}
    assert summary_lines(rates, "plain") == [
        "static:3 / plain: 0.87x (from 0.50x, code at 4, to 1.50x, code at 1)",
        "vllm-1 static:7 / plain: 5.00x (from 5.00x, code at 1, to 5.00x, code at 1)",
        "plain / transformers generate, one stream: 1.50x (lowest set 1.50x)",
        "plain at 4 streams / at one: 4.00x (lowest set 4.00x)",
    ]


def test_report_prints_all_points(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(rates_by_point([line("plain", 10.0), line("static", 25.0, draft_len=3), line("plain", 5.0, prompt_set="chat")]), "plain")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["set", "conc", "temp", "plain", "static:3"]
    assert printed[2].split() == ["chat", "1", "0", "5.0", "1.00x", "-"]
    assert printed[3].split() == ["code", "1", "0", "10.0", "1.00x", "25.0", "2.50x"]


def test_labels_name_other_engines() -> None:
    assert label_of(line("plain", 1.0)) == "plain"
    assert label_of(line("plain", 1.0, engine="vllm-0.26.0")) == "vllm-0.26.0 plain"


def test_drafters_are_named_if_there_are_several() -> None:
    one = line("adaptive", 1.0, draft_len=6, drafter="ngram")
    other = line("adaptive", 2.0, draft_len=6, drafter="/models/mine")
    assert rates_by_point([one, line("plain", 1.0, drafter="none")])["code", 1, 0.0].keys() == {"adaptive:6", "plain"}
    assert rates_by_point([one, other])["code", 1, 0.0].keys() == {"adaptive:6 ngram", "adaptive:6 mine"}


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="over 0"):
        geometric_mean([1.0, 0.0])


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ('{"a": 1}', "no tokens_per_s"), ("[]", "no tokens_per_s")])
def test_result_files_are_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps(line("plain", 1.0)) + "\n\n" + text)
    with pytest.raises(ConfigError, match=f"r.jsonl:3: .*{message}"):
        read_lines([tmp_path / "r.jsonl"])
    with pytest.raises(ConfigError, match="cannot read"):
        read_lines([tmp_path / "none.jsonl"])


def test_drivers_and_forced_acceptance_are_part_of_the_label() -> None:
    record = line("adaptive", 1.0, draft_len=7, driver="overlapped", acceptance="coupled", synthetic_acceptance="0.8")
    assert label_of(record) == "adaptive:7@overlapped coupled SYNTHETIC"
    rates = rates_by_point([line("static", 1.0, draft_len=2, synthetic_acceptance=curve) for curve in ("0.8", "1.5,1.9")])
    assert rates["code", 1, 0.0].keys() == {"static:2 SYNTHETIC 0.8", "static:2 SYNTHETIC 1.5,1.9"}


def test_what_adaptive_is_worth() -> None:
    """Against the best other at each point, and against the one static length that is best over all of them."""
    records = [
        *(line("plain", 10.0), line("static", 20.0, draft_len=3), line("static", 16.0, draft_len=5), line("adaptive", 22.0, draft_len=7)),
        *(line(mode, rate, concurrency=4, draft_len=k) for mode, rate, k in (("plain", 50.0, 0), ("static", 40.0, 3), ("static", 60.0, 5))),
        line("adaptive", 48.0, concurrency=4, draft_len=7),
        line("tree", 100.0, concurrency=16, draft_len=16),
        line("adaptive", 90.0, concurrency=16, draft_len=7),
        line("shadow", 999.0, draft_len=7),
        line("adaptive", 21.0, draft_len=4),
        line("transformers", 99.0, engine="transformers-5"),
        line("static", 99.0, draft_len=7, engine="vllm-1"),
    ]
    assert bar_lines(records) == [
        "adaptive:4 / best of all others at each point: lowest 1.050x (code at 1, static:3), geometric mean 1.050x over 1 point",
        "adaptive:4 / best single static (static:3): 1.050x, geometric mean over 1 point",
        "adaptive:7 / best of all others at each point: lowest 0.800x (code at 4, static:5), geometric mean 0.925x over 3 points",
        "adaptive:7 / best single static (static:5): 1.049x, geometric mean over 2 points",
    ]


def test_what_chance_explains_is_told_apart() -> None:
    """The best other is 10 % faster at both points: in every turn at one, now and then at the other."""
    steady, shaky = [100.0, 90.0, 110.0, 100.0], [100.0, 60.0, 130.0, 100.0]
    records = [
        *(line("static", 110.0, draft_len=3, concurrency=streams, tokens_per_s_each=[1.1 * one for one in steady]) for streams in (1, 4)),
        line("adaptive", 100.0, draft_len=7, tokens_per_s_each=steady),
        line("adaptive", 100.0, draft_len=7, concurrency=4, tokens_per_s_each=shaky),
    ]
    (text,) = [text for text in bar_lines(records) if "turn by turn" in text]
    assert "below 0.97 x by more than 2 standard errors at 1 of 2 points (code at 1)" in text
    few = [{**record, "tokens_per_s_each": record["tokens_per_s_each"][:2]} for record in records]
    assert not [text for text in bar_lines(few) if "turn by turn" in text]


def test_rivals_have_the_same_drafter_rule_and_acceptance() -> None:
    """Sampled without and with a seed, real and forced: each adaptive is held against its own kind, and against plain."""
    records = [
        line("plain", 10.0, drafter="none"),
        line("static", 40.0, draft_len=3, drafter="ngram", acceptance="coupled"),
        line("static", 80.0, draft_len=3, drafter="ngram", synthetic_acceptance="0.9"),
        line("adaptive", 15.0, draft_len=7, drafter="ngram", acceptance="ratio"),
        line("adaptive", 60.0, draft_len=7, drafter="ngram", synthetic_acceptance="0.9"),
    ]
    assert [text.partition(",")[0] for text in bar_lines(records)] == [
        "adaptive:7 / best of all others at each point: lowest 1.500x (code at 1",
        "adaptive:7 SYNTHETIC / best of all others at each point: lowest 0.750x (code at 1",
        "adaptive:7 SYNTHETIC / best single static (static:3 SYNTHETIC): 0.750x",
    ]


def test_drivers_are_compared_mode_by_mode(capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        line(mode, rate * factor, driver=driver, draft_len=k)
        for driver, factor in (("plain", 1.0), ("overlapped", 2.0))
        for mode, rate, k in (("plain", 10.0, 0), ("adaptive", 30.0, 7))
    ]
    records[3]["tokens_per_s"] = 27.0
    report(records)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["set", "conc", "temp", "plain@plain", "adaptive:7@overlapped", "adaptive:7@plain", "plain@overlapped"]
    assert printed[-1] == (
        "overlapped / plain driver: lowest 0.900x (adaptive:7@overlapped, code at 1), geometric mean 1.342x over 2 pairs"
    )
    assert "adaptive:7@overlapped / best of all others at each point: lowest 1.350x (code at 1, plain@overlapped)" in printed[-3]


def test_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [line("plain", 10.0), line("plain", 30.0, concurrency=4), line("plain", 9.0, temperature=1.0, prompt_set="x")]
    draw(records, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="plot"):
        draw(records, tmp_path / "r.png")


def test_rows_of_the_picture() -> None:
    """Speed, budgets of what drafts, and step times; the last two only where records have them."""
    old = [line("plain", 10.0), line("plain", 30.0, concurrency=4)]
    (pareto,) = _rows(old)
    assert pareto.curves("code") == {"plain": [(10.0, 10.0), (7.5, 30.0)]}
    assert pareto.curves("chat") == {}
    drafting = {"drafter": "ngram", "budget_mean": 2.5, "predicted_step_ms": 40.0, "measured_step_ms": 50.0}
    plain = {"drafter": "none", "budget_mean": 0.0, "predicted_step_ms": None, "measured_step_ms": None}
    _, budgets, steps = _rows([line("plain", 10.0, **plain), line("adaptive", 12.0, concurrency=8, temperature=1.0, **drafting)])
    assert budgets.curves("code") == {"adaptive T=1": [(8, 2.5)]}
    assert steps.curves("code") == {"adaptive T=1": [(40.0, 50.0)]}
    assert (pareto.is_line, steps.is_line) == (True, False)


def test_a_picture_says_what_is_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    titles: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text: titles.append(text))
    draw([line("static", 1.0, synthetic_acceptance="1.8,2.5"), line("plain", 1.0)], tmp_path / "r.png")
    draw([line("plain", 1.0)], tmp_path / "r.png")
    assert titles == ["SYNTHETIC ACCEPTANCE, forced: 1.8,2.5"]
