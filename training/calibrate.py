"""Make confidences honest: sequential temperature scaling on rounds of the serving engine (DSpark section 3.2).

Every draft is verified whole, so position k is observed exactly when all before it were accepted. The error that counts is
that of the cumulative survival a_k = c_1 · … · c_k, observed in every round (it survived or it did not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dspark.errors import ConfigError
from dspark.sampling import SamplingParams
from dspark.training.batches import split_corpus
from dspark.training.config import TrainConfig
from dspark.training.files import write_json
from dspark.training.plots import plot_reliability
from dspark.training.served import Record, drafting_engine, run_requests
from dspark.training.shards import read_corpus
from dspark.training.target import load_target
from dspark.types import Request
from dspark.workers.drafter.calibration import CALIBRATION_FILE
from dspark.workers.verifier.engine import Engine

Progress = Callable[[str], None]
Floats = NDArray[np.float64]
GRID = np.exp(np.linspace(np.log(0.2), np.log(5.0), 97))
EDGE = 1e-6
MIN_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Rounds:
    """Verified rounds: confidence logits [n, γ], accepted drafts [n], the request of each [n]."""

    logits: Floats
    accepted: NDArray[np.int64]
    request: NDArray[np.int64]

    def survived(self, position: int) -> Floats:
        """1 where the drafts up to ``position`` (0-based) were accepted."""
        return (self.accepted > position).astype(np.float64)

    def pick(self, chosen: NDArray[np.bool_]) -> Rounds:
        return Rounds(self.logits[chosen], self.accepted[chosen], self.request[chosen])


def calibrate(config: TrainConfig, progress: Progress) -> dict[str, Any]:
    """Fit and write ``calibration.json`` into the drafter's folder; returns what it holds. ConfigError if rounds are too few."""
    folder, settings = config.drafter_folder, config.calibrate
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no drafter; run dspark train drafter first")
    target, tokenizer = load_target(config)
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)  # what is measured is the head itself
    engine = drafting_engine(target, tokenizer, str(folder), settings.max_num_seqs)
    rounds = collect_rounds(engine, held_out_requests(config, target.max_position))
    fitted_on = rounds.pick(rounds.request % 2 == 0)
    measured_on = rounds.pick(rounds.request % 2 == 1)
    if min(len(fitted_on.accepted), len(measured_on.accepted)) < MIN_ROUNDS:
        raise ConfigError(
            f"only {len(rounds.accepted)} whole rounds of {len(np.unique(rounds.request))} answers were seen, too few to calibrate on;"
            " raise calibrate.num_prompts or trainer.held_out"
        )
    temperatures = fit_temperatures(fitted_on, settings.bins)
    result = _summary(measured_on, temperatures, settings.bins)
    write_json(folder / CALIBRATION_FILE, result)
    before, after = (_diagrams(measured_on, heat, settings.bins) for heat in (np.ones_like(temperatures), temperatures))
    pictures = plot_reliability(config.out, before, after)
    progress(_table(result, len(pictures)))
    return result


def held_out_requests(config: TrainConfig, max_position: int) -> list[Request]:
    """Prompts of held-out samples, with the configured temperatures in turn."""
    corpus, settings = read_corpus(config.data), config.calibrate
    chosen = split_corpus(corpus, config.trainer).held_out[: settings.num_prompts]
    requests = []
    for number, index in enumerate(chosen):
        prompt = corpus.sample(int(index))[: corpus.prompt_lens[index]].tolist()
        heat = settings.temperatures[(number // 2) % len(settings.temperatures)]
        limit = min(settings.max_tokens, max_position - len(prompt) - 1)
        requests.append(
            Request(f"calibrate-{number}", tuple(prompt), SamplingParams(temperature=heat, max_tokens=limit), noise_seed=number)
        )
    return requests


def collect_rounds(engine: Engine, requests: Sequence[Request]) -> Rounds:
    """Run the requests with every draft verified, and keep the rounds that drafted a whole block."""
    with tqdm(total=len(requests), unit=" answers") as bar:
        records = run_requests(engine, requests, lambda: bar.update(1))
    return rounds_of(records, engine.drafter.block_size)


def rounds_of(records: Sequence[Record], block_size: int) -> Rounds:
    """The whole rounds of all records, but not a request's last one: the end may have cut it."""
    logits, accepted, owner = [], [], []
    for number, record in enumerate(records):
        for one in record.rounds[:-1]:
            if one.drafted == block_size:
                sure = np.clip(np.array(one.confidence, np.float64), EDGE, 1.0 - EDGE)
                logits.append(np.log(sure / (1.0 - sure)))
                accepted.append(one.accepted)
                owner.append(number)
    return Rounds(np.array(logits).reshape(-1, block_size), np.array(accepted, np.int64), np.array(owner, np.int64))


def survival(rounds: Rounds, temperatures: Floats, position: int) -> Floats:
    """Estimated survival [n] up to ``position`` (0-based)."""
    upto = rounds.logits[:, : position + 1] / temperatures[: position + 1]
    product: Floats = (1.0 / (1.0 + np.exp(-upto))).prod(axis=1)
    return product


def fit_temperatures(rounds: Rounds, bins: int) -> Floats:
    """One temperature a position, left to right, each with the least error of the cumulative survival; ties go to the one nearest 1."""
    temperatures = np.ones(rounds.logits.shape[1])
    for position in range(len(temperatures)):
        errors = []
        for value in GRID:
            temperatures[position] = value
            errors.append(calibration_error(survival(rounds, temperatures, position), rounds.survived(position), bins))
        order = sorted(range(len(GRID)), key=lambda i: (round(errors[i], 6), abs(np.log(GRID[i]))))
        temperatures[position] = GRID[order[0]]
    return temperatures


def reliability(estimates: Floats, outcomes: Floats, bins: int) -> list[tuple[float, float, int]]:
    """(mean estimate, mean outcome, count) of bins of equal width that hold anything."""
    place = np.minimum((estimates * bins).astype(np.int64), bins - 1)
    return [
        (float(estimates[place == b].mean()), float(outcomes[place == b].mean()), int((place == b).sum()))
        for b in range(bins)
        if (place == b).any()
    ]


def calibration_error(estimates: Floats, outcomes: Floats, bins: int) -> float:
    """Expected calibration error: mean distance of estimate and outcome over bins, weighted by their counts."""
    return sum(abs(estimate - outcome) * count for estimate, outcome, count in reliability(estimates, outcomes, bins)) / max(
        1, len(estimates)
    )


def ranking_quality(estimates: Floats, outcomes: Floats) -> float:
    """AUC: how often a round that survived was estimated above one that did not; ties count half. NaN if all are alike."""
    positives = int(outcomes.sum())
    negatives = len(outcomes) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(estimates, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2.0)[inverse]
    return float((ranks[outcomes > 0].sum() - positives * (positives + 1) / 2.0) / (positives * negatives))


def _summary(rounds: Rounds, temperatures: Floats, bins: int) -> dict[str, Any]:
    ones = np.ones_like(temperatures)
    places = range(len(temperatures))
    before = [calibration_error(survival(rounds, ones, k), rounds.survived(k), bins) for k in places]
    after = [calibration_error(survival(rounds, temperatures, k), rounds.survived(k), bins) for k in places]
    return {
        "temperatures": [round(float(value), 6) for value in temperatures],
        "ece_before": before,
        "ece_after": after,
        "mean_ece_before": float(np.mean(before)),
        "mean_ece_after": float(np.mean(after)),
        "auc_before": [_finite(ranking_quality(survival(rounds, ones, k), rounds.survived(k))) for k in places],
        "auc_after": [_finite(ranking_quality(survival(rounds, temperatures, k), rounds.survived(k))) for k in places],
        "survival": [float(rounds.survived(k).mean()) for k in places],
        "num_rounds": len(rounds.accepted),
    }


def _diagrams(rounds: Rounds, temperatures: Floats, bins: int) -> list[list[tuple[float, float, int]]]:
    """Reliability of the cumulative survival at every position."""
    return [reliability(survival(rounds, temperatures, k), rounds.survived(k), bins) for k in range(len(temperatures))]


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if np.isfinite(value) else None


def _table(result: dict[str, Any], num_pictures: int) -> str:
    lines = ["position  temperature  ECE before  ECE after  AUC before  AUC after"]
    for k, heat in enumerate(result["temperatures"]):
        aucs = ["   -" if value is None else f"{value:.3f}" for value in (result["auc_before"][k], result["auc_after"][k])]
        lines.append(
            f"{k + 1:8d}  {heat:11.3f}  {result['ece_before'][k]:10.2%}  {result['ece_after'][k]:9.2%}  {aucs[0]:>10}  {aucs[1]:>9}"
        )
    lines.append(
        f"mean ECE {result['mean_ece_before']:.2%} -> {result['mean_ece_after']:.2%} on {result['num_rounds']} rounds not fitted on"
    )
    if num_pictures:
        lines.append(f"{num_pictures} reliability diagrams beside the drafter")
    return "\n".join(lines)
