"""Make confidences honest: rounds of the serving engine, and what is fitted to them (DSpark section 3.2).

Two estimators start from it: the confidence head, each position's logit divided by a temperature (sequential temperature
scaling), and the margin of the draft law, a logistic for each position. Every draft is verified whole, so position k is observed
exactly when all before it stood. The error that counts is that of the cumulative survival a_k = c_1 · … · c_k, observed in every
round (it survived or it did not).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from dspark.training.plots import Bin, plot_reliability
from dspark.training.served import Record, drafting_engine, has_head, run_requests
from dspark.training.shards import read_corpus
from dspark.training.target import load_target
from dspark.types import Request
from dspark.workers.drafter.calibration import CALIBRATION_FILE, MARGIN_INTERCEPT, MARGIN_SLOPE
from dspark.workers.verifier.engine import Engine

Progress = Callable[[str], None]
Floats = NDArray[np.float64]
GRID = np.exp(np.linspace(np.log(0.2), np.log(5.0), 97))
EDGE = 1e-6
RIDGE = 1e-2
NEWTON_STEPS = 25


@dataclass(frozen=True, slots=True)
class Rounds:
    """Verified rounds: confidence logits and margins [n, γ], accepted drafts [n], the request of each [n].

    ``logits`` None: the drafter has no head; ``margins`` None: it says none.
    """

    logits: Floats | None
    margins: Floats | None
    accepted: NDArray[np.int64]
    request: NDArray[np.int64]

    def survived(self, position: int) -> Floats:
        """1 where the drafts up to ``position`` (0-based) were accepted."""
        return (self.accepted > position).astype(np.float64)

    def pick(self, chosen: NDArray[np.bool_]) -> Rounds:
        logits, margins = (None if part is None else part[chosen] for part in (self.logits, self.margins))
        return Rounds(logits, margins, self.accepted[chosen], self.request[chosen])


@dataclass(frozen=True, slots=True)
class MarginFit:
    """P(position k accepted | all before it) = sigmoid(slope_k * margin_k + intercept_k)."""

    slope: Floats
    intercept: Floats

    def logits(self, margins: Floats) -> Floats:
        return margins * self.slope + self.intercept


def calibrate(config: TrainConfig, progress: Progress) -> dict[str, Any]:
    """Fit and write ``calibration.json`` into the drafter's folder; returns what it holds.

    ConfigError if rounds are too few, or the drafter gives nothing to fit.
    """
    folder, settings = config.drafter_folder, config.calibrate
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no drafter; run dspark train drafter first")
    target, tokenizer = load_target(config)
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)  # what is measured is the head itself
    engine = drafting_engine(target, tokenizer, str(folder), settings.max_num_seqs)
    rounds = collect_rounds(engine, held_out_requests(config, target.max_position))
    fitted_on = rounds.pick(rounds.request % 2 == 0)
    measured_on = rounds.pick(rounds.request % 2 == 1)
    if min(len(fitted_on.accepted), len(measured_on.accepted)) < settings.min_rounds:
        raise ConfigError(
            f"only {len(rounds.accepted)} whole rounds of {len(np.unique(rounds.request))} answers were seen, too few to calibrate on;"
            " raise calibrate.num_prompts, calibrate.max_tokens or trainer.held_out"
        )
    result = fit(fitted_on, measured_on, settings.bins)
    write_json(folder / CALIBRATION_FILE, result)
    num_pictures = len(plot_reliability(config.out, diagrams(measured_on, result, settings.bins)))
    progress(_table(result, num_pictures))
    return result


def fit(fitted_on: Rounds, measured_on: Rounds, bins: int) -> dict[str, Any]:
    """What ``calibration.json`` holds: parameters from some rounds, and their errors on others. ConfigError if nothing can be fitted."""
    if fitted_on.logits is None and fitted_on.margins is None:
        raise ConfigError("this drafter has neither a confidence head nor margins: there is nothing to calibrate")
    result: dict[str, Any] = {}
    if fitted_on.logits is not None and measured_on.logits is not None:
        temperatures = fit_temperatures(fitted_on, bins)
        result["temperatures"] = [round(float(value), 6) for value in temperatures]
        result |= _quality(measured_on, measured_on.logits, bins, "before")
        result |= _quality(measured_on, measured_on.logits / temperatures, bins, "after")
    if fitted_on.margins is not None and measured_on.margins is not None:
        line = fit_margins(fitted_on)
        result["margin"] = {"slope": np.round(line.slope, 6).tolist(), "intercept": np.round(line.intercept, 6).tolist()}
        unfitted = MarginFit(np.array(MARGIN_SLOPE), np.array(MARGIN_INTERCEPT))  # what serving starts from without a fit
        result["margin"] |= _quality(measured_on, unfitted.logits(measured_on.margins), bins, "before")
        result["margin"] |= _quality(measured_on, line.logits(measured_on.margins), bins, "after")
    signals = measured_on.margins if measured_on.logits is None else measured_on.logits
    assert signals is not None
    places = range(signals.shape[1])
    return result | {"survival": [float(measured_on.survived(k).mean()) for k in places], "num_rounds": len(measured_on.accepted)}


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
    return rounds_of(records, engine.drafter.block_size, has_head(engine.drafter))


def rounds_of(records: Sequence[Record], block_size: int, has_head: bool) -> Rounds:
    """The whole rounds of all records, but not a request's last one: the end may have cut it."""
    whole = [(number, one) for number, record in enumerate(records) for one in record.rounds[:-1] if one.drafted == block_size]
    has_margins = bool(whole) and all(len(one.margin) == block_size for _, one in whole)
    sure = np.array([one.confidence for _, one in whole], np.float64).reshape(-1, block_size).clip(EDGE, 1.0 - EDGE)
    return Rounds(
        np.log(sure / (1.0 - sure)) if has_head else None,
        np.array([one.margin for _, one in whole], np.float64) if has_margins else None,
        np.array([one.accepted for _, one in whole], np.int64),
        np.array([number for number, _ in whole], np.int64),
    )


def survival(logits: Floats, position: int) -> Floats:
    """Estimated survival [n] up to ``position`` (0-based) of logits [n, γ]."""
    product: Floats = (1.0 / (1.0 + np.exp(-logits[:, : position + 1]))).prod(axis=1)
    return product


def fit_temperatures(rounds: Rounds, bins: int) -> Floats:
    """One temperature a position, left to right, each with the least error of the cumulative survival; ties go to the one nearest 1."""
    assert rounds.logits is not None
    temperatures = np.ones(rounds.logits.shape[1])
    for position in range(len(temperatures)):
        errors = []
        for value in GRID:
            temperatures[position] = value
            errors.append(calibration_error(survival(rounds.logits / temperatures, position), rounds.survived(position), bins))
        order = sorted(range(len(GRID)), key=lambda i: (round(errors[i], 6), abs(np.log(GRID[i]))))
        temperatures[position] = GRID[order[0]]
    return temperatures


def fit_margins(rounds: Rounds) -> MarginFit:
    """A logistic a position, fitted where all before it stood, by Newton's method with a slight pull to slope 0."""
    assert rounds.margins is not None
    lines = [_logistic(rounds.margins[reached, k], rounds.survived(k)[reached]) for k, reached in _reached(rounds)]
    slope, intercept = np.array(lines).T
    return MarginFit(slope, intercept)


def _reached(rounds: Rounds) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    assert rounds.margins is not None
    return ((k, rounds.accepted >= k) for k in range(rounds.margins.shape[1]))


def _logistic(x: Floats, y: Floats) -> tuple[float, float]:
    """(slope, intercept) of the regularised maximum likelihood; (0, 0) without observations."""
    weights = np.zeros(2)
    inputs = np.stack((x, np.ones_like(x)), axis=1)
    for _ in range(NEWTON_STEPS):
        chance = 1.0 / (1.0 + np.exp(-(inputs @ weights)))
        gradient = inputs.T @ (chance - y) + RIDGE * weights
        curvature = (inputs * (chance * (1.0 - chance))[:, None]).T @ inputs + RIDGE * np.eye(2)
        weights -= np.linalg.solve(curvature, gradient)
    return float(weights[0]), float(weights[1])


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


def _quality(rounds: Rounds, logits: Floats, bins: int, when: str) -> dict[str, Any]:
    """Errors of the cumulative survival that the logits say, at every position."""
    estimates = [(survival(logits, k), rounds.survived(k)) for k in range(logits.shape[1])]
    errors = [calibration_error(estimate, outcome, bins) for estimate, outcome in estimates]
    return {
        f"ece_{when}": errors,
        f"mean_ece_{when}": float(np.mean(errors)),
        f"auc_{when}": [_finite(ranking_quality(estimate, outcome)) for estimate, outcome in estimates],
    }


def diagrams(rounds: Rounds, result: dict[str, Any], bins: int) -> list[dict[str, list[Bin]]]:
    """Reliability of the cumulative survival at every position, by what it was estimated with."""
    kinds: dict[str, Floats] = {}
    if rounds.logits is not None:
        kinds |= {"head": rounds.logits, "head, scaled": rounds.logits / np.array(result["temperatures"])}
    if rounds.margins is not None:
        line = result["margin"]
        kinds["margin"] = MarginFit(np.array(line["slope"]), np.array(line["intercept"])).logits(rounds.margins)
    width = len(result["survival"])
    return [{name: reliability(survival(logits, k), rounds.survived(k), bins) for name, logits in kinds.items()} for k in range(width)]


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if np.isfinite(value) else None


def _table(result: dict[str, Any], num_pictures: int) -> str:
    columns: dict[str, list[str]] = {}
    if "temperatures" in result:
        columns["temperature"] = [f"{value:.3f}" for value in result["temperatures"]]
        columns |= {f"ECE {when}": [f"{value:.2%}" for value in result[f"ece_{when}"]] for when in ("before", "after")}
        columns |= {f"AUC {when}": [_score(value) for value in result[f"auc_{when}"]] for when in ("before", "after")}
    if "margin" in result:
        line = result["margin"]
        columns |= {name: [f"{value:.3f}" for value in line[name]] for name in ("slope", "intercept")}
        columns |= {f"margin ECE {when}": [f"{value:.2%}" for value in line[f"ece_{when}"]] for when in ("before", "after")}
        columns |= {f"margin AUC {when}": [_score(value) for value in line[f"auc_{when}"]] for when in ("before", "after")}
    lines = ["position  " + "  ".join(columns)]
    for k in range(len(result["survival"])):
        lines.append(f"{k + 1:8d}  " + "  ".join(f"{values[k]:>{len(name)}}" for name, values in columns.items()))
    where = f"on {result['num_rounds']} rounds not fitted on"
    if "temperatures" in result:
        lines.append(f"mean ECE of the head {result['mean_ece_before']:.2%} -> {result['mean_ece_after']:.2%} {where}")
    if "margin" in result:
        before, after = result["margin"]["mean_ece_before"], result["margin"]["mean_ece_after"]
        lines.append(f"mean ECE of the margin {before:.2%} -> {after:.2%} {where}")
    if num_pictures:
        lines.append(f"{num_pictures} reliability diagrams beside the drafter")
    return "\n".join(lines)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
