"""Evaluation and comparison: counts by hand, tables, and work that is not done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import save_tiny_model
from helpers.training_runs import BLOCK, make_run, run_config

from dspark.errors import ConfigError
from dspark.training import compare as compare_room
from dspark.training import evaluate as room
from dspark.training.compare import compare, run_of
from dspark.training.config import TrainConfig
from dspark.training.evaluate import acceptance, evaluate, positions_table, table, tokens_a_round
from dspark.training.served import Record, Round
from dspark.training.trainer import train

SETS = {"sums": ["What is 1 + 1?", "What is 2 + 3?"], "words": ["Say hello."]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = make_run(tmp_path_factory.mktemp("evaluate"))
    (out / "prompts").mkdir()
    for name, texts in SETS.items():
        (out / "prompts" / f"{name}.jsonl").write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in texts))
    return out


def measured(config: TrainConfig, folder: Path, **changes: Any) -> TrainConfig:
    update = {"prompts": folder / "prompts", "max_tokens": 12} | changes
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=update)})


def test_acceptance_by_hand() -> None:
    rounds = [Round((), (), drafted, accepted, accepted + 1) for drafted, accepted in ((3, 3), (3, 1), (2, 0), (0, 0))]
    length, rates = acceptance([Record([], rounds[:2]), Record([], rounds[2:])], 3)
    assert length == pytest.approx(1 + 4 / 3), "rounds without a draft do not count"
    assert tokens_a_round([Record([], rounds[:2]), Record([], rounds[2:])]) == pytest.approx((2 + 1) / 2)
    assert rates == pytest.approx([2 / 3, 1 / 2, 1.0])


def lengths(acceptance_length: float, mean: float) -> dict[str, float]:
    return {"acceptance_length": acceptance_length, "tokens_a_round": mean}


def test_the_table_has_a_column_for_each_set() -> None:
    rows = [{"drafter": "runs/dspark/drafter", "temperature": 0.0, "set": name, **lengths(2.0, 1.98)} for name in ("a", "b")]
    rows.append({"drafter": "ngram", "temperature": 1.0, "set": "b", **lengths(3.0, 1.234)})
    assert table(rows).splitlines()[2:] == ["| dspark | 0 | 2.00 | 2.00 |", "| ngram | 1 | - | 3.00 (1.23) |"]


def test_every_position_has_a_column() -> None:
    rows = [{"drafter": "runs/dspark/drafter", "temperature": 0.0, "set": "a", "acceptance": [0.5, 0.25]}]
    rows.append({"drafter": "ngram", "temperature": 1.0, "set": "b", "acceptance": [1.0, 0.0, 0.125]})
    assert positions_table(rows).splitlines() == [
        "| drafter | T | set | 1 | 2 | 3 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| dspark | 0 | a | 0.50 | 0.25 | - |",
        "| ngram | 1 | b | 1.00 | 0.00 | 0.12 |",
    ]


def test_every_drafter_set_and_temperature_is_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = measured(run_config(folder, "evaluated", max_steps=1), folder)
    assert train(config, lambda _: None)
    said: list[str] = []
    rows = evaluate(config, said.append, ["ngram"])
    own = str(config.drafter_folder)
    keys = [(row["drafter"], row["temperature"], row["set"]) for row in rows]
    assert keys == [(name, heat, one) for name in (own, "ngram") for heat in (0.0, 1.0) for one in SETS]
    for row in rows:
        assert row["num_prompts"] == len(SETS[row["set"]])
        assert row["num_prompts"] < row["num_tokens"] <= 12 * row["num_prompts"]
        assert 1.0 <= row["acceptance_length"] <= BLOCK + 1 or row["drafter"] == "ngram"
    path = config.out / room.RESULTS
    assert json.loads(path.read_text()) == rows
    assert path.with_suffix(".md").read_text().strip() == said[-1] == f"{table(rows)}\n\n{positions_table(rows)}"

    def refuse(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(room, "drafting_engine", refuse)
    assert evaluate(config, said.append, ["ngram"]) == rows
    with pytest.raises(AssertionError, match="measured again"):
        evaluate(measured(config, folder, max_tokens=13), said.append)
    weights = config.drafter_folder / "config.json"
    weights.write_text(weights.read_text() + " ")
    with pytest.raises(AssertionError, match="measured again"):
        evaluate(config, said.append)


def test_what_a_cut_run_measured_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = measured(run_config(folder, "cut"), folder, temperatures=(0.0, 0.5, 1.0))
    measure, calls = room._measure, []

    def counting(*args: Any) -> Any:
        calls.append(args[1][0].heat)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(room, "_measure", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, lambda _: None, ["ngram"])
    assert len(json.loads((config.out / room.RESULTS).read_text())) == len(SETS)
    assert len(evaluate(config, lambda _: None, ["ngram"])) == 3 * len(SETS)
    assert calls == [0.0, 0.5, 0.5, 1.0]


def test_results_of_parts_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other calls and other runs measured is shown beside, and lost by none."""
    parts = [measured(run_config(folder, name), folder, temperatures=(0.0,)) for name in ("part-one", "part-two")]
    one = evaluate(measured(parts[0], folder, temperatures=(0.0,), sets=("sums",)), lambda _: None, ["ngram"])
    two = evaluate(measured(parts[0], folder, temperatures=(0.0,), sets=("words",)), lambda _: None, ["ngram"])
    path = parts[0].out / room.RESULTS
    assert json.loads(path.read_text()) == one + two
    monkeypatch.setattr(room, "load_target", None)
    said: list[str] = []
    assert evaluate(parts[1], said.append, others=[path, path]) == one + two
    assert said[-1].splitlines()[2].startswith("| ngram | 0 |")
    shorter = measured(parts[0], folder, temperatures=(0.0,), sets=("words",), max_tokens=5)
    monkeypatch.undo()
    three = evaluate(shorter, lambda _: None, ["ngram"])
    assert json.loads(path.read_text()) == one + three, "one result of a drafter, temperature and set"
    path.write_text('[{"drafter": "ngram"}]')
    with pytest.raises(ConfigError, match=r"evaluation\.json holds no results"):
        evaluate(parts[1], said.append, others=[path])


def test_what_cannot_be_measured_is_said(folder: Path) -> None:
    config = run_config(folder, "nothing")
    with pytest.raises(ConfigError, match="run dspark train drafter first"):
        evaluate(config, lambda _: None)
    with pytest.raises(ConfigError, match=r"has no prompt sets"):
        evaluate(measured(config, folder, prompts=folder / "model"), lambda _: None, ["ngram"])
    with pytest.raises(ConfigError, match=r"absent\.jsonl cannot be read"):
        evaluate(measured(config, folder, sets=("absent",)), lambda _: None, ["ngram"])
    bare = save_tiny_model(folder / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="the target has no chat template"):
        evaluate(measured(config, folder).model_copy(update={"model": str(bare)}), lambda _: None, ["ngram"])
    (config.out / room.RESULTS).write_text("[")
    with pytest.raises(ConfigError, match="delete it and measure again"):
        evaluate(measured(config, folder), lambda _: None, ["ngram"])


def test_kinds_get_the_same_data_time_and_width(folder: Path) -> None:
    config = run_config(folder, "kinds", {"num_layers": 2, "head": "rnn", "num_heads": 2})
    config = config.model_copy(update={"compare": config.compare.model_copy(update={"train_seconds": 7.0})})
    runs = {kind: run_of(config, kind) for kind in ("dspark", "dflash", "eagle3")}
    assert {run.data for run in runs.values()} == {config.data}
    assert {(run.trainer.train_seconds, run.trainer.max_steps) for run in runs.values()} == {(7.0, None)}
    assert {run.drafter.num_heads for run in runs.values()} == {2}
    assert {kind: run.drafter.num_layers for kind, run in runs.items()} == {"dspark": 2, "dflash": 2, "eagle3": None}
    assert [run.drafter.kind for run in runs.values()] == list(runs)
    assert len({run.out for run in runs.values()}) == 3


def test_kinds_are_trained_and_measured_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = measured(run_config(folder, "compared", max_steps=1), folder, temperatures=(0.0,), sets=("words",))
    config = config.model_copy(update={"compare": config.compare.model_copy(update={"synthesize_seconds": 1.0})})
    rows = compare(config, lambda _: None, ())
    assert [Path(row["drafter"]).parent.name or row["drafter"] for row in rows] == ["dspark", "dflash", "eagle3", "ngram"]
    assert (config.out / compare_room.RESULTS).with_suffix(".md").read_text().count("\n") == 2 + 4 + 1 + 2 + 4
    monkeypatch.setattr(compare_room, "train", None)
    assert compare(config, lambda _: None, ()) == rows
