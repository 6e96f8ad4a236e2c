"""Answers on disk: compact, whole or absent, and never mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.full_disk import files_of_at_most
from safetensors.numpy import load_file

from dspark.errors import ConfigError
from dspark.training import files
from dspark.training.shards import Sample, check_manifest, read_corpus, shard_path, text_digest, update_manifest, write_shard

ONE, TWO, THREE = Sample([1, 2], [3, 4, 5], 0.0, 11), Sample([6], [7], 1.0, 12), Sample([8, 9, 10], [11, 12], 0.5, -13)


def test_shards_are_read_as_one_corpus(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, [ONE, TWO], 300)
    write_shard(tmp_path, 2, [THREE], 300)
    corpus = read_corpus(tmp_path)
    assert [corpus.sample(i).tolist() for i in range(len(corpus))] == [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11, 12]]
    assert corpus.prompt_lens.tolist() == [2, 1, 3]
    assert corpus.temperatures.tolist() == [0.0, 1.0, 0.5]
    assert corpus.digests.tolist() == [11, 12, -13]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_take_two_bytes_where_they_can(tmp_path: Path, vocab_size: int, dtype: Any) -> None:
    write_shard(tmp_path, 0, [Sample([vocab_size - 1], [0], 0.0, 0)], vocab_size)
    assert load_file(shard_path(tmp_path, 0))["tokens"].dtype == dtype
    assert read_corpus(tmp_path).sample(0).tolist() == [vocab_size - 1, 0]


def test_an_empty_shard_is_no_error_but_an_empty_corpus_is(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, [], 300)
    with pytest.raises(ConfigError, match="holds no samples"):
        read_corpus(tmp_path)
    write_shard(tmp_path, 1, [ONE], 300)
    assert len(read_corpus(tmp_path)) == 1


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, [ONE], 300)
    shard_path(tmp_path, 1).write_bytes(shard_path(tmp_path, 0).read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"shard-00001\.safetensors cannot be read"):
        read_corpus(tmp_path)


def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path, 0, [ONE], 300)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot write .*shard-00001.*No space left on device"):
        write_shard(tmp_path, 1, [TWO], 300)
    with pytest.raises(ConfigError, match="No space left"):
        write_shard(tmp_path, 0, [TWO], 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-00000.safetensors"]
    assert read_corpus(tmp_path).sample(0).tolist() == [1, 2, 3, 4, 5]


def test_a_disk_that_fills_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    """safetensors raises an error of its own."""
    write_shard(tmp_path, 0, [ONE], 300)
    with files_of_at_most(4096), pytest.raises(ConfigError, match=r"cannot write .*shard-00001.*File too large"):
        write_shard(tmp_path, 1, [Sample([1] * 4000, [2] * 4000, 0.0, 5)], 300)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]


def test_what_a_killed_process_left_is_not_read(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, [ONE], 300)
    (tmp_path / ".shard-00001.safetensors.making").write_bytes(b"half")
    assert len(read_corpus(tmp_path)) == 1


def test_manifests_refuse_to_mix_answers(tmp_path: Path) -> None:
    check_manifest(tmp_path, {"model": "a", "settings": {"top_p": 0.9}})
    update_manifest(tmp_path, {"num_samples": 3})
    check_manifest(tmp_path, {"model": "a", "settings": {"top_p": 0.9}})
    assert files.read_json(tmp_path / "manifest.json") == {
        "model": "a", "settings": {"top_p": 0.9}, "num_samples": 3, "num_tokens": 0, "num_shards": 0,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"settings was .*0.9.*, is .*0.8"):
        check_manifest(tmp_path, {"model": "a", "settings": {"top_p": 0.8}})
    (tmp_path / "manifest.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        check_manifest(tmp_path, {"model": "a"})


def test_digests_ignore_case_and_spacing() -> None:
    assert text_digest("Hello  World\n") == text_digest("hello world") != text_digest("hello worlds")
