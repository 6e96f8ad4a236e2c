"""``dspark train``: every stage on a tiny target, and what is wrong with the input is said without a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny_model import save_tiny_model

from dspark.cli import main

SETTINGS = """
model: {model}
out: {out}
device: cpu
dtype: float32
synthesize: {{num_prompts: 60, wave_size: 20, generator: dense, max_tokens: 24, min_tokens: 2, min_prompt_chars: 1, temperatures: [0.0]}}
drafter: {{num_taps: 2, block_size: 3, num_layers: 1, markov_rank: 8}}
trainer: {{max_steps: 3, batch_tokens: 512, anchors: 8, held_out: 8, log_every: 1, save_every_s: 0}}
calibrate: {{max_tokens: 40, min_rounds: 20}}
evaluate: {{limit: 2, max_tokens: 6, temperatures: [0.0], prompts: {prompts}}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "prompts").mkdir()
    (folder / "prompts" / "few.jsonl").write_text('{"turns": ["One?"]}\n{"turns": ["Two?"]}\n')
    save_tiny_model(folder / "model")
    text = SETTINGS.format(model=folder / "model", out=folder / "run", prompts=folder / "prompts")
    (folder / "train.yaml").write_text(text)
    return folder / "train.yaml"


def run(stage: str, config: Path, *more: str) -> int:
    return main(["train", stage, "--config", str(config), *more])


def test_from_a_model_to_its_calibrated_drafter(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("synthesize", config, "--max-seconds", "0") == 3, "more to do"
    assert run("synthesize", config) == 0
    assert run("drafter", config, "--max-seconds", "0") == 3
    assert run("export", config) == 0
    out = config.parent / "run"
    first = (out / "drafter" / "model.safetensors").read_bytes()
    assert run("drafter", config) == 0
    assert (out / "drafter" / "model.safetensors").read_bytes() != first
    assert run("calibrate", config) == 0
    assert json.loads((out / "drafter" / "calibration.json").read_text())["num_rounds"] > 20
    assert run("evaluate", config, "--drafter", "ngram", "--limit", "1") == 0
    shown = capsys.readouterr().err
    assert "mean ECE of the head" in shown
    assert "| drafter | T | few |" in shown
    assert main(["generate", "--model", str(config.parent / "model"), "--drafter", str(out / "drafter"), "--max-tokens", "4", "hi"]) == 0


def test_a_kind_at_a_time_makes_one_table(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("synthesize", config)
    out = ["--set", f"data_folder={config.parent / 'run' / 'data'}", "--set", f"out={config.parent / 'kinds'}"]
    assert run("compare", config, *out, "--kinds", "eagle3", "--limit", "1") == 0
    assert (
        run("compare", config, *out, "--kinds", "dflash", "--limit", "1", "--rows", str(config.parent / "kinds" / "comparison.json")) == 0
    )
    table = (config.parent / "kinds" / "comparison.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == ["dflash", "ngram", "eagle3"]
    assert not (config.parent / "kinds" / "compare" / "dspark").exists()
    assert "ngram T=0 was measured before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("drafter", ["--set", "out=elsewhere"], "holds no samples; run dspark train synthesize first"),
        ("drafter", ["--num-workers", "0"], "--num-workers must be at least 1"),
        ("export", ["--set", "out=elsewhere"], "holds no checkpoint; run dspark train drafter first"),
        ("calibrate", ["--set", "out=elsewhere"], "holds no drafter; run dspark train drafter first"),
        ("evaluate", ["--limit", "0"], "--limit and --max-tokens must be at least 1"),
        ("compare", ["--kinds", "eagle3,eagle4"], "--kinds: 'eagle4' is no kind of drafter; there are dspark, dflash, eagle3"),
        ("drafter", ["--set", "trainer.lrr=1"], "trainer.lrr"),
        ("drafter", ["--set", "drafter.taps=[0, 7]"], "drafter.taps: 7 is no layer of this target"),
        ("synthesize", ["--set", "synthesize.prompts=absent.jsonl", "--set", "out=elsewhere"], "absent.jsonl cannot be read"),
        ("synthesize", ["--set", "device=cuda:99"], "device 'cuda:99'"),
    ],
)
def test_what_is_wrong_is_said(
    config: Path, stage: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    shutil.rmtree("elsewhere", ignore_errors=True)
    run("synthesize", config)
    capsys.readouterr()
    assert run(stage, config, *more) == 2
    assert message in capsys.readouterr().err
