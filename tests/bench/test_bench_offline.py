"""The offline benchmark with scripted runners: order, warm-up, records, ratios and the losslessness check."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dspark.bench.metrics import Timeline
from dspark.bench.modes import BenchMode, parse_modes
from dspark.bench.offline import OfflinePlan, Open, check_lossless, first_difference, run_offline
from dspark.bench.records import Contender, Identity, Origin, Point, Work, make_record
from dspark.bench.runners import Counts, Prompts, Run, Runner, Settings
from dspark.bench.sweep import Held, make_levels
from dspark.bench.synthetic import SyntheticAcceptance
from dspark.errors import ConfigError
from dspark.sampling import AcceptanceRule

RATIO, COUPLED = AcceptanceRule.RATIO, AcceptanceRule.COUPLED
DRAFTED = Counts(steps=10, windows={0: 4, 2: 2, 4: 2}, accepted=6, timed_steps=5, predicted_s=0.4, measured_s=0.5)


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
        counts = DRAFTED if self.mode.uses_drafter else Counts(steps=20, windows={0: 20})
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
    levels = make_levels(settings.pop("levels", (1, 4)), settings.pop("requests", None), settings.pop("max_tokens", (32,)))  # type: ignore[arg-type]
    defaults: dict[str, object] = {
        "dtype": "float32",
        "folder": folder,
        "sets": ("tiny",),
        "levels": levels,
        "temperatures": (0.0,),
        "rules": (RATIO,),
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
    run_offline(plan_for(folder, "plain,static:3,transformers", levels=(1, 2), requests=(3,)), open_runners, encode, out)
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
    assert (static["budget_mean"], static["window_histogram"]) == (1.5, {"0": 4, "2": 2, "4": 2})
    assert (static["predicted_step_ms"], static["measured_step_ms"]) == (80.0, 100.0)
    assert (static["max_tokens"], static["ignore_eos"], static["driver"], static["synthetic_acceptance"]) == (32, False, "", None)
    assert (records[0]["accepted_length"], records[0]["verified_per_step"], records[0]["predicted_step_ms"]) == (1.0, 0.0, None)
    assert {"engine", "temperature", "prompt_set", "machine", "commit"} <= set(static)
    printed = capsys.readouterr().out
    assert "static:3 / plain: 2.00x" in printed
    assert "plain / transformers generate, one stream: 2.00x" in printed


def test_repeats_become_medians() -> None:
    def run(seconds: float) -> Run:
        return Run((Timeline(0.0, (seconds, 2 * seconds), 11),), ((0,) * 11,), seconds, Counts(10, {2: 5}, 5))

    contender = Contender(parse_modes("static:2")[0], COUPLED)
    identity = Identity.of(Point("tiny", 1, 0.7), Work(1, 11, False, 3), contender, Origin("dspark-test", "ngram", 6, "m", "c"))
    record = make_record(identity, [run(1.0), run(4.0), run(2.0)])
    assert (record.tokens_per_s, record.tokens_per_s_min, record.tokens_per_s_max, identity.repeats) == (5.5, 2.8, 11.0, 3)
    assert record.tokens_per_s_each == (11.0, 2.75, 5.5)
    assert record.window_histogram == {2: 15}
    assert (record.seconds, record.ttft_p50_ms, record.tpot_p50_ms, record.accepted_length) == (2.0, 2000.0, 200.0, 2.0)
    assert (record.as_dict()["acceptance"], record.as_dict()["draft_len"]) == ("coupled", 2)


def test_both_rules_are_measured_above_temperature_zero(folder: Path) -> None:
    calls: list[tuple[str, int, int, Settings]] = []
    open_runners, _ = opener(calls)
    plan = plan_for(folder, "plain,adaptive", levels=(1,), temperatures=(0.0, 1.0), rules=(RATIO, COUPLED))
    records = run_offline(plan, open_runners, encode, None)
    assert [(r["temperature"], r["mode"], r["acceptance"]) for r in records] == [
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


def held(file: io.StringIO) -> Held:
    return Held(json.loads(line) for line in file.getvalue().splitlines())


def test_a_cut_off_sweep_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole points of the same commit, machine and settings are not measured again, but reported; anything else is measured."""
    monkeypatch.setattr("dspark.bench.offline.source_commit", lambda: "abc")
    first, second = io.StringIO(), io.StringIO()
    run_offline(plan_for(folder, "plain,static:3", levels=(1,)), opener([])[0], encode, first)
    calls: list[tuple[str, int, int, Settings]] = []
    records = run_offline(plan_for(folder, "plain,static:3"), opener(calls)[0], encode, second, held(first))
    assert {concurrency for _, _, concurrency, _ in calls} == {4}
    assert [(r["mode"], r["concurrency"]) for r in records] == [("plain", 1), ("static", 1), ("plain", 4), ("static", 4)]
    assert [json.loads(line)["concurrency"] for line in second.getvalue().splitlines()] == [4, 4]
    assert "tiny at 1: held" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("modes", "settings", "commit"),
    [
        ("plain,static:3,adaptive", {}, "abc"),
        ("plain,static:3", {"max_tokens": (16,)}, "abc"),
        ("plain,static:3", {"repeats": 2}, "abc"),
        ("plain,static:3", {"synthetic": SyntheticAcceptance.parse("0.8")}, "abc"),
        ("plain,static:3", {}, "def"),
        ("plain,static:3", {}, "abc-dirty"),
    ],
)
def test_another_sweep_is_not_held(
    folder: Path, monkeypatch: pytest.MonkeyPatch, modes: str, settings: dict[str, object], commit: str
) -> None:
    """One contender more, other settings, another commit, or a checkout that differs from its commit."""
    monkeypatch.setattr("dspark.bench.offline.source_commit", lambda: "abc-dirty" if commit.endswith("dirty") else "abc")
    first = io.StringIO()
    run_offline(plan_for(folder, "plain,static:3", levels=(1,)), opener([])[0], encode, first)
    monkeypatch.setattr("dspark.bench.offline.source_commit", lambda: commit)
    calls: list[tuple[str, int, int, Settings]] = []
    run_offline(plan_for(folder, modes, levels=(1,), **settings), opener(calls)[0], encode, None, held(first))
    assert calls


def test_forced_acceptance_is_said_everywhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, calls = io.StringIO(), list[tuple[str, int, int, Settings]]()
    plan = plan_for(folder, "plain,static:3", levels=(1,), synthetic=SyntheticAcceptance.parse("1.8,2.5"))
    run_offline(plan, opener(calls)[0], encode, out)
    records = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(r["mode"], r["synthetic_acceptance"]) for r in records] == [("plain", None), ("static", "1.8,2.5")]
    printed = capsys.readouterr().out
    assert "SYNTHETIC: acceptance is not the drafter's, it is forced to 1.8,2.5" in printed
    assert "static:3 SYNTHETIC / plain: 2.00x" in printed
    assert all(settings.ignore_eos for _, _, _, settings in calls[2:])


def test_what_is_left_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_offline(plan_for(folder, "plain", levels=(1, 2, 4)), opener([])[0], encode, None)
    assert capsys.readouterr().err.count("left") == 2  # after the last point nothing is
