"""Acceptance length through the serving engine: prompt sets × drafters × temperatures, every draft verified."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dspark.errors import ConfigError
from dspark.prompting import render_chat
from dspark.sampling import SamplingParams
from dspark.training.config import EvaluateConfig, TrainConfig
from dspark.training.files import write_json, write_text
from dspark.training.prompts import BUILT_IN, read_prompts
from dspark.training.served import Record, drafting_engine, run_requests
from dspark.training.target import fingerprint, load_target, release_memory
from dspark.types import Request
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.targets import Target

Progress = Callable[[str], None]
RESULTS = "evaluation.json"
SPARSE = 0.95  # tokens a round are fewer than the acceptance length by more than the ends of answers explain


@dataclass(frozen=True, slots=True)
class _Cell:
    """One number of the table, to be measured; ``identity`` names everything that it hangs on."""

    drafter: str
    set_name: str
    heat: float
    identity: str


def evaluate(config: TrainConfig, progress: Progress, drafters: Sequence[str] = (), others: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Measure every drafter (ours, then the named ones) on every set; writes ``evaluation.json`` and reports tables."""
    names = [str(config.drafter_folder), *config.evaluate.drafters, *drafters]
    if not (config.drafter_folder / "config.json").is_file():
        if len(names) == 1 and not others:
            raise ConfigError(f"{config.drafter_folder} holds no drafter; run dspark train drafter first")
        names = names[1:]
    return measure(config, names, config.out / RESULTS, progress, others)


def measure(config: TrainConfig, names: Sequence[str], path: Path, progress: Progress, others: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Every drafter on every set at every temperature.

    The results are written to ``path`` as they come, and the tables beside it in Markdown, which show the results in the files
    ``others`` too. What ``path`` has already, of the same drafter, target, prompts and settings, is not measured again. It
    keeps one result of a drafter, temperature and set, those not asked for now included.
    """
    results = _measure_missing(config, names, path, progress) if names else []
    own = {row["identity"] for row in results}
    foreign = {row["identity"]: row for other in others for row in _read_rows(other) if row["identity"] not in own}
    results += foreign.values()
    write_text(path.with_suffix(".md"), f"{table(results)}\n\n{positions_table(results)}\n")
    progress(f"{table(results)}\n\n{positions_table(results)}")
    return results


def _measure_missing(config: TrainConfig, names: Sequence[str], path: Path, progress: Progress) -> list[dict[str, Any]]:
    settings = config.evaluate
    target, tokenizer = load_target(config)
    prompts = _prompt_sets(settings, tokenizer)
    # On a CPU drafters may draw from fewer tokens, so the device is part of what was measured.
    cells = list(_cells(names, prompts, settings, f"{fingerprint(target)} {target.dtype} {target.device.type}"))
    found = _measured_before(path, cells)
    for name in dict.fromkeys(names):
        engine: Engine | None = None
        release_memory()
        for heat in settings.temperatures:
            missing = [cell for cell in cells if (cell.drafter, cell.heat) == (name, heat) and cell.identity not in found]
            if not missing:
                progress(f"{_label(name)} T={heat:g} was measured before")
                continue
            engine = engine or drafting_engine(target, tokenizer, name, settings.max_num_seqs, settings.draft_law_width)
            for row in _measure(engine, missing, prompts, settings, target):
                found[row["identity"]] = row
                progress(_line(row))
            write_json(path, list(found.values()))
    return [found[cell.identity] for cell in cells]


def _cells(names: Sequence[str], prompts: dict[str, list[list[int]]], settings: EvaluateConfig, target: str) -> Iterator[_Cell]:
    for name in dict.fromkeys(names):
        drafter = _drafter_digest(Path(name))
        for heat in settings.temperatures:
            for set_name, ids in prompts.items():
                facts = [target, name, drafter, heat, set_name, ids, settings.max_tokens, settings.draft_law_width]
                yield _Cell(name, set_name, heat, hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest())


def _drafter_digest(folder: Path) -> str:
    """Of a drafter's configuration and weights; empty for what is no folder."""
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors"), *folder.glob("draft_vocabulary.json")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while part := stream.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()


def _measured_before(path: Path, cells: Sequence[_Cell]) -> dict[str, dict[str, Any]]:
    """The rows of ``path`` by identity, without those that are to be replaced."""
    asked = {(cell.drafter, cell.heat, cell.set_name): cell.identity for cell in cells}
    rows = _read_rows(path) if path.exists() else []
    places = [(row["drafter"], row["temperature"], row["set"]) for row in rows]
    return {row["identity"]: row for row, place in zip(rows, places, strict=True) if asked.get(place, row["identity"]) == row["identity"]}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The results in a file; ConfigError if it holds none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; delete it and measure again") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "identity" in row for row in rows):
        raise ConfigError(f"{path} holds no results of dspark train evaluate or compare")
    return rows


def acceptance(records: Sequence[Record], block_size: int) -> tuple[float, list[float]]:
    """Acceptance length over the rounds that verified drafts, and acceptance of each position given all before it."""
    rounds = [one for record in records for one in record.rounds if one.drafted]
    length = 1.0 + sum(one.accepted for one in rounds) / max(1, len(rounds))
    rates = []
    for position in range(block_size):
        reached = [one for one in rounds if one.drafted > position and one.accepted >= position]
        rates.append(sum(one.accepted > position for one in reached) / max(1, len(reached)))
    return length, rates


def tokens_a_round(records: Sequence[Record]) -> float:
    """Tokens that a step gave, with a draft or without one; the step that ended a prompt does not count."""
    rounds = [one for record in records for one in record.rounds[1:]]
    return sum(one.num_tokens for one in rounds) / max(1, len(rounds))


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each drafter and temperature, one column for each set, in Markdown.

    Acceptance lengths; behind one of a drafter that leaves rounds out, tokens a round over all of them in brackets.
    """
    sets = list(dict.fromkeys(row["set"] for row in results))
    cells = [["drafter", "T", *sets], ["---"] * (len(sets) + 2)]
    for name, heat in dict.fromkeys((row["drafter"], row["temperature"]) for row in results):
        found = {row["set"]: _shown(row) for row in results if (row["drafter"], row["temperature"]) == (name, heat)}
        cells.append([_label(name), f"{heat:g}", *(found.get(one, "-") for one in sets)])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def positions_table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each drafter, temperature and set: acceptance of each position given all before it, in Markdown."""
    width = max((len(row["acceptance"]) for row in results), default=0)
    cells = [["drafter", "T", "set", *(str(k) for k in range(1, width + 1))], ["---"] * (width + 3)]
    for row in results:
        rates = [f"{rate:.2f}" for rate in row["acceptance"]]
        cells.append([_label(row["drafter"]), f"{row['temperature']:g}", row["set"], *rates, *["-"] * (width - len(rates))])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _shown(row: dict[str, Any]) -> str:
    length, mean = row["acceptance_length"], row["tokens_a_round"]
    return f"{length:.2f} ({mean:.2f})" if mean < SPARSE * length else f"{length:.2f}"


def _label(name: str) -> str:
    """What to call a drafter: its name, or its folder; a run's own drafter by the run's."""
    path = Path(name)
    return path.parent.name if path.name == "drafter" and path.parent.name else path.name


def _prompt_sets(settings: EvaluateConfig, tokenizer: Any) -> dict[str, list[list[int]]]:
    folder = settings.prompts or BUILT_IN
    names = settings.sets or tuple(sorted(file.stem for file in folder.glob("*.jsonl")))
    if not names:
        raise ConfigError(f"evaluate.prompts: {folder} has no prompt sets (*.jsonl)")
    return {name: _render(tokenizer, read_prompts(folder / f"{name}.jsonl")[: settings.limit]) for name in names}


def _render(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if tokenizer is None or not tokenizer.chat_template:
        raise ConfigError("the target has no chat template, so prompts cannot be put to it")
    return [render_chat(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def _requests(cell: _Cell, prompts: Sequence[Sequence[int]], settings: EvaluateConfig, target: Target) -> list[Request]:
    requests = []
    for number, prompt in enumerate(prompts):
        limit = min(settings.max_tokens, target.max_position - len(prompt) - 1)
        sampling = SamplingParams(temperature=cell.heat, max_tokens=limit)
        requests.append(Request(f"{cell.set_name}-{number}", tuple(prompt), sampling, noise_seed=number))
    return requests


def _measure(
    engine: Engine, cells: Sequence[_Cell], prompts: dict[str, list[list[int]]], settings: EvaluateConfig, target: Target
) -> list[dict[str, Any]]:
    """All sets of ``cells`` in one crowd of requests, so that the stragglers of one are not waited for alone."""
    groups = [_requests(cell, prompts[cell.set_name], settings, target) for cell in cells]
    begin = time.monotonic()
    with tqdm(total=sum(map(len, groups)), unit=" answers", desc=f"T={cells[0].heat:g}", leave=False) as bar:
        records = iter(run_requests(engine, [request for group in groups for request in group], lambda: bar.update(1)))
    seconds = time.monotonic() - begin
    rows = []
    for cell, group in zip(cells, groups, strict=True):
        own = [next(records) for _ in group]
        length, rates = acceptance(own, engine.drafter.block_size)
        row = {"drafter": cell.drafter, "temperature": cell.heat, "set": cell.set_name, "num_prompts": len(group)}
        row |= {"num_tokens": sum(len(record.tokens) for record in own)}
        row |= {"acceptance_length": length, "acceptance": rates}
        row["tokens_a_round"] = tokens_a_round(own)
        rows.append(row | {"seconds_of_all_sets": seconds, "identity": cell.identity})
    return rows


def _line(row: dict[str, Any]) -> str:
    rates = " ".join(f"{value:.2f}" for value in row["acceptance"])
    return (
        f"{_label(row['drafter'])} T={row['temperature']:g} {row['set']}: {row['acceptance_length']:.3f} tokens a round"
        f" ({rates}), {row['num_tokens']} tokens, all sets in {row['seconds_of_all_sets']:.0f} s"
    )
