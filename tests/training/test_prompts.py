"""Prompts: files with faults are refused where the fault is, evaluation prompts are refused whatever their disguise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import TEMPLATE
from helpers.toy_tokenizers import byte_level

from dspark.errors import ConfigError
from dspark.training import prompts
from dspark.training.config import SynthesizeConfig
from dspark.training.files import read_json
from dspark.training.known_prompts import NUM_PASSAGES, write_known
from dspark.training.prompts import BUILT_IN, Excluded, Template, read_prompts, usable_prompts

QUESTION = "Tom has three boxes of apples and gives seven of them to his sister on Monday before lunch. How many are left?"
SUFFIX = "Please reason step by step, show all of your work, and put your final answer at the very end."


def jsonl(path: Path, *entries: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(entry if isinstance(entry, str) else json.dumps(entry) + "\n" for entry in entries))
    return path


def turns(text: str) -> dict[str, list[str]]:
    return {"turns": [text]}


def test_files_and_folders_are_read_in_order(tmp_path: Path) -> None:
    jsonl(tmp_path / "p" / "b.jsonl", turns("third"))
    jsonl(tmp_path / "p" / "a.jsonl", turns("first"), "\n", {"turns": ["second", "follow-up"], "id": 7})
    assert read_prompts(tmp_path / "p") == ["first", "second", "third"]
    assert read_prompts(tmp_path / "p" / "b.jsonl") == ["third"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": ["a"\n', r"a\.jsonl:2: not JSON"),
        ('["a"]\n', r"a\.jsonl:2: expected"),
        ('{"turns": []}\n', r"a\.jsonl:2: expected"),
        ('{"turns": ["  "]}\n', r"a\.jsonl:2: expected"),
        ('{"turns": [5]}\n', r"a\.jsonl:2: expected"),
        ('{"prompt": "a"}\n', r"a\.jsonl:2: expected"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompts(jsonl(tmp_path / "p" / "a.jsonl", turns("fine"), line))


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no prompts"):
        read_prompts(jsonl(tmp_path / "p" / "a.jsonl", "\n"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "bytes.jsonl")


def excluded(folder: Path, *texts: str) -> Excluded:
    jsonl(folder / "sets" / "a.jsonl", *map(turns, texts))
    return Excluded.of([folder / "sets"])


@pytest.mark.parametrize(
    "disguise",
    [
        QUESTION,
        "  " + QUESTION.upper().replace(" ", "\n"),
        f"You are a teacher. {QUESTION} {SUFFIX}",
        "Three boxes: " + QUESTION[8:100],
    ],
)
def test_evaluation_prompts_are_refused_in_any_disguise(tmp_path: Path, disguise: str) -> None:
    known = excluded(tmp_path, QUESTION, "Short one?")
    with pytest.raises(ConfigError, match=r"prompt 2 .*may not be trained on"):
        known.refuse(["something else", disguise])
    assert known.has("short  ONE?")


def test_what_evaluation_prompts_share_is_no_passage_of_one(tmp_path: Path) -> None:
    known = excluded(tmp_path, *(f"{name} has a question. {SUFFIX}" for name in ("Ada", "Bo", "Cy")))
    assert not known.has(f"Another text altogether. {SUFFIX}")
    assert known.has(f"Ada has a question. {SUFFIX}")


def test_the_projects_own_sets_are_evaluation_prompts() -> None:
    known = Excluded.of([BUILT_IN])
    assert all(known.has(prompt) for prompt in read_prompts(BUILT_IN))
    assert not known.has("A prompt that nobody evaluates with.")


def test_public_evaluation_sets_are_known_by_their_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{QUESTION} {name} wants to know it as well, and so do I. {SUFFIX}" for name in ("Ada", "Bo", "Cy")]
    jsonl(tmp_path / "sets" / "a.jsonl", *map(turns, texts), turns("Short one?"))
    monkeypatch.setattr(prompts, "KNOWN", tmp_path / "known.json")
    write_known(tmp_path / "sets", prompts.KNOWN)
    assert "apples" not in prompts.KNOWN.read_text()
    known = Excluded.of([])
    assert all(known.has(text) for text in (*texts, "SHORT  one?", f"Answer this: {texts[1]} Thank you!"))
    assert not known.has(f"{QUESTION} {SUFFIX}"), "what all of them share tells none"
    assert len(known.digests) == 4
    assert len(known.passages) == 3 * NUM_PASSAGES


def test_the_sets_that_are_known() -> None:
    found = read_json(prompts.KNOWN)
    assert found["sets"] == {"gsm8k": 1319, "humaneval": 164, "math500": 500, "mbpp": 257, "mt-bench": 80}
    assert len(Excluded.of([]).digests) == 2319, "one is in two sets"


def test_a_folder_of_evaluation_prompts_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"synthesize\.exclude: .*absent does not exist"):
        Excluded.of([tmp_path / "absent"])


def test_usable_prompts_are_new_long_enough_and_allowed(tmp_path: Path) -> None:
    seen: set[int] = set()
    texts = ["a long enough prompt", "A long  enough PROMPT", "short", None, QUESTION, " another long prompt "]
    kept = usable_prompts(texts, SynthesizeConfig(), seen, excluded(tmp_path, QUESTION))
    assert kept == ["a long enough prompt", "another long prompt"]
    assert usable_prompts(kept, SynthesizeConfig(), seen, excluded(tmp_path, QUESTION)) == []


def tokenizer(template: str | None) -> Any:
    made = byte_level()
    made.chat_template = template
    return made


def test_turns_become_ids_by_the_models_template() -> None:
    made = tokenizer(TEMPLATE)
    template = Template.of(made, [2])
    assert template.answer_prompts([]) == []
    (ids,) = template.answer_prompts([" hello "])
    assert made.decode(ids) == "user: hello\nassistant: "
    assert made.decode(template.turn_prompts(["Why"])[0]) == "user: Why"
    assert template.stop_ids[0] == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ messages | length }}", "exactly once"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "exactly once"),
        ("{{ messages[0]['content'] | upper }}", "exactly once|more with a message"),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Template.of(tokenizer(template), [2]).answer_prompts(["hello"])
