"""Acceptance length through the serving engine: prompt sets × drafters × temperatures, every draft verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dspark.errors import ConfigError
from dspark.prompting import render_chat
from dspark.sampling import SamplingParams
from dspark.training.config import EvaluateConfig, TrainConfig
from dspark.training.files import write_json
from dspark.training.prompts import BUILT_IN, read_prompts
from dspark.training.served import Record, drafting_engine, run_requests
from dspark.training.target import load_target
from dspark.types import Request
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.targets import Target

Progress = Callable[[str], None]
RESULTS = "evaluation.json"


def evaluate(config: TrainConfig, progress: Progress, drafters: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure every drafter (ours, then the named ones) on every set; writes ``evaluation.json`` and reports a table."""
    names = [str(config.drafter_folder), *config.evaluate.drafters, *drafters]
    if not (config.drafter_folder / "config.json").is_file():
        if len(names) == 1:
            raise ConfigError(f"{config.drafter_folder} holds no drafter; run dspark train drafter first")
        names = names[1:]
    return measure(config, names, config.out / RESULTS, progress)


def measure(config: TrainConfig, names: Sequence[str], path: Path, progress: Progress) -> list[dict[str, Any]]:
    """Every drafter on every set at every temperature; the results are written to ``path`` as they come, and a table is reported."""
    settings = config.evaluate
    target, tokenizer = load_target(config)
    prompts = _prompt_sets(settings, tokenizer)
    results = []
    for name in names:
        engine = drafting_engine(target, tokenizer, name, settings.max_num_seqs)
        for heat in settings.temperatures:
            for set_name, ids in prompts.items():
                results.append(_measure(engine, name, set_name, _requests(ids, heat, settings, target)) | {"temperature": heat})
                write_json(path, results)
                progress(_line(results[-1]))
    progress(table(results))
    return results


def acceptance(records: Sequence[Record], block_size: int) -> tuple[float, list[float]]:
    """Acceptance length over the rounds that verified drafts, and acceptance of each position given all before it."""
    rounds = [one for record in records for one in record.rounds if one.drafted]
    length = 1.0 + sum(one.accepted for one in rounds) / max(1, len(rounds))
    rates = []
    for position in range(block_size):
        reached = [one for one in rounds if one.drafted > position and one.accepted >= position]
        rates.append(sum(one.accepted > position for one in reached) / max(1, len(reached)))
    return length, rates


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each drafter and temperature, one column for each set, in Markdown."""
    sets = list(dict.fromkeys(row["set"] for row in results))
    cells = [["drafter", "T", *sets], ["---"] * (len(sets) + 2)]
    for name, heat in dict.fromkeys((row["drafter"], row["temperature"]) for row in results):
        found = {row["set"]: row["acceptance_length"] for row in results if (row["drafter"], row["temperature"]) == (name, heat)}
        cells.append([_label(name), f"{heat:g}", *(f"{found[one]:.2f}" if one in found else "-" for one in sets)])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


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
    return [render_chat(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def _requests(prompts: Sequence[Sequence[int]], heat: float, settings: EvaluateConfig, target: Target) -> list[Request]:
    requests = []
    for number, prompt in enumerate(prompts):
        limit = min(settings.max_tokens, target.max_position - len(prompt) - 1)
        sampling = SamplingParams(temperature=heat, max_tokens=limit)
        requests.append(Request(f"evaluate-{number}", tuple(prompt), sampling, noise_seed=number))
    return requests


def _measure(engine: Engine, drafter: str, set_name: str, requests: Sequence[Request]) -> dict[str, Any]:
    begin = time.monotonic()
    with tqdm(total=len(requests), unit=" answers", desc=set_name, leave=False) as bar:
        records = run_requests(engine, requests, lambda: bar.update(1))
    seconds = time.monotonic() - begin
    length, rates = acceptance(records, engine.drafter.block_size)
    num_tokens = sum(len(record.tokens) for record in records)
    return {
        "drafter": drafter,
        "set": set_name,
        "num_prompts": len(requests),
        "num_tokens": num_tokens,
        "acceptance_length": length,
        "acceptance": rates,
        "seconds": seconds,
    }


def _line(row: dict[str, Any]) -> str:
    rates = " ".join(f"{value:.2f}" for value in row["acceptance"])
    return (
        f"{_label(row['drafter'])} T={row['temperature']:g} {row['set']}: {row['acceptance_length']:.3f} tokens a round"
        f" ({rates}), {row['num_tokens']} tokens in {row['seconds']:.0f} s"
    )
