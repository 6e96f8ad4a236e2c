"""Making data: whole waves, answers of the target itself, and clear refusals of what cannot be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_model import save_tiny_model
from transformers import AutoTokenizer

from dspark.errors import ConfigError
from dspark.training import synthesize as room
from dspark.training.config import TrainConfig
from dspark.training.dense import DenseGenerator
from dspark.training.prompts import BUILT_IN, Template, read_prompts
from dspark.training.shards import MANIFEST, Corpus, read_corpus, shard_path
from dspark.training.synthesize import synthesize
from dspark.training.target import load_target

QUESTIONS = [f"Question {number}: what comes after {number * number}?" for number in range(10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("synthesize") / "model")


def config_of(model: Path, out: Path, **settings: Any) -> TrainConfig:
    values = {"wave_size": 4, "num_prompts": 10, "max_tokens": 12, "min_tokens": 2, "temperatures": [0.0], "generator": "engine"} | settings
    return TrainConfig.model_validate({"model": str(model), "out": out, "device": "cpu", "dtype": "float32", "synthesize": values})


def prompts_file(path: Path, texts: list[str] | None = None) -> Path:
    path.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in texts or QUESTIONS))
    return path


def same(one: Corpus, other: Corpus) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "starts", "prompt_lens", "digests"))


@pytest.fixture(scope="module")
def answered(model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    out = tmp_path_factory.mktemp("answered")
    config = config_of(model, out, prompts=prompts_file(out / "p.jsonl"))
    assert synthesize(config, lambda _: None)
    return config


def test_answers_are_the_targets_own(answered: TrainConfig) -> None:
    corpus = read_corpus(answered.data)
    assert len(corpus) == len(QUESTIONS)
    target, tokenizer = load_target(answered)
    target.model.set_attn_implementation("sdpa")
    for index, prompt in enumerate(Template.of(tokenizer, target.eos_ids).answer_prompts(QUESTIONS)):
        sample = corpus.sample(index).tolist()
        length = int(corpus.prompt_lens[index])
        assert sample[:length] == prompt
        with torch.no_grad():
            best = target.model(torch.tensor([sample]), use_cache=False).logits[0].argmax(-1).tolist()
        assert best[length - 1 : -1] == sample[length:]


def test_the_manifest_says_whose_answers_they_are(answered: TrainConfig, model: Path) -> None:
    manifest = json.loads((answered.data / MANIFEST).read_text())
    corpus = read_corpus(answered.data)
    counts = {"num_samples": 10, "num_shards": 3, "num_tokens": len(corpus.tokens)}
    assert {name: manifest[name] for name in counts} == counts
    assert manifest["num_answer_tokens"] == len(corpus.tokens) - int(corpus.prompt_lens.sum())
    assert manifest["model"].startswith("LlamaForCausalLM-")
    assert manifest["settings"]["temperatures"] == [0.0]
    with pytest.raises(ConfigError, match=r"settings was .* is"):
        synthesize(answered.model_copy(update={"synthesize": answered.synthesize.model_copy(update={"top_p": 0.5})}), lambda _: None)


def test_a_stopped_run_goes_on_with_the_next_wave(answered: TrainConfig, model: Path, tmp_path: Path) -> None:
    config = config_of(model, tmp_path, prompts=answered.synthesize.prompts)
    said: list[str] = []
    assert [synthesize(config, said.append, max_seconds=0.0) for _ in range(3)] == [False, False, True]
    assert [line for line in said if "already" in line] == ["1 of 3 shards are there already", "2 of 3 shards are there already"]
    assert same(read_corpus(config.data), read_corpus(answered.data))


def test_waves_that_are_there_are_not_made_again(
    answered: TrainConfig, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost shard is made again as it was; the others are left alone."""
    config = config_of(model, tmp_path, prompts=answered.synthesize.prompts)
    made: list[int] = []
    make = room._Maker.make

    def counting(self: Any, wave: room.Wave) -> Any:
        made.append(wave.index)
        if len(made) == 2:
            raise KeyboardInterrupt
        return make(self, wave)

    monkeypatch.setattr(room._Maker, "make", counting)
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, lambda _: None)
    assert shard_path(config.data, 0).exists()
    assert not shard_path(config.data, 1).exists()
    assert synthesize(config, lambda _: None)
    assert made == [0, 1, 1, 2]
    assert same(read_corpus(config.data), read_corpus(answered.data))


def test_the_target_writes_prompts_itself(model: Path, tmp_path: Path) -> None:
    """Both turns come from the model, of an empty or a begun user turn; runs of the same seed write the same."""
    openings = [{"texts": [""]}, {"texts": ["Why", "How"], "ending": " Say it in short.", "weight": 3}]
    settings = {
        "num_prompts": 24,
        "wave_size": 24,
        "openings": openings,
        "temperatures": [1.0],
        "min_prompt_chars": 1,
        "generator": "dense",
    }
    corpora = []
    for name in ("one", "two"):
        config = config_of(model, tmp_path / name, **settings)
        assert synthesize(config, lambda _: None)
        corpora.append(read_corpus(config.data))
    assert same(*corpora)
    texts = [AutoTokenizer.from_pretrained(model).decode(corpora[0].sample(i)[: corpora[0].prompt_lens[i]]) for i in range(len(corpora[0]))]
    begun = [text for text in texts if text.startswith(("user: Why", "user: How"))]
    assert begun
    assert all("Say it in short.\n" in text for text in begun)
    assert len(set(corpora[0].digests.tolist())) == len(texts)


def test_the_dense_generator_answers_as_the_engine_does(model: Path, answered: TrainConfig, tmp_path: Path) -> None:
    config = config_of(model, tmp_path, prompts=answered.synthesize.prompts, generator="dense")
    assert synthesize(config, lambda _: None)
    assert same(read_corpus(config.data), read_corpus(answered.data))


def test_dense_draws_follow_the_target_law(model: Path) -> None:
    config = config_of(model, model.parent)
    target, _ = load_target(config)
    prompt = list(range(5, 25))
    answers = DenseGenerator(target).generate([prompt] * 2000, [1.0] * 2000, 1, [], seed=3)
    counts = np.bincount([answer[0] for answer in answers], minlength=target.vocab_size)
    target.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        law = target.model(torch.tensor([prompt]), use_cache=False).logits[0, -1].double().softmax(-1).numpy()
    big = law > 0.01
    assert abs(counts[big] / 2000 - law[big]).max() < 5 * np.sqrt(0.25 / 2000)
    assert counts[big].sum() / 2000 == pytest.approx(law[big].sum(), abs=0.05)


def test_whole_laws_only_for_the_dense_generator(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"synthesize\.generator: dense draws from whole laws only"):
        synthesize(config_of(model, tmp_path, generator="dense", top_k=5), lambda _: None)


def test_evaluation_prompts_are_refused(model: Path, tmp_path: Path) -> None:
    """Those of the project, whatever folder they come from, and those of the folders that are named."""
    own = read_prompts(BUILT_IN)[0]
    with pytest.raises(ConfigError, match="prompt 2 is an evaluation prompt"):
        synthesize(config_of(model, tmp_path, prompts=prompts_file(tmp_path / "p.jsonl", [QUESTIONS[0], own])), lambda _: None)
    (tmp_path / "eval").mkdir()
    prompts_file(tmp_path / "eval" / "set.jsonl", [QUESTIONS[3].upper()])
    config = config_of(model, tmp_path, prompts=prompts_file(tmp_path / "q.jsonl"), exclude=[tmp_path / "eval"])
    with pytest.raises(ConfigError, match="prompt 4 is an evaluation prompt"):
        synthesize(config, lambda _: None)
    assert not list(config.data.glob("*.safetensors"))


def test_a_target_without_chat_template_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        synthesize(config_of(model, tmp_path), lambda _: None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"turns": ["What is the capital of Norway?"]}\n{"turns"\n', r"p\.jsonl:2: not JSON"),
        ("\n", "has no prompts"),
        ('{"turns": ["short"]}\n', "has 12 characters"),
    ],
)
def test_files_that_cannot_be_used(model: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        synthesize(config_of(model, tmp_path, prompts=tmp_path / "p.jsonl"), lambda _: None)


def test_a_full_disk_loses_the_wave_only(model: Path, tmp_path: Path, answered: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model, tmp_path, prompts=answered.synthesize.prompts)
    write, written = room.write_shard, []

    def full(*args: Any) -> None:
        if len(written) == 2:
            raise ConfigError("cannot write: No space left on device")
        write(*args)
        written.append(args[1])

    monkeypatch.setattr(room, "write_shard", full)
    with pytest.raises(ConfigError, match="No space left"):
        synthesize(config, lambda _: None)
    assert len(read_corpus(config.data)) == 8
    monkeypatch.setattr(room, "write_shard", write)
    assert synthesize(config, lambda _: None)
    assert same(read_corpus(config.data), read_corpus(answered.data))
