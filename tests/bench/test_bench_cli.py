"""`dspark bench` end to end on a tiny random model: real engines, a real baseline, no measurement worth reading."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_model import save_tiny_model
from transformers import LlamaForCausalLM

from dspark import LLM
from dspark.bench.cli import main
from dspark.bench.compare import ComparePlan, run_compare
from dspark.bench.http_client import Ask
from dspark.bench.in_process import run_in_process
from dspark.bench.modes import parse_modes
from dspark.bench.runners import Settings, Source
from dspark.bench.synthetic import SyntheticAcceptance, SyntheticJudge
from dspark.bench.traffic import Job
from dspark.cli import main as dspark
from dspark.errors import ConfigError, DSparkError
from dspark.sampling import AcceptanceRule

FAST = ["--max-tokens", "12", "--dtype", "float32", "--kv-tokens", "2048"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose every token names the next, in cycles of four: what it writes repeats, as an n-gram drafter needs."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    network = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = network.model.embed_tokens.weight
        following = torch.arange(len(embedding))  # what is left over names itself
        whole = len(embedding) // 4 * 4
        following[:whole] = following[:whole].view(-1, 4).roll(-1, 1).flatten()
        network.lm_head.weight[following] = embedding
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "tiny.jsonl").write_text("".join(json.dumps({"turns": [f"say {n} ab ab ab ab ab"]}) + "\n" for n in range(3)))
    return folder


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model, drafter="ngram", speculation="static:2", dtype="float32", kv_tokens=2048) as llm:
        yield llm


def test_offline_end_to_end(model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    command = ["offline", "--model", model, "--drafter", "ngram", "--modes", "transformers,plain,static:2", *FAST]
    status = main([*command, "--sets", "tiny", "--prompts", str(prompts), "--concurrency", "1,2", "--check-lossless", "--json", str(out)])
    printed = capsys.readouterr().out
    records = {(r["mode"], r["concurrency"]): r for r in map(json.loads, out.read_text().splitlines())}
    assert status == 0, printed
    assert printed.count("identical to plain (8 prompts") == 1
    assert set(records) == {("transformers", 1)} | {(mode, level) for mode in ("plain", "static") for level in (1, 2)}
    assert {records["plain", 1]["output_tokens"], records["transformers", 1]["output_tokens"]} == {records["static", 1]["output_tokens"]}
    static, plain = records["static", 2], records["plain", 2]
    assert (static["drafter"], static["draft_len"], plain["drafter"], plain["draft_len"]) == ("ngram", 2, "none", 0)
    assert 0 < static["verified_per_step"] <= 4
    assert plain["verified_per_step"] == 0
    assert 1.5 < static["accepted_length"] <= 3
    assert 0.5 < static["acceptance_rate"] <= 1
    assert static["ttft_p50_ms"] > 0
    assert "float32" in static["machine"]
    assert main(["report", str(out)]) == 0
    assert "plain / transformers generate, one stream" in capsys.readouterr().out


def test_steady_seconds_of_busy_streams(model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    command = ["offline", "--model", model, "--drafter", "ngram", *FAST, "--sets", "tiny", "--prompts", str(prompts), "--json", str(out)]
    assert main([*command, "--modes", "plain,static:2", "--concurrency", "2", "--steady", "--while-full", "--vary-tokens"]) == 0
    assert "times at the speed at which the same work takes" in capsys.readouterr().out
    for record in map(json.loads, out.read_text().splitlines()):
        assert (record["steady"], record["while_full"], record["varies"]) == (True, True, True)
        assert record["tokens_per_s"] > 0 < record["ttft_p50_ms"]
    with pytest.raises(ConfigError, match="--steady watches our own engine: leave transformers out of --modes"):
        main([*command, "--modes", "transformers,plain", "--concurrency", "1", "--steady"])


def test_other_fields_of_sampling_and_longer_warm_ups(
    model: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    command = ["offline", "--model", model, "--drafter", "ngram", *FAST, "--sets", "tiny", "--prompts", str(prompts), "--json", str(out)]
    command += ["--concurrency", "2", "--warm-up", "3", "--sampling", '{"presence_penalty": 0.5, "logit_bias": {"7": 100}}']
    assert main([*command, "--modes", "plain,static:2", "--ignore-eos"]) == 0
    for record in map(json.loads, out.read_text().splitlines()):
        assert (record["warm_up"], json.loads(record["sampling"])["presence_penalty"]) == (3, 0.5)
    with pytest.raises(ConfigError, match="leave transformers out of --modes"):
        main([*command, "--modes", "transformers,plain", "--concurrency", "1"])
    for wrong in ("[]", '{"top_p": 3}', '{"temperature": 1}', '{"no_field": 1}', "{"):
        with pytest.raises(SystemExit):
            main(["offline", "--sampling", wrong])
    assert "other flags set temperature" in capsys.readouterr().err


def test_answers_of_different_lengths() -> None:
    assert Settings(10).lengths(3) == [10, 10, 10]
    lengths = Settings(100, varies=True).lengths(50)
    assert lengths[:20] == Settings(100, varies=True).lengths(20)
    assert 50 <= min(lengths) < 60
    assert 140 < max(lengths) <= 150
    assert sum(lengths) / 50 == pytest.approx(100, abs=2)
    assert Settings(1, varies=True).lengths(4) == [1, 1, 1, 1]


def test_check_only_measures_nothing(model: str, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sets", "tiny", "--prompts", str(prompts), "--concurrency", "2", "--modes", "plain,static:2", "--check-only"]
    assert main(["offline", "--model", model, "--drafter", "ngram", *FAST, *flags]) == 0
    assert "tok/s" not in capsys.readouterr().out


def test_runners_agree_and_count(model: str) -> None:
    """Plain, static and transformers give the same greedy tokens; the counts add up to them."""
    modes = parse_modes("plain,static:2,transformers")
    runners = Source(model, model, "ngram", max_num_seqs=2, kv_tokens=2048).open(modes, "float32")
    work = [[4, 5, 6, 7, 4, 5], [9, 9, 9, 9]]
    with contextlib.ExitStack() as stack:
        for runner in runners.values():
            stack.callback(runner.close)
        plain, static, baseline = (runners[mode].run(work, 1, Settings(10, ignore_eos=True)) for mode in modes)
    assert plain.token_ids == static.token_ids
    assert [len(ids) for ids in plain.token_ids] == [timeline.num_tokens for timeline in plain.timelines] == [10, 10]
    assert [len(timeline.chunk_s) for timeline in baseline.timelines] == [len(ids) for ids in baseline.token_ids] == [10, 10]
    assert plain.counts.steps == sum(len(timeline.chunk_s) for timeline in plain.timelines) == 20
    assert (plain.counts.verified, plain.counts.drafted_rounds) == (0, 0)
    chunks = sum(len(timeline.chunk_s) for timeline in static.timelines)
    assert static.counts.accepted <= static.counts.verified
    assert static.counts.steps == static.counts.rounds == chunks == 20 - static.counts.accepted
    assert sum(static.counts.windows.values()) == chunks
    assert max(static.counts.windows) == 2
    assert 0 < static.counts.timed_steps <= static.counts.steps
    assert static.counts.measured_s < static.seconds
    assert static.counts.predicted_s > 0
    assert plain.timelines[0].chunk_s[-1] <= plain.timelines[1].sent_s  # one at a time


def test_sampling_settings_reach_the_engine(model: str) -> None:
    (mode,) = parse_modes("static:2")
    (runner,) = Source(model, model, "ngram", max_num_seqs=2, kv_tokens=2048).open([mode], "float32").values()
    with contextlib.closing(runner):
        run = runner.run([[8, 9, 10, 11, 8, 9]] * 2, 2, Settings(16, 0.01, AcceptanceRule.COUPLED, ignore_eos=True))
    assert [len(ids) for ids in run.token_ids] == [16, 16]
    assert run.counts.verified >= run.counts.accepted > 0


def test_engines_are_shared_by_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine without a drafter and one for all that speculate, which measures step costs if one is adaptive."""
    opened: list[dict[str, Any]] = []

    class Config:
        drafter = "ngram"

    class Fake:
        config = Config()

        def __init__(self, model: str | None, **settings: Any) -> None:
            opened.append(settings)

        def describe(self) -> dict[str, Any]:
            return {"draft_block_size": 8}

    monkeypatch.setattr("dspark.bench.runners.LLM", Fake)
    modes = parse_modes("plain,static:3,adaptive")
    runners = Source(None, "folder", "auto", max_num_seqs=16).open(modes, "bfloat16")
    assert [(one["drafter"], one["speculation"], one["max_num_seqs"], one["prefix_cache"]) for one in opened] == [
        ("none", "off", 16, False),
        ("auto", "adaptive", 16, False),
    ]
    assert [(runners[mode].drafter, runners[mode].block_size) for mode in modes] == [("none", 0), ("ngram", 8), ("ngram", 8)]
    Source(None, "folder", "auto", 1).open(parse_modes("static:3"), "bfloat16")
    assert opened[-1]["speculation"] == "static:1"
    assert all("driver" not in one for one in opened)


def test_both_drivers_serve_every_mode(model: str) -> None:
    """An engine each, the same tokens; forced acceptance is put into those that draft."""
    modes = parse_modes("plain,static:2", ("plain", "overlapped"))
    source = Source(model, model, "ngram", max_num_seqs=2, kv_tokens=1024, synthetic=SyntheticAcceptance.parse("0.9"))
    with contextlib.ExitStack() as stack:
        runners = source.open(modes, "float32")
        for runner in runners.values():
            stack.callback(runner.close)
        runs = {mode.label: runners[mode].run([[4, 5, 6, 7, 4, 5]], 1, Settings(10, ignore_eos=True)) for mode in modes}
        engines = {mode.label: runners[mode].llm for mode in modes}  # type: ignore[attr-defined]
    assert list(runs) == ["plain@plain", "plain@overlapped", "static:2@plain", "static:2@overlapped"]
    assert [engines[label].config.driver for label in runs] == ["plain", "overlapped"] * 2
    assert [isinstance(engines[label].engine.judge, SyntheticJudge) for label in runs] == [False, False, True, True]
    assert runs["plain@plain"].token_ids == runs["plain@overlapped"].token_ids
    assert runs["static:2@plain"].token_ids == runs["static:2@overlapped"].token_ids


def test_the_baseline_runs_one_at_a_time(model: str) -> None:
    (runner,) = Source(model, model, "none", 1).open(parse_modes("transformers"), "float32").values()
    with contextlib.closing(runner), pytest.raises(ValueError, match="one prompt at a time"):
        runner.run([[1]], 2, Settings(1))


def test_in_process_load(llm: LLM) -> None:
    measured = run_in_process(llm, [Job(Ask("", 6, ignore_eos=True), "say ab ab")] * 5, concurrency=2)
    timelines = [answer.timeline for answer in measured.answers if answer.timeline is not None]
    assert [timeline.num_tokens for timeline in timelines] == [6] * 5
    assert all(timeline.e2e_s <= measured.seconds for timeline in timelines)
    failed = run_in_process(llm, [Job(Ask("", 6, is_chat=False), "")], concurrency=1)
    assert failed.errors == {"the prompt is empty": 1}


def test_compare_takes_turns(llm: LLM, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The HTTP side is replaced by the other one, so both sides must come out alike; order and records are checked."""
    turns: list[str] = []

    async def over_http(_: ComparePlan, ask: Ask, work: list[str], level: int) -> Any:
        turns.append(f"http {ask.max_tokens}")
        return run_in_process(llm, [Job(ask, prompt) for prompt in work], level)

    def in_process(llm: LLM, jobs: list[Job], level: int) -> Any:
        turns.append(f"in-process {jobs[0].ask.max_tokens}")
        return run_in_process(llm, jobs, level)

    monkeypatch.setattr("dspark.bench.compare._over_http", over_http)
    monkeypatch.setattr("dspark.bench.compare.run_in_process", in_process)
    plan = ComparePlan("http://nowhere", Ask("tiny", 6), None, prompts, ("tiny",), (1,), 3, 2, 5.0, "float32")
    (comparison,) = run_compare(plan, llm, None)
    assert turns == ["in-process 4", "http 4", "in-process 6", "http 6", "http 6", "in-process 6"]
    assert 0.1 < comparison.throughput_ratio < 10
    assert abs(comparison.added_ttft_ms) < 500
    assert "added TTFT ms" in capsys.readouterr().out


def test_compare_refuses_failed_requests(llm: LLM, prompts: Path) -> None:
    plan = ComparePlan("http://127.0.0.1:9", Ask("tiny", 6), None, prompts, ("tiny",), (1,), 1, 1, 5.0, "float32")
    with pytest.raises(DSparkError, match="http: 1 of 1 requests failed"):
        run_compare(plan, llm, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["online"], "--url names the server"),
        (["online", "--url", "http://x", "--drafter", "ngram", "--repeats", "2"], "--drafter, --repeats can only be used with"),
        (["online", "--compare-in-process", "--rate", "2", "--seed", "1"], "--rate, --seed cannot be used with"),
        (["online", "--compare-in-process", "--class", "a:ttft_ms=1", "--trace", "chat"], "--trace, --class cannot be used with"),
        (["online", "--url", "x", "--class", "a:ttft_ms=1", "--ttft-ms", "2"], "--class has limits of its own"),
        (["online", "--url", "x", "--without-budgets"], "there is none"),
        (["offline", "--modes", "fast"], "use plain, static:K"),
        (["report", "/nowhere.jsonl"], "cannot read"),
    ],
)
def test_what_cannot_run_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=message):
        main(flags)
    assert dspark(["bench", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--class", "a:b=1"], ["--class", "a"], ["--rates", "0"], ["--rates", "fast"]])
def test_bad_traffic_is_a_usage_error(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["mixed", *flags])
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_a_forced_sweep_goes_on_where_it_was_cut_off(
    model: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs on one file, the first of one level: nothing is measured twice; the picture is drawn from both."""
    monkeypatch.setattr("dspark.bench.offline.source_commit", lambda: "abc")
    out, png = tmp_path / "out.jsonl", tmp_path / "out.png"
    flags = ["--sets", "tiny", "--prompts", str(prompts), "--modes", "plain,static:1..2", "--synthetic-acceptance", "1.9,2.7", *FAST]
    command = ["offline", "--model", model, "--drafter", "ngram", *flags, "--json", str(out), "--resume"]
    assert main([*command, "--concurrency", "1"]) == 0
    assert main([*command, "--concurrency", "1,2"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["mode"], r["draft_len"], r["concurrency"]) for r in records] == [
        (mode, length, level) for level in (1, 2) for mode, length in (("plain", 0), ("static", 1), ("static", 2))
    ]
    assert {r["synthetic_acceptance"] for r in records if r["mode"] == "static"} == {"1.9,2.7"}
    assert "static:1 SYNTHETIC / plain" in capsys.readouterr().out
    assert main(["report", str(out), "--png", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [["--concurrency", "0"], ["--concurrency", "1,x"], ["--temperature", "-1"], ["--acceptance", "maybe"]])
def test_bad_values_are_usage_errors(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["offline", *flags])
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_a_report_needs_offline_results(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"kind": "online", "tokens_per_s": 3}\n')
    with pytest.raises(ConfigError, match="no offline results"):
        main(["report", str(tmp_path / "r.jsonl")])


def test_an_output_that_cannot_be_written(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        main(["offline", "--model", model, "--json", str(tmp_path / "no/out.jsonl")])
