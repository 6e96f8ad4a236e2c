"""The Python door on a tiny random model: kinds of prompts, results, streams, threads, errors."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark import LLM, SamplingParams
from dspark.errors import BadRequest, ConfigError, Overloaded, WorkerLost
from dspark.flight import Flight

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
PROMPT = list(range(40, 60))


def wait_until_idle(llm: LLM) -> dict[str, float]:
    """Statistics once nothing runs and every block is back; at most a second."""
    deadline = time.monotonic() + 1.0
    while True:
        stats = llm.stats()
        is_idle = stats["num_requests_running"] == 0 and stats["num_free_blocks"] == stats["num_blocks"]
        if is_idle or time.monotonic() > deadline:
            return stats
        time.sleep(0.005)


def assert_idle(llm: LLM) -> None:
    stats = wait_until_idle(llm)
    assert (stats["num_requests_running"], stats["num_requests_waiting"]) == (0, 0)
    assert stats["num_free_blocks"] == stats["num_blocks"]


def test_token_ids_as_transformers_generates_them(llm: LLM, tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(PROMPT) :]
    (output,) = llm.generate(PROMPT, GREEDY)
    # min_new_tokens suppresses EOS in transformers, ignore_eos does not: compare up to an EOS
    end = output.token_ids.index(model.config.eos_token_id) if model.config.eos_token_id in output.token_ids else 12
    assert list(output.token_ids)[:end] == expected.tolist()[:end]
    assert (output.num_prompt_tokens, output.finish_reason, len(output.token_ids)) == (20, "length", 12)
    assert output.text == llm.tokenizer.decode(output.token_ids, skip_special_tokens=True)


def test_every_kind_of_prompt_alone_and_mixed(llm: LLM) -> None:
    text = "abc abc"
    messages = [{"role": "user", "content": "hi"}]
    rendered = llm.tokenizer("<s>user: hi\n<s>assistant: ", add_special_tokens=False)["input_ids"]
    prompts: list[Any] = [text, PROMPT, messages]
    mixed = llm.generate(prompts, GREEDY)
    assert [output.prompt_token_ids for output in mixed] == [tuple(llm.tokenizer(text)["input_ids"]), tuple(PROMPT), tuple(rendered)]
    for prompt, output in zip(prompts, mixed, strict=True):
        (alone,) = llm.generate(prompt, GREEDY)
        assert alone.token_ids == output.token_ids


def test_no_prompts_no_results(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize("max_concurrency", [1, 2, None])
def test_order_and_tokens_do_not_depend_on_concurrency(llm: LLM, max_concurrency: int | None) -> None:
    prompts = [[50 + i, 60, 70] for i in range(5)]
    params = [dataclasses.replace(GREEDY, max_tokens=1 + 3 * i) for i in range(5)]
    outputs = llm.generate(prompts, params, max_concurrency=max_concurrency)
    assert [output.prompt_token_ids[0] for output in outputs] == [50, 51, 52, 53, 54]
    assert [len(output.token_ids) for output in outputs] == [1, 4, 7, 10, 13]
    assert [o.token_ids for o in outputs] == [llm.generate(p, s)[0].token_ids for p, s in zip(prompts, params, strict=True)]


def test_max_concurrency_limits_what_runs(llm: LLM) -> None:
    """With one at a time, a request is submitted only after the one before it has ended."""
    outputs = llm.generate([PROMPT] * 4, GREEDY, max_concurrency=1)
    for before, after in itertools.pairwise(outputs):
        assert after.submitted_at >= before.submitted_at + before.latency_s


def test_more_prompts_than_the_engine_queues(tiny_folder: Path) -> None:
    with LLM(str(tiny_folder), drafter="none", dtype="float32", kv_tokens=1024, profile=False, max_num_seqs=2, max_queued=2) as llm:
        outputs = llm.generate([[60 + i] for i in range(12)], GREEDY)
        assert [len(output.token_ids) for output in outputs] == [12] * 12


def test_overload_by_others_is_told(tiny_folder: Path) -> None:
    with LLM(str(tiny_folder), drafter="none", dtype="float32", kv_tokens=512, profile=False, max_num_seqs=1, max_queued=1) as llm:
        with llm.stream(PROMPT, LONG) as first:
            next(first)
            with llm.stream(PROMPT, LONG), pytest.raises(Overloaded, match="waiting"):
                llm.generate(PROMPT, GREEDY)
        assert_idle(llm)


def test_times_counters_and_cached_tokens(llm: LLM) -> None:
    prompt = list(range(100, 140))
    started = time.perf_counter()
    first, second = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
    assert started <= first.submitted_at <= time.perf_counter()
    assert 0 < first.ttft_s <= first.latency_s <= time.perf_counter() - started
    (choice,) = first.choices
    assert list(choice.arrivals_s) == sorted(choice.arrivals_s)
    assert choice.rounds == len(choice.arrivals_s)
    assert choice.rounds + choice.accepted == len(choice.token_ids)
    assert choice.drafted_rounds <= choice.rounds
    assert first.acceptance_length == pytest.approx(1 + choice.accepted / max(1, choice.drafted_rounds))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 32  # two whole blocks
    assert second.token_ids == first.token_ids


def test_speculation_per_call_changes_speed_not_tokens(llm: LLM) -> None:
    prompt = [65, 66, 67] * 8
    plain, static, adaptive = (llm.generate(prompt, LONG, speculation=mode)[0] for mode in ("off", "static:3", None))
    assert plain.choices[0].drafted == 0
    assert static.choices[0].drafted > 0
    assert adaptive.choices[0].drafted > 0
    assert plain.token_ids == static.token_ids == adaptive.token_ids
    assert plain.acceptance_length == 1.0


def test_n_choices_are_the_runs_of_consecutive_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=10, temperature=1.0)
    (output,) = llm.generate(PROMPT, params)
    alone = [llm.generate(PROMPT, dataclasses.replace(params, n=1, seed=5 + i))[0].token_ids for i in range(3)]
    assert [choice.token_ids for choice in output.choices] == alone
    assert [choice.index for choice in output.choices] == [0, 1, 2]
    assert len(set(alone)) > 1
    assert (output.text, output.token_ids) == (output.choices[0].text, output.choices[0].token_ids)


def test_logprobs_and_prompt_logprobs(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, dataclasses.replace(GREEDY, logprobs=2, prompt_logprobs=1))
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
    assert all(len(entry.top) == 2 for entry in output.logprobs)
    assert output.prompt_logprobs is not None
    assert [entry and entry.token_id for entry in output.prompt_logprobs] == [None, *PROMPT[1:]]
    (without,) = llm.generate(PROMPT, GREEDY)
    assert without.logprobs is None
    assert without.prompt_logprobs is None


def test_a_stop_string_ends_text_and_tokens(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPT, LONG)
    stop = next(whole.text[i : i + 2] for i in range(20, 60) if whole.text[i : i + 2].isascii())
    at = whole.text.index(stop)
    (cut,) = llm.generate(PROMPT, dataclasses.replace(LONG, stop=(stop,)))
    assert (cut.text, cut.finish_reason, cut.choices[0].stop_reason) == (whole.text[:at], "stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert llm.tokenizer.decode(cut.token_ids, skip_special_tokens=True).startswith(whole.text[: at + 2])
    assert not llm.tokenizer.decode(cut.token_ids[:-1], skip_special_tokens=True).startswith(whole.text[: at + 2])


def test_results_are_frozen(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, GREEDY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.submitted_at = 0.0  # type: ignore[misc]


def test_a_stream_adds_up_to_the_result(llm: LLM) -> None:
    (expected,) = llm.generate(PROMPT, LONG)
    stream = llm.stream(PROMPT, LONG)
    with pytest.raises(RuntimeError, match="not ended"):
        _ = stream.output
    deltas = list(stream)
    assert "".join(delta.text for delta in deltas) == expected.text
    assert tuple(token for delta in deltas for token in delta.token_ids) == expected.token_ids
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    assert stream.output.token_ids == expected.token_ids
    assert len(deltas) == stream.output.choices[0].rounds


def test_a_stream_of_several_choices(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=8, ignore_eos=True)
    (expected,) = llm.generate(PROMPT, params)
    texts = ["", ""]
    for delta in llm.stream(PROMPT, params):
        texts[delta.index] += delta.text
    assert texts == [choice.text for choice in expected.choices]


def test_closing_or_dropping_a_stream_aborts_it(llm: LLM) -> None:
    closed = llm.stream(PROMPT, LONG)
    next(closed)
    closed.close()
    assert list(closed) == []
    assert_idle(llm)
    for _ in llm.stream(PROMPT, LONG):
        break
    gc.collect()
    assert_idle(llm)
    with llm.stream(PROMPT, LONG) as left:
        next(left)
    assert_idle(llm)


def test_closing_from_another_thread_ends_the_reader(llm: LLM) -> None:
    stream = llm.stream([1], LONG)
    next(stream)
    closer = threading.Thread(target=stream.close)
    closer.start()
    assert all(delta.finish_reason is None for delta in stream)
    closer.join()
    assert_idle(llm)


def test_an_interrupted_generate_leaves_nothing_running(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    note = Flight.note

    def interrupted(self: Flight) -> Any:
        note(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Flight, "note", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, LONG)
    assert_idle(llm)


def test_two_readers_of_one_stream_are_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._loaded.engine
    step, go_on = engine.step, threading.Event()

    def slow_step() -> Any:
        go_on.wait(5.0)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)
    stream = llm.stream(PROMPT, GREEDY)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    while not stream._in_use.locked():
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="another thread"):
        next(stream)
    go_on.set()
    reader.join(5.0)
    assert stream.output.finish_reason == "length"


def test_threads_may_generate_at_once(llm: LLM) -> None:
    prompts = [[70 + i, 71, 72] for i in range(4)]
    expected = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    found: dict[int, tuple[int, ...]] = {}

    def work(i: int) -> None:
        found[i] = llm.generate(prompts[i], GREEDY)[0].token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert [found[i] for i in range(4)] == expected


@pytest.fixture
def small(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(str(tiny_folder), drafter="none", dtype="float32", kv_tokens=512, profile=False) as llm:
        yield llm


def test_a_stream_keeps_its_llm_alive(tiny_folder: Path) -> None:
    stream = LLM(str(tiny_folder), drafter="none", dtype="float32", kv_tokens=512, profile=False).stream(PROMPT, LONG)
    gc.collect()
    assert len(list(stream)) == 200


def test_closing_the_llm_ends_its_streams(small: LLM) -> None:
    stream = small.stream(PROMPT, LONG)
    next(stream)
    small.close()
    small.close()
    assert list(stream)[-1].finish_reason == "abort"
    for call in (small.generate, small.stream):
        with pytest.raises(RuntimeError, match="closed"):
            call(PROMPT, GREEDY)


def test_a_failing_engine_fails_its_requests(small: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ArithmeticError("out of numbers")

    monkeypatch.setattr(small._loaded.engine, "step", broken)
    with pytest.raises(WorkerLost, match="out of numbers"):
        small.generate([PROMPT, PROMPT], GREEDY)
    with pytest.raises(WorkerLost, match="out of numbers"):
        small.generate(PROMPT, GREEDY)


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "too long": ({"prompts": [1] * 300}, "300 tokens; at most 255 fit"),
    "id outside the vocabulary": ({"prompts": [1, 10**6]}, "outside 0 to 267"),
    "negative id": ({"prompts": [1, -1]}, "outside 0 to 267"),
    "empty text": ({"prompts": ""}, "empty"),
    "empty ids": ({"prompts": [[]]}, "empty"),
    "mixed list": ({"prompts": [[1, "a"]]}, "only whole numbers"),
    "numbers that are not whole": ({"prompts": [[1.5]]}, "only whole numbers"),
    "booleans": ({"prompts": [[True]]}, "only whole numbers"),
    "not a prompt": ({"prompts": 5}, "not int"),
    "bytes": ({"prompts": [b"abc"]}, "not bytes"),
    "half a surrogate pair": ({"prompts": "a\ud800"}, "not valid Unicode"),
    "bad role": ({"prompts": [{"role": "king", "content": "x"}]}, r"messages\[0\].role"),
    "no params": ({"prompts": "a", "params": {"max_tokens": 3}}, "SamplingParams"),
    "fewer params than prompts": ({"prompts": ["a", "b"], "params": [GREEDY]}, "1 params for 2 prompts"),
    "bad mode": ({"prompts": "a", "speculation": "sometimes"}, "static:K"),
    "mode of another type": ({"prompts": "a", "speculation": 3}, "static:K"),
    "no concurrency": ({"prompts": "a", "max_concurrency": 0}, "max_concurrency"),
    "logit bias outside the vocabulary": ({"prompts": "a", "params": SamplingParams(logit_bias={10**6: 1.0})}, "logit_bias|vocabulary"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused_before_anything_runs(llm: LLM, call: dict[str, Any], message: str) -> None:
    before = llm.stats()["steps_total"]
    good: list[Any] = [PROMPT]
    prompts = call["prompts"]
    many = good + prompts if isinstance(prompts, list) and prompts and isinstance(prompts[0], (str, list, bytes)) else prompts
    with pytest.raises(BadRequest, match=message):
        llm.generate(**({"params": GREEDY} | call | {"prompts": many if "params" not in call else prompts}))
    time.sleep(0.01)
    assert llm.stats()["steps_total"] == before


def test_speculation_without_a_drafter_is_refused(small: LLM) -> None:
    with pytest.raises(BadRequest, match="has none"):
        small.generate(PROMPT, GREEDY, speculation="static:3")
    assert len(small.generate(PROMPT, GREEDY, speculation="off")[0].token_ids) == 12


def test_describe_and_config_are_effective(llm: LLM) -> None:
    described = llm.describe()
    assert llm.model_name == described["model_name"] == "tiny-llama"
    assert (llm.config.device, llm.config.dtype, llm.config.max_model_len) == ("cpu", "float32", 256)
    assert described["kv_capacity_tokens"] == 2048
    assert described["drafter"] == "ngram"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculation": "sometimes"}, "speculation: should be off, static:K"),
        ({"kv_token": 5}, "unknown key kv_token; did you mean kv_tokens?"),
        ({"dtype": "int8"}, "dtype: .*float32"),
        ({"max_model_len": -1}, "max_model_len: .*16.*-1"),
        ({"max_num_seqs": "many"}, "max_num_seqs: .*'many'"),
        ({"model": 5}, "model: .*string"),
    ],
)
def test_bad_settings_name_the_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(**settings)


def test_a_folder_without_weights_is_refused_by_name(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=str(tmp_path)):
        LLM(str(tmp_path))
