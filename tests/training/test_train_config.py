"""Settings of training: YAML and TOML say the same, wrong ones are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark.errors import ConfigError
from dspark.training.config import TrainConfig, read_config

YAML = "out: runs/x\ndrafter:\n  kind: dflash\n  block_size: 5\ntrainer:\n  lr: 1.0e-3\n"
TOML = 'out = "runs/x"\n[drafter]\nkind = "dflash"\nblock_size = 5\n[trainer]\nlr = 1.0e-3\n'


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    one, other = (read_config(write(tmp_path, name, text), {}) for name, text in (("a.yaml", YAML), ("a.toml", TOML)))
    assert one == other
    assert (one.drafter.kind, one.drafter.block_size, one.trainer.lr) == ("dflash", 5, 1e-3)
    assert one.data == Path("runs/x/data")


def test_the_command_line_wins(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, "a.yaml", YAML), {"trainer.lr": 2e-3, "data_folder": "elsewhere", "compare.train_seconds": 60})
    assert config.trainer.lr == 2e-3
    assert config.data == Path("elsewhere")
    assert config.compare.train_seconds == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: x\ndrafter:\n  blok_size: 5\n", "block_size"),
        ("out: x\ntrainers: {}\n", "trainer"),
        ("drafter: {}\n", "out"),
        ("out: x\ntrainer:\n  lr: -1\n", r"trainer\.lr"),
        ("out: x\nsynthesize:\n  temperatures: [-1]\n", "temperatures"),
        ("out: x\ndrafter:\n  kind: dflash\n  head: rnn\n", "no sequential head"),
        ("out: x\ndrafter:\n  kind: dflash\n  confidence: true\n", "no confidence head"),
        ("out: x\ndrafter:\n  kind: eagle3\n  num_layers: 2\n", "one layer"),
        ("out: x\ndrafter:\n  kind: eagle3\n  window: 64\n", "window"),
        ("out: x\ndrafter:\n  kind: dflash\n  style: gemma4\n", "gemma4"),
        ("out: x\ncompare:\n  kinds: []\n", "kinds"),
        ("out: [", "a.yaml"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, "a.yaml", text), {})


def test_a_section_that_is_a_value_cannot_be_overridden_into(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trainer must hold keys"):
        read_config(write(tmp_path, "a.yaml", "out: x\ntrainer: 5\n"), {"trainer.lr": 1e-3})


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
def test_every_kind_is_valid_by_itself(kind: str) -> None:
    assert TrainConfig.model_validate({"out": "x", "drafter": {"kind": kind}}).drafter.kind == kind
