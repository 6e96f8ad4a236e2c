"""The loop: stopped and gone on it ends where an undisturbed run ends, and says what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.full_disk import files_of_at_most
from helpers.training_runs import BLOCK, make_run, run_config
from safetensors.torch import load_file
from torch import Tensor

from dspark.errors import ConfigError
from dspark.training import metrics as metrics_module
from dspark.training import trainer as trainer_module
from dspark.training.config import TrainConfig, TrainerConfig
from dspark.training.export import export
from dspark.training.metrics import METRICS, Metrics
from dspark.training.target import load_target
from dspark.training.trainer import Trainer, compiles, train
from dspark.workers.drafter.dialects import load_drafter

SHORT = {"max_steps": 6, "log_every": 1, "eval_every": 4, "batch_tokens": 512, "anchors": 8, "save_every_s": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"))


def weights(config: TrainConfig) -> dict[str, Tensor]:
    return load_file(config.drafter_folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lines(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.out / METRICS).read_text().splitlines()]


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_a_run_that_was_stopped_ends_where_another_ends(folder: Path, kind: str) -> None:
    whole = run_config(folder, f"whole-{kind}", {"kind": kind}, **SHORT)
    assert train(whole, lambda _: None)
    stopped = run_config(folder, f"stopped-{kind}", {"kind": kind}, **SHORT)
    said: list[str] = []
    while not train(stopped, said.append, max_seconds=0.0):
        assert not stopped.drafter_folder.exists()
    assert sum("run again to go on" in line for line in said) == 5, "one step a call"
    assert same(weights(whole), weights(stopped))
    assert [line["loss"] for line in lines(whole)[:6]] == [line["loss"] for line in lines(stopped)[:6]]


def test_metrics_say_what_happened(folder: Path) -> None:
    config = run_config(folder, "metrics", **SHORT)
    assert train(config, lambda _: None)
    found = lines(config)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6, 6]
    names = {"step", "seconds", "tokens", "loss", "cross_entropy", "law", "confidence", "acceptance_length", "lr"}
    assert set(found[0]) == names
    assert {"acceptance_length", "greedy_length", "acceptance_1", f"acceptance_{BLOCK}"} <= set(found[3]["held_out"])
    assert found[-1]["held_out"]
    assert found[0]["loss"] > found[5]["loss"]
    assert (config.out / "metrics.png").stat().st_size > 1000


def test_tensorboard_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0, 0))

    import sys
    import types

    monkeypatch.setattr(metrics_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))  # type: ignore[arg-type]
    report = Metrics(tmp_path)
    report.log({"step": 3, "loss": 1.5, "held_out": {"greedy_length": 2.0}})
    report.close()
    assert written == [("loss", 1.5, 3), ("held_out/greedy_length", 2.0, 3), ("closed", 0, 0)]
    assert json.loads((tmp_path / METRICS).read_text()) == {"step": 3, "loss": 1.5, "held_out": {"greedy_length": 2.0}}


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*metrics\.jsonl"):
        Metrics(tmp_path / "absent").log({"step": 1})


def test_kept_features_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    run = trainer_module.FeatureReader.run

    def counted(reader: Any, tokens: Tensor) -> Any:
        calls.append(len(tokens))
        return run(reader, tokens)

    monkeypatch.setattr(trainer_module.FeatureReader, "run", counted)
    plain, cached, bounded = (
        run_config(folder, name, **SHORT, feature_cache_gib=gib)
        for name, gib in (("plain", 0.0), ("cached", 1.0), ("bounded", 60_000 / 2**30))
    )
    rows = []
    for config in (plain, cached, bounded):
        calls.clear()
        assert train(config, lambda _: None)
        rows.append(sum(calls))
    for other in (cached, bounded):
        for name, value in weights(plain).items():
            torch.testing.assert_close(weights(other)[name], value, atol=1e-5, rtol=1e-4)
    assert rows[1] < rows[2] < rows[0], "what is kept is not computed again, and no more is kept than fits"


def test_a_checkpoint_of_other_settings_is_refused(folder: Path) -> None:
    config = run_config(folder, "settings", **SHORT)
    assert not train(config, lambda _: None, max_seconds=0.0)
    other = run_config(folder, "settings", {"block_size": 3}, **SHORT)
    with pytest.raises(ConfigError, match="other settings or data"):
        train(other, lambda _: None)


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        ({"taps": [0, 2]}, r"drafter\.taps: 2 is no layer of this target; it has layers 0 to 1, and -1"),
        ({"taps": [-2]}, r"drafter\.taps: -2"),
        ({"num_taps": 3}, r"drafter\.num_taps 3 is more than the target's 2 layers"),
        ({"mask_token_id": 10**6}, r"drafter\.mask_token_id"),
        ({"num_heads": 4, "num_kv_heads": 3}, "no multiple"),
        ({"style": "gemma4"}, r"drafter\.style: gemma4 .* this one is llama"),
    ],
)
def test_settings_that_do_not_fit_the_target(folder: Path, drafter: dict[str, Any], message: str) -> None:
    config = run_config(folder, "wrong", drafter, **SHORT)
    with pytest.raises(ConfigError, match=message):
        train(config, lambda _: None)


def test_a_full_disk_leaves_the_drafter_before(folder: Path) -> None:
    config = run_config(folder, "full", **(SHORT | {"max_steps": 1}))
    assert train(config, lambda _: None)
    before = weights(config)
    longer = config.model_copy(update={"trainer": config.trainer.model_copy(update={"max_steps": 2})})
    assert train(longer, lambda _: None)
    assert not same(before, weights(config))
    before = weights(config)
    with files_of_at_most(4096), pytest.raises(ConfigError, match=r"cannot write .*drafter.*File too large"):
        export(config, lambda _: None)
    assert same(before, weights(config))
    assert not [path.name for path in config.out.iterdir() if path.name.startswith(".")]


def test_without_data_there_is_nothing_to_train_on(folder: Path) -> None:
    config = run_config(folder, "no-data", **SHORT).model_copy(update={"data_folder": folder / "absent"})
    with pytest.raises(ConfigError, match="holds no samples; run dspark train synthesize first"):
        train(config, lambda _: None)


def test_the_target_gets_its_attention_back_and_its_weights_stay(folder: Path) -> None:
    config = run_config(folder, "target", **SHORT)
    target, tokenizer = load_target(config)
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    assert Trainer(config, target, tokenizer, lambda _: None).run()
    assert target.model.config._attn_implementation == "dspark_paged"
    assert same(before, dict(target.model.state_dict()))
    assert (
        load_drafter(config.drafter_folder, trainer_module.target_head(target), torch.float32, torch.device("cpu")).config.block_size
        == BLOCK
    )


def test_the_loss_is_compiled_where_that_pays() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiles(TrainerConfig(), gpu)
    assert not compiles(TrainerConfig(), cpu)
    assert not compiles(TrainerConfig(train_seconds=75.0), gpu)
    assert compiles(TrainerConfig(train_seconds=600.0), gpu)
    assert compiles(TrainerConfig(compile=True), cpu)
    assert not compiles(TrainerConfig(compile=False), gpu)
