"""Prompt sets, modes, tables and the machine line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from dspark import __version__
from dspark.bench import machine
from dspark.bench.modes import parse_mode, parse_modes, rotated
from dspark.bench.prompt_sets import DEFAULT_FOLDER, DEFAULT_SETS, load_set, take
from dspark.bench.tables import Column, Table
from dspark.errors import ConfigError
from dspark.types import Mode, Speculation


def test_our_prompts() -> None:
    everything = [prompt for name in DEFAULT_SETS for prompt in load_set(DEFAULT_FOLDER, name)]
    assert [len(load_set(DEFAULT_FOLDER, name)) for name in DEFAULT_SETS] == [40, 40, 40]
    assert len(set(everything)) == 120
    assert all(prompt == prompt.strip() for prompt in everything)
    assert max(len(prompt.split()) for prompt in everything) <= 320


def test_load_set_takes_first_turns(tmp_path: Path) -> None:
    lines = [{"turns": ["one", "two"], "id": 3}, {"turns": ["drei"]}]
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert load_set(tmp_path, "mine") == ["one", "drei"]
    assert take(["one", "drei"], 5) == ["one", "drei", "one", "drei", "one"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "bad.jsonl:1: not JSON"), ("[]", "expected"), ('{"turns": []}', "expected"), ('{"turns": [3]}', "expected"), ("", "no prompts")],
)
def test_load_set_refuses(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=message):
        load_set(tmp_path, "bad")


def test_a_missing_set_names_the_others() -> None:
    with pytest.raises(ConfigError, match=r"'gsm9k'.*chat, code, math"):
        load_set(DEFAULT_FOLDER, "gsm9k")


def test_modes() -> None:
    plain, static, adaptive, limited, baseline = parse_modes("plain,static:3,adaptive,adaptive:5,transformers")
    assert (plain.name, plain.draft_len, plain.uses_drafter, plain.speculation) == ("plain", 0, False, Speculation(Mode.OFF))
    assert (static.name, static.draft_len, static.label, static.uses_drafter) == ("static", 3, "static:3", True)
    assert (adaptive.name, adaptive.draft_len, adaptive.label) == ("adaptive", 0, "adaptive")
    assert limited.speculation == Speculation(Mode.ADAPTIVE, 5)
    assert (baseline.name, baseline.speculation, baseline.uses_drafter) == ("transformers", None, False)
    assert [mode.needs_costs for mode in (plain, static, adaptive, baseline)] == [False, False, True, False]


def test_trees_and_ranges() -> None:
    tree, shadow, *static = parse_modes("tree:12,shadow,static:2..4,static:6")
    assert (tree.name, tree.draft_len, tree.label, tree.speculation) == ("tree", 12, "tree:12", Speculation(Mode.ADAPTIVE, None, 12))
    assert (shadow.name, shadow.needs_costs) == ("shadow", True)
    assert [mode.label for mode in static] == ["static:2", "static:3", "static:4", "static:6"]
    with pytest.raises(ConfigError, match="range is empty"):
        parse_modes("static:4..2")
    with pytest.raises(ConfigError, match="named twice"):
        parse_modes("static:1..3,static:2")
    with pytest.raises(ConfigError, match="number of nodes alone"):
        parse_modes("tree:12:5")


def test_every_mode_runs_under_every_driver() -> None:
    modes = parse_modes("plain,adaptive,transformers", ("plain", "overlapped"))
    assert [mode.label for mode in modes] == ["plain@plain", "plain@overlapped", "adaptive@plain", "adaptive@overlapped", "transformers"]
    assert [mode.driver for mode in modes] == ["plain", "overlapped", "plain", "overlapped", ""]


@pytest.mark.parametrize("text", ["static", "fast", "plain:3", "static:0", ""])
def test_bad_modes(text: str) -> None:
    with pytest.raises(ConfigError, match="use plain, static:K"):
        parse_mode(text)


def test_a_mode_named_twice() -> None:
    with pytest.raises(ConfigError, match="named twice"):
        parse_modes("plain,off")


def test_rotation_lets_every_mode_begin() -> None:
    modes = parse_modes("plain,static:3,adaptive")
    orders = [rotated(modes, repeat) for repeat in range(4)]
    assert [order[0].name for order in orders] == ["plain", "static", "adaptive", "plain"]
    assert all(sorted(order, key=str) == sorted(modes, key=str) for order in orders)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table([Column("name", 6, is_text=True), Column("tok/s", 8)])
    table.row("a", 12.25)
    table.row("b", 12345.6)
    table.row("c", None)
    assert capsys.readouterr().out.splitlines() == [
        "name       tok/s",
        "------  --------",
        "a          12.25",
        "b         12,346",
        "c              -",
    ]
    with pytest.raises(ValueError, match="3 cells for 2"):
        table.row(1, 2, 3)


def test_machine_line() -> None:
    assert machine.describe_machine() == f"{machine.cpu_model()}, {machine.usable_cores()} cores"
    assert "torch 2." in machine.describe_machine("bfloat16")
    assert "bfloat16" in machine.describe_machine("bfloat16")


def test_commit_of_checkout_and_of_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    assert machine.source_commit()
    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.delenv("DSPARK_COMMIT", raising=False)
    assert machine.source_commit() == __version__
    monkeypatch.setenv("DSPARK_COMMIT", "abc1234")
    assert machine.source_commit() == "abc1234"
