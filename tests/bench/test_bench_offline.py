"""The offline benchmark with scripted runners: order, warm-up, records, ratios and the losslessness check."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dspark.bench.metrics import Timeline
from dspark.bench.modes import BenchMode, parse_modes
from dspark.bench.offline import OfflinePlan, Open, check_lossless, first_difference, run_offline
from dspark.bench.records import Contender, Origin, Point, make_record
from dspark.bench.report import draw, geometric_mean, label_of, print_report, rates_by_point, ratios_to, read_lines, scaling, summary_lines
from dspark.bench.runners import Counts, Prompts, Run, Runner, Settings
from dspark.errors import ConfigError
from dspark.sampling import AcceptanceRule

RATIO, COUPLED = AcceptanceRule.RATIO, AcceptanceRule.COUPLED


@dataclass
class Scripted:
    """Takes ``seconds`` for every run and answers each prompt with its own ids; notes what it was asked in ``calls``."""

    mode: BenchMode
    seconds: float
    calls: list[tuple[str, int, int, Settings]]
    spoils: bool = False
    engine: str = "dspark-test"
    closed: bool = False

    @property
    def drafter(self) -> str:
        return "ngram" if self.mode.uses_drafter else "none"

    @property
    def block_size(self) -> int:
        return 6 if self.mode.uses_drafter else 0

    def run(self, prompts: Prompts, concurrency: int, settings: Settings) -> Run:
        self.calls.append((self.mode.label, len(prompts), concurrency, settings))
        answers = tuple((*tuple(ids)[:-1], 9) if self.spoils else tuple(ids) for ids in prompts)
        timelines = tuple(Timeline(0.0, (0.5, 2.5), len(ids)) for ids in answers)
        counts = Counts(steps=10, drafted_rounds=4, verified=12, accepted=6) if self.mode.uses_drafter else Counts(steps=20)
        return Run(timelines, answers, self.seconds, counts)

    def close(self) -> None:
        self.closed = True


def encode(text: str) -> list[int]:
    return [len(word) for word in text.split()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.jsonl").write_text('{"turns": ["a bb ccc dddd eeeee"]}\n{"turns": ["a bb"]}\n{"turns": ["a b c d e f g h"]}\n')
    return tmp_path


def plan_for(folder: Path, modes: str, **settings: object) -> OfflinePlan:
    defaults: dict[str, object] = {
        "dtype": "float32",
        "folder": folder,
        "sets": ("tiny",),
        "levels": (1, 4),
        "temperatures": (0.0,),
        "rules": (RATIO,),
        "max_tokens": 32,
        "max_prompt_tokens": 6,
    }
    return OfflinePlan(tuple(parse_modes(modes)), **(defaults | settings))  # type: ignore[arg-type]


SECONDS = {"plain": 2.0, "static:3": 1.0, "adaptive": 0.5, "transformers": 4.0}


def opener(calls: list[tuple[str, int, int, Settings]], spoiled: str = "") -> tuple[Open, list[Scripted]]:
    built: list[Scripted] = []

    def open_runners(modes: Sequence[BenchMode], dtype: str) -> dict[BenchMode, Runner]:
        assert dtype == "float32"
        built.extend(Scripted(mode, SECONDS[mode.label], calls, mode.label == spoiled) for mode in modes)
        return {runner.mode: runner for runner in built}

    return open_runners, built


def test_modes_are_interleaved_and_rotated(folder: Path) -> None:
    calls: list[tuple[str, int, int, Settings]] = []
    open_runners, built = opener(calls)
    run_offline(plan_for(folder, "transformers,plain,adaptive", repeats=3), open_runners, encode, None)
    at_one = [(label, settings.max_tokens) for label, _, concurrency, settings in calls if concurrency == 1]
    assert at_one == [
        *[("transformers", 16), ("plain", 16), ("adaptive", 16)],
        *[("transformers", 32), ("plain", 32), ("adaptive", 32)],
        *[("plain", 32), ("adaptive", 32), ("transformers", 32)],
        *[("adaptive", 32), ("transformers", 32), ("plain", 32)],
    ]
    at_four = [(label, number) for label, number, concurrency, _ in calls if concurrency == 4]
    assert at_four == [(label, 4) for label in ["plain", "adaptive", "plain", "adaptive", "adaptive", "plain", "plain", "adaptive"]]
    assert all(runner.closed for runner in built)


def test_records(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    open_runners, _ = opener([])
    run_offline(plan_for(folder, "plain,static:3,transformers", levels=(1, 2), requests=3), open_runners, encode, out)
    records = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(r["mode"], r["draft_len"], r["drafter"], r["concurrency"], r["requests"]) for r in records] == [
        ("plain", 0, "none", 1, 3),
        ("static", 3, "ngram", 1, 3),
        ("transformers", 0, "none", 1, 3),
        ("plain", 0, "none", 2, 4),
        ("static", 3, "ngram", 2, 4),
    ]
    static = records[4]  # prompts of 5 and 2 tokens in turn, 8 is over the limit
    assert (static["output_tokens"], static["seconds"], static["tokens_per_s"], static["tokens_per_s_per_user"]) == (14, 1.0, 14.0, 7.0)
    assert (static["accepted_length"], static["acceptance_rate"], static["verified_per_step"]) == (2.5, 0.5, 1.2)
    assert (static["ttft_p50_ms"], static["tpot_p50_ms"], static["acceptance"], static["repeats"]) == (500.0, 1250.0, "", 1)
    assert (records[0]["accepted_length"], records[0]["verified_per_step"]) == (1.0, 0.0)
    assert {"engine", "temperature", "prompt_set", "machine", "commit"} <= set(static)
    printed = capsys.readouterr().out
    assert "static:3 / plain: 2.00x" in printed
    assert "plain / transformers generate, one stream: 2.00x" in printed


def test_repeats_become_medians() -> None:
    def run(seconds: float) -> Run:
        return Run((Timeline(0.0, (seconds, 2 * seconds), 11),), ((0,) * 11,), seconds, Counts(10, 5, 10, 5))

    contender = Contender(parse_modes("static:2")[0], COUPLED)
    record = make_record(Point("tiny", 1, 0.7), contender, [run(1.0), run(4.0), run(2.0)], Origin("dspark-test", "ngram", 6, "m", "c"))
    assert (record.tokens_per_s, record.tokens_per_s_min, record.tokens_per_s_max, record.repeats) == (5.5, 2.8, 11.0, 3)
    assert (record.seconds, record.ttft_p50_ms, record.tpot_p50_ms, record.accepted_length) == (2.0, 2000.0, 200.0, 2.0)
    assert (record.acceptance, json.loads(record.to_json())["acceptance"]) == ("coupled", "coupled")


def test_both_rules_are_measured_above_temperature_zero(folder: Path) -> None:
    calls: list[tuple[str, int, int, Settings]] = []
    open_runners, _ = opener(calls)
    plan = plan_for(folder, "plain,adaptive", levels=(1,), temperatures=(0.0, 1.0), rules=(RATIO, COUPLED))
    records = run_offline(plan, open_runners, encode, None)
    assert [(r.temperature, r.mode, r.acceptance) for r in records] == [
        (0.0, "plain", ""),
        (0.0, "adaptive", ""),
        (1.0, "plain", ""),
        (1.0, "adaptive", "ratio"),
        (1.0, "adaptive", "coupled"),
    ]
    assert [settings.rule for label, _, _, settings in calls if label == "adaptive"] == [None, None, RATIO, COUPLED, RATIO, COUPLED]


def test_a_set_of_long_prompts_only(folder: Path) -> None:
    open_runners, built = opener([])
    with pytest.raises(ConfigError, match="at most 1 tokens"):
        run_offline(plan_for(folder, "plain", max_prompt_tokens=1), open_runners, encode, None)
    assert built[0].closed


@pytest.mark.parametrize("spoiled", ["", "adaptive"])
def test_check_lossless(folder: Path, capsys: pytest.CaptureFixture[str], spoiled: str) -> None:
    open_runners, built = opener([], spoiled)
    same = check_lossless(plan_for(folder, "static:3,plain,transformers,adaptive"), open_runners, encode)
    lines = capsys.readouterr().out.splitlines()
    assert same == (not spoiled)
    assert lines[0].startswith("tiny static:3: identical to plain (8 prompts, 28 tokens, 6 of them drafted")
    assert ("NOT identical: prompt 1 differs from token 5 on (5 in plain, 9 here)" in lines[1]) == bool(spoiled)
    assert [runner.mode.label for runner in built] == ["static:3", "plain", "adaptive"]
    assert all(runner.closed for runner in built)


@pytest.mark.parametrize("modes", ["plain", "static:3,adaptive", "plain,transformers"])
def test_check_lossless_needs_something_to_compare(folder: Path, modes: str) -> None:
    with pytest.raises(ConfigError, match="needs plain and at least one"):
        check_lossless(plan_for(folder, modes), opener([])[0], encode)


def test_first_difference() -> None:
    assert first_difference([[1, 2], [3]], [[1, 2], [3]]) is None
    assert first_difference([[1, 2]], [[1]]) == "NOT identical: prompt 1 differs from token 2 on (2 in plain, the end here)"


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


def test_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = rates_by_point([line("plain", 10.0), line("plain", 30.0, concurrency=4), line("plain", 9.0, temperature=1.0, prompt_set="x")])
    draw(rates, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="plot"):
        draw(rates, tmp_path / "r.png")
