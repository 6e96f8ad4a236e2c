"""One server for all end-to-end tests: two verifiers of a tiny model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.servers import Server, served
from helpers.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_len=2048)
    settings = ["--dtype", "float32", "--drafter", "ngram", "--kv-tokens", "65536", "--no-profile", "--num-verifiers", "2"]
    with served(tmp_path_factory.mktemp("server") / "log", str(folder), *settings, "--max-num-seqs", "32", "--drain-s", "30") as running:
        yield running
