"""The command line, in process and as a program."""

from __future__ import annotations

import builtins
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dspark
from dspark import terminal
from dspark.cli import main
from dspark.config import ServeConfig
from dspark.config_file import keys

SMALL = ["--dtype", "float32", "--kv-tokens", "512", "--no-profile", "--drafter", "none"]
GREEDY = ["--temperature", "0", "--max-tokens", "8", "--ignore-eos"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DSPARK_") and name != "DSPARK_CACHE":
            monkeypatch.delenv(name)


class Served:
    """Stands in for the cluster: notes the configuration instead of serving it."""

    def __init__(self) -> None:
        self.config: ServeConfig | None = None
        self.show_dashboard: bool | None = None

    def __call__(self, config: ServeConfig, show_dashboard: bool = False) -> None:
        self.config, self.show_dashboard = config, show_dashboard


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    import dspark.cluster.serve

    served = Served()
    monkeypatch.setattr(dspark.cluster.serve, "serve_forever", served)
    return served


def test_flags_reach_the_server(served: Served) -> None:
    assert main(["serve", "some/folder", "--port", "9001", "--speculation", "off", "--no-prefix-cache", "--revision", "none"]) == 0
    assert served.config is not None
    assert served.show_dashboard is False
    assert (served.config.port, served.config.engine.model, served.config.engine.speculation) == (9001, "some/folder", "off")
    assert served.config.engine.prefix_cache is False
    assert served.config.engine.revision is None


def test_flags_win_over_environment_over_file(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nhost = "file"\nmax_waiting = 7\n')
    monkeypatch.setenv("DSPARK_PORT", "2")
    monkeypatch.setenv("DSPARK_HOST", "env")
    assert main(["serve", "--config", str(file), "--port", "3", "--dashboard"]) == 0
    assert served.config is not None
    assert (served.config.port, served.config.host, served.config.max_waiting) == (3, "env", 7)
    assert served.show_dashboard is True


def test_short_flags_are_the_long_ones(served: Served) -> None:
    assert main(["serve", "-tp", "4", "-ep", "2"]) == 0
    assert served.config is not None
    assert (served.config.engine.tensor_parallel, served.config.engine.expert_parallel) == (4, 2)
    assert main(["serve", "--tensor-parallel", "3"]) == 0
    assert served.config.engine.num_ranks == 3


def test_every_key_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key in keys():
        assert key.flag in text
        assert key.variable in text


BAD_COMMANDS = {
    "unknown flag": (["serve", "--kv-token", "5"], "unknown argument --kv-token; did you mean --kv-tokens?"),
    "unknown flag with value": (["serve", "--prot=5"], "unknown argument --prot; did you mean --port?"),
    "flag of another command": (["serve", "--temperature", "0"], "unknown argument --temperature\n"),
    "misspelt sampling flag": (["generate", "x", "--temprature", "0"], "did you mean --temperature?"),
    "an argument too many": (["serve", "a", "b"], "unknown argument b"),
    "bad value": (["serve", "--port", "x"], "port: should be a valid integer"),
    "huge value": (["serve", "--port", "9" * 30], "port: should be less than or equal to 65535"),
    "model twice": (["serve", "a", "--model", "b"], "given twice"),
    "missing file": (["serve", "--config", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
    "bad sampling": (["generate", "x", "--top-p", "5"], "top_p must be over 0 and at most 1"),
    "unknown model": (["generate", "x", "--model", "/nowhere/model"], "/nowhere/model"),
}


@pytest.mark.parametrize(("argv", "words"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_errors_are_one_line_and_exit_code_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str], served: Served) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert served.config is None


def test_a_port_in_use_is_told_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"port {port}" in error
    assert "DSPARK_PORT" in error


def test_generate_prints_answers_in_order(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "abc", "xyz", "--json", "--model", str(tiny_folder), *SMALL, *GREEDY]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["abc", "xyz"]
    assert [len(line["choices"][0]["token_ids"]) for line in lines] == [8, 8]
    assert "tiny-llama: float32 on cpu, context 256, KV for 512 tokens, drafter none" in captured.err
    assert main(["generate", "abc", "--model", str(tiny_folder), *SMALL, *GREEDY]) == 0
    assert capsys.readouterr().out == lines[0]["choices"][0]["text"] + "\n"


def test_generate_reads_a_prompt_from_a_pipe_and_takes_the_template(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert main(["generate", "--chat", "--json", "--n", "2", "--seed", "1", "--model", str(tiny_folder), *SMALL]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(line["choices"]) == 2
    assert line["num_prompt_tokens"] == len("user: hi\nassistant: ") + 2  # one byte a token, and two <s>


@pytest.fixture
def chat(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs ``dspark chat`` on lines and returns the conversations the model was asked, what was printed, what was noted."""
    asked: list[list[dict[str, str]]] = []
    stream = terminal.LLM.stream

    def noted(self: Any, prompt: Any, *rest: Any, **options: Any) -> Any:
        asked.append(list(prompt))
        return stream(self, prompt, *rest, **options)

    def run(text: str, *flags: str) -> tuple[list[list[dict[str, str]]], str, str]:
        asked.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert main(["chat", "--model", str(tiny_folder), *SMALL, *GREEDY, *flags]) == 0
        captured = capsys.readouterr()
        return asked, captured.out, captured.err

    monkeypatch.setattr(terminal.LLM, "stream", noted)
    return run


def test_chat_keeps_the_conversation_until_reset(chat: Any) -> None:
    asked, out, err = chat("one\n\ntwo\n/reset\nthree\n/what\n/exit\nnever\n", "--system", "be brief")
    assert [[message["role"] for message in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert [messages[-1]["content"] for messages in asked] == ["one", "two", "three"]
    assert asked[1][2]["content"] + "\n" == out[: len(asked[1][2]["content"]) + 1]
    assert "unknown command /what; /reset forgets" in err
    assert err.count("[8 tokens in ") == 3


def test_chat_ends_with_its_input(chat: Any) -> None:
    assert chat("")[0] == []


def test_a_question_that_does_not_fit_leaves_the_chat_going(chat: Any) -> None:
    asked, _, err = chat(f"{'x' * 300}\nhi\n")
    assert "error: the prompt has " in err
    assert "255 fit" in err
    assert [message["content"] for message in asked[1]] == ["hi"]


def test_ctrl_c_ends_the_answer_not_the_chat(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dspark.flight import TokenStream

    following, left = TokenStream.__next__, [3]

    def interrupted(self: TokenStream) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return following(self)

    monkeypatch.setattr(TokenStream, "__next__", interrupted)
    asked, out, err = chat("one\ntwo\n")
    assert " [stopped]\n" in out
    assert [message["role"] for message in asked[1]] == ["user", "assistant", "user"]
    assert err.count("[8 tokens in ") == 1


def test_bench_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import dspark.bench.cli

    seen: list[list[str]] = []
    monkeypatch.setattr(dspark.bench.cli, "main", lambda argv: seen.append(argv) or 0)
    assert main(["bench", "offline", "--help"]) == 0
    assert seen == [["offline", "--help"]]


@pytest.mark.parametrize(("module", "argv", "extra"), [("ray", ["serve"], "serve"), ("httpx", ["bench", "online"], "bench")])
def test_a_missing_extra_is_named(
    module: str, argv: list[str], extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith(("dspark.cluster.serve", "dspark.bench.cli")):
            raise ModuleNotFoundError(f"No module named {module!r}", name=f"{module}.sub")
        return found(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(argv) == 2
    assert f"pip install 'dspark-serve[{extra}]'" in capsys.readouterr().err


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "serve a model over HTTP" in capsys.readouterr().err


def test_as_a_module_and_into_a_closed_pipe() -> None:
    python = [sys.executable, "-m", "dspark"]
    assert subprocess.run([*python, "version"], capture_output=True, text=True, check=True).stdout == dspark.__version__ + "\n"
    failed = subprocess.run([*python, "serve", "--prot", "1"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen([*python, "version"], stdout=writer, stderr=subprocess.PIPE, text=True) as piped:
        os.close(writer)
        assert piped.communicate()[1] == ""


def test_profile_measures_and_keeps_a_table(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    flags = ["--model", str(tiny_folder), "--dtype", "float32", "--kv-tokens", "2048", "--drafter", "ngram"]
    assert main(["profile", "--json", *flags]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["verify"]["sizes"][0] == 1
    assert all(a <= b for a, b in zip(table["verify"]["seconds"], table["verify"]["seconds"][1:], strict=False))
    assert len(list((tmp_path / "cache" / "costs").glob("*.json"))) == 1
    monkeypatch.setattr("dspark.workers.build.still_holds", lambda engine, table: True)
    assert main(["generate", "ab", "--max-tokens", "4", *flags]) == 0
    said = capsys.readouterr().err
    assert "measured at an earlier start" in said, "the engine starts with the table that was kept"
    assert main(["profile", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["tokens", "verify", "ms"]
