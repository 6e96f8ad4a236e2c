"""`dspark bench vllm` with a stand-in for vLLM: what is asked of it, and what becomes of its answers."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny_model import save_tiny_model

from dspark.bench.cli import main
from dspark.errors import ConfigError

ROUND = 3  # tokens a round of the stand-in that speculates: two of four drafts are accepted


class StandIn:
    """Answers as many tokens as are asked for; counts rounds if it speculates."""

    made: list[StandIn]

    def __init__(self, model: str, **settings: Any) -> None:
        self.model, self.settings = model, settings
        self.groups: list[int] = []
        self.params: list[Any] = []
        self.rounds = 0
        StandIn.made.append(self)

    def generate(self, work: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        assert all(prompt["prompt_token_ids"] for prompt in work)
        self.groups.append(len(work))
        self.params.append(params)
        if "speculative_config" in self.settings:
            self.rounds += len(work) * params.max_tokens // ROUND
        stats = SimpleNamespace(first_token_latency=0.5, first_token_ts=100.0, last_token_ts=102.0)
        answer = SimpleNamespace(token_ids=[7] * params.max_tokens)
        return [SimpleNamespace(outputs=[answer], metrics=stats) for _ in work]

    def get_metrics(self) -> list[Any]:
        values = {"num_drafts": self.rounds, "num_draft_tokens": 4 * self.rounds, "num_accepted_tokens": 2 * self.rounds}
        return [SimpleNamespace(name=f"vllm:spec_decode_{name}", value=value) for name, value in values.items()]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm")
    module.LLM = StandIn  # type: ignore[attr-defined]
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    StandIn.made = []
    version = importlib.metadata.version
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.26.0+cu130" if name == "vllm" else version(name))


def measure(tmp_path: Path, *flags: str) -> list[dict[str, Any]]:
    (tmp_path / "tiny.jsonl").write_text('{"turns": ["one"]}\n{"turns": ["two"]}\n')
    out = tmp_path / "out.jsonl"
    model = save_tiny_model(tmp_path / "model")
    command = ["vllm", "--model", str(model), "--prompts", str(tmp_path), "--sets", "tiny", "--max-tokens", "30", "--json", str(out)]
    assert main([*command, "--dtype", "float32", *flags]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.usefixtures("vllm")
def test_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = measure(tmp_path, "--concurrency", "2", "--requests", "4", "--repeats", "3", "--ignore-eos")
    (engine,) = StandIn.made
    assert engine.groups == [2] + [2, 2] * 3  # a warm-up, then every repeat in groups as large as the load
    assert all(params.ignore_eos and params.temperature == 0 for params in engine.params[1:])
    assert (engine.settings["max_num_seqs"], engine.settings["enable_prefix_caching"]) == (2, False)
    assert "speculative_config" not in engine.settings
    assert (record["engine"], record["mode"], record["draft_len"], record["output_tokens"]) == ("vllm-0.26.0", "plain", 0, 120)
    assert record["accepted_length"] == 1.0
    assert record["ttft_p50_ms"] == 500
    assert record["tpot_p50_ms"] == pytest.approx(2000 / 29, abs=0.01)
    assert "vllm-0.26.0 plain" in capsys.readouterr().out


@pytest.mark.usefixtures("vllm")
def test_with_a_drafter(tmp_path: Path) -> None:
    (record,) = measure(tmp_path, "--concurrency", "1", "--drafter", "/some/drafter", "--draft-len", "4")
    (engine,) = StandIn.made
    assert engine.settings["speculative_config"] == {"method": "dspark", "model": "/some/drafter", "num_speculative_tokens": 4}
    assert (record["mode"], record["draft_len"], record["drafter"]) == ("static", 4, "/some/drafter")
    assert record["accepted_length"] == 3.0
    assert record["acceptance_rate"] == 0.5


def test_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="needs vLLM"):
        measure(tmp_path, "--concurrency", "1")
