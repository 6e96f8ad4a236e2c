"""``dspark train STAGE --config FILE``: from a model to its drafter; ``STAGES`` names the stages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dspark.errors import ConfigError
from dspark.training.config import KINDS, TrainConfig, read_config

STAGES = {
    "synthesize": "let the target answer prompts, its own or yours",
    "drafter": "train a drafter on the answers",
    "calibrate": "make its confidences honest",
    "evaluate": "measure acceptance lengths through the serving engine",
    "compare": "train drafters of several kinds alike and measure them side by side",
    "widths": "measure what truncating draft laws costs (draft_law_width)",
    "export": "write the drafter of the last checkpoint",
    "all": "synthesize, drafter, calibrate and evaluate, one after the other",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage and return the exit code: 0 done, 3 stopped by --max-seconds with more to do. ConfigError is the caller's."""
    args = _parser().parse_args(argv)
    config = read_config(args.config, dict(args.set or []))
    config.out.mkdir(parents=True, exist_ok=True)
    run: Callable[[TrainConfig, argparse.Namespace], bool] = _RUN[args.stage]
    return 0 if run(config, args) else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dspark train", description="Train, calibrate and measure a drafter for any target.", allow_abbrev=False
    )
    stages = parser.add_subparsers(metavar="STAGE", required=True, dest="stage")
    for name, text in STAGES.items():
        stage = stages.add_parser(name, help=text, description=text, allow_abbrev=False)
        stage.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML or TOML file; see docs/training.md")
        stage.add_argument(
            "--set", action="append", type=_assignment, metavar="KEY=VALUE", help="override a key of the file, for example trainer.lr=1e-3"
        )
        if name in ("synthesize", "drafter"):
            stage.add_argument(
                "--max-seconds", type=float, metavar="N", help="stop after so long with everything saved; run again to go on"
            )
        if name in ("drafter", "all"):
            stage.add_argument(
                "--num-workers",
                type=int,
                metavar="N",
                help="train on N workers of Ray (needs dspark-serve[train]); without it, in this process",
            )
        if name in ("evaluate", "compare", "widths"):
            stage.add_argument(
                "--drafter", action="append", default=[], metavar="NAME", help="a folder (or ngram) to measure too; may be repeated"
            )
        if name in ("evaluate", "compare"):
            _add_evaluate(stage)
        if name == "compare":
            stage.add_argument("--kinds", metavar="KIND,…", help=f"which to train and measure, of {', '.join(KINDS)} (default: the file's)")
    return parser


def _add_evaluate(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--prompts", type=Path, metavar="FOLDER", help="folder of prompt sets (default: the file's, or the built-in sets)")
    stage.add_argument("--limit", type=int, metavar="N", help="prompts a set")
    stage.add_argument("--max-tokens", type=int, metavar="N", help="of each answer")
    stage.add_argument(
        "--rows",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="results of other runs (their .json) to show in the same tables; may be repeated",
    )


def _assignment(text: str) -> tuple[str, object]:
    """KEY=VALUE with the value read as YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _synthesize(config: TrainConfig, args: argparse.Namespace) -> bool:
    from dspark.training.synthesize import synthesize

    return synthesize(config, _progress, getattr(args, "max_seconds", None))


def _drafter(config: TrainConfig, args: argparse.Namespace) -> bool:
    max_seconds = getattr(args, "max_seconds", None)
    if args.num_workers is None:
        from dspark.training.trainer import train

        return train(config, _progress, max_seconds)
    from dspark.training.on_ray import train_on_ray

    if args.num_workers < 1:
        raise ConfigError("--num-workers must be at least 1")
    return train_on_ray(config, args.num_workers, _progress, max_seconds)


def _calibrate(config: TrainConfig, args: argparse.Namespace) -> bool:
    from dspark.training.calibrate import calibrate

    calibrate(config, _progress)
    return True


def _evaluate(config: TrainConfig, args: argparse.Namespace) -> bool:
    from dspark.training.evaluate import evaluate

    evaluate(_with_evaluation(config, args), _progress, getattr(args, "drafter", ()), getattr(args, "rows", ()))
    return True


def _compare(config: TrainConfig, args: argparse.Namespace) -> bool:
    from dspark.training.compare import compare

    if args.kinds is not None:
        config = config.model_copy(update={"compare": config.compare.model_copy(update={"kinds": _kinds(args.kinds)})})
    compare(_with_evaluation(config, args), _progress, args.drafter, args.rows)
    return True


def _kinds(text: str) -> tuple[str, ...]:
    """The kinds that the command line names, each once."""
    kinds = tuple(dict.fromkeys(text.split(",")))
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"--kinds: {wrong[0]!r} is no kind of drafter; there are {', '.join(KINDS)}")
    return kinds


def _widths(config: TrainConfig, args: argparse.Namespace) -> bool:
    from dspark.training.widths import measure_widths

    measure_widths(config, _progress, tuple(args.drafter))
    return True


def _with_evaluation(config: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    """The settings with what the command line says of prompts."""
    named = {
        "prompts": getattr(args, "prompts", None),
        "limit": getattr(args, "limit", None),
        "max_tokens": getattr(args, "max_tokens", None),
    }
    given = {key: value for key, value in named.items() if value is not None}
    if any(value < 1 for value in given.values() if isinstance(value, int)):
        raise ConfigError("--limit and --max-tokens must be at least 1")
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=given)})


def _export(config: TrainConfig, args: argparse.Namespace) -> bool:
    from dspark.training.export import export

    export(config, _progress)
    return True


def _all(config: TrainConfig, args: argparse.Namespace) -> bool:
    return all(stage(config, args) for stage in (_synthesize, _drafter, _calibrate, _evaluate))


_RUN: dict[str, Callable[[TrainConfig, argparse.Namespace], bool]] = {
    "synthesize": _synthesize,
    "drafter": _drafter,
    "calibrate": _calibrate,
    "evaluate": _evaluate,
    "compare": _compare,
    "widths": _widths,
    "export": _export,
    "all": _all,
}
