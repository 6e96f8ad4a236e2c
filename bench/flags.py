"""The flags of ``dspark bench`` and how their values are read."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from dspark.bench.prompt_sets import DEFAULT_FOLDER, DEFAULT_SETS
from dspark.errors import ConfigError
from dspark.sampling import AcceptanceRule

# Flags of `online` that mean something to one kind of run only; the other kind refuses them.
LOAD_DEFAULTS: Mapping[str, object] = {"rate": (), "seed": 0, "ttft_ms": None, "tpot_ms": None}
COMPARE_DEFAULTS: Mapping[str, object] = {
    "engine_model": None,
    "drafter": "auto",
    "speculation": "adaptive",
    "dtype": "bfloat16",
    "repeats": 3,
}
DTYPES = ("bfloat16", "float16", "float32")
Command = Callable[[argparse.Namespace], int]
T = TypeVar("T")


def make_parser(offline: Command, online: Command, report: Command) -> argparse.ArgumentParser:
    """The parser of all commands; ``run`` of what it returns is the chosen one."""
    parser = argparse.ArgumentParser("dspark bench", description="Measure speculation, servers, and what they add.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, add_flags, text in (
        ("offline", offline, _add_offline, "modes of speculation against each other, in this process"),
        ("online", online, _add_online, "load on an OpenAI-compatible server"),
        ("report", report, _add_report, "ratios between the modes in result files"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        add_flags(command)
    return parser


def settle(args: argparse.Namespace, used: Mapping[str, object], refused: Mapping[str, object], why: str) -> None:
    """Fill in the defaults of one kind of run; ConfigError for flags of the other kind."""
    given = ["--" + name.replace("_", "-") for name in refused if hasattr(args, name)]
    if given:
        raise ConfigError(f"{', '.join(given)} {why}")
    for name, value in used.items():
        if not hasattr(args, name):
            setattr(args, name, value)


def _add_common(parser: argparse.ArgumentParser, levels: tuple[int, ...]) -> None:
    """What both measuring commands ask and how often."""
    shown = ",".join(map(str, levels))
    parser.add_argument("--sets", type=_list_of(str), default=DEFAULT_SETS, metavar="A,B", help="prompt sets: NAME.jsonl in --prompts")
    parser.add_argument("--prompts", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: the sets chat, code, math")
    parser.add_argument("--concurrency", type=_list_of(_positive), default=levels, metavar="N,M", help=f"streams at once (default {shown})")
    parser.add_argument("--max-tokens", type=_positive, default=128, metavar="N", help="new tokens a request (default 128)")
    parser.add_argument("--requests", type=_positive, metavar="N", help="requests at each point (default: by the load)")
    parser.add_argument("--ignore-eos", action="store_true", help="always generate --max-tokens")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append one JSON line a result")


def _add_offline(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, (1, 4, 16))
    modes = "plain,static:3,adaptive"
    rules = (AcceptanceRule.RATIO,)
    parser.add_argument("--model", help="folder or hub name (default: the embedded model)")
    parser.add_argument("--drafter", default="auto", help="auto, none, ngram, or a folder (default auto)")
    parser.add_argument("--modes", default=modes, help=f"of plain, static:K, adaptive, adaptive:K, transformers (default {modes})")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--temperature", type=_list_of(_number), default=(0.0,), metavar="T,U", help="default 0.0")
    parser.add_argument("--acceptance", type=_list_of(_rule), default=rules, metavar="A,B", help="of ratio, coupled (default ratio)")
    parser.add_argument("--repeats", type=_positive, default=1, metavar="N", help="interleaved repeats; medians are reported (default 1)")
    parser.add_argument("--max-prompt-tokens", type=_positive, default=1200, metavar="N", help="skip longer prompts (default 1200)")
    parser.add_argument("--max-model-len", type=_positive, metavar="N", help="default: the model's")
    parser.add_argument("--kv-tokens", type=_positive, metavar="N", help="KV pool of each engine (default: from free memory)")
    parser.add_argument("--check-lossless", action="store_true", help="first compare greedy tokens of every mode with plain, in fp32")
    parser.add_argument("--check-only", action="store_true", help="only that comparison, no measurement")


def _add_online(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, (1, 8))
    parser.add_argument("--url", metavar="URL", help="base URL of the server, with or without /v1")
    parser.add_argument("--model", help="name to ask for (default: the first that the server lists)")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="bearer token (default: OPENAI_API_KEY)")
    parser.add_argument("--endpoint", choices=("chat", "completions"), default="chat", help="default chat")
    parser.add_argument("--temperature", type=_number, default=0.0, metavar="T", help="default 0")
    parser.add_argument("--timeout", type=_over_zero, default=600.0, metavar="S", help="silence that fails a request (default 600)")
    # Absent means not given, so that the other kind of run can refuse it: see settle.
    load = parser.add_argument_group("load", argument_default=argparse.SUPPRESS)
    load.add_argument("--rate", type=_list_of(_over_zero), metavar="R,S", help="Poisson arrivals a second, instead of --concurrency")
    load.add_argument("--seed", type=int, metavar="N", help="of the arrival times (default 0)")
    load.add_argument("--ttft-ms", type=_number, metavar="MS", help="limit for goodput")
    load.add_argument("--tpot-ms", type=_number, metavar="MS", help="limit for goodput")
    parser.add_argument("--compare-in-process", action="store_true", help="measure LLM.stream in turns; without --url start a server")
    compare = parser.add_argument_group("--compare-in-process (settings of both sides)", argument_default=argparse.SUPPRESS)
    compare.add_argument("--engine-model", metavar="MODEL", help="folder or hub name (default: the embedded model)")
    compare.add_argument("--drafter", help="auto, none, ngram, or a folder (default auto)")
    compare.add_argument("--speculation", help="off, static:K or adaptive (default adaptive)")
    compare.add_argument("--dtype", choices=DTYPES, help="default bfloat16")
    compare.add_argument("--repeats", type=_positive, metavar="N", help="turns of each side; medians are reported (default 3)")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines of bench offline")
    parser.add_argument("--baseline", default="plain", metavar="LABEL", help="divide by this mode (default plain)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw throughput against speed per user")


def _list_of(read: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """A reader of comma-separated values."""

    def read_all(text: str) -> tuple[T, ...]:
        return tuple(read(part.strip()) for part in text.split(","))

    read_all.__name__ = "list"  # what argparse calls it in its message
    return read_all


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not over 0")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return value


def _over_zero(text: str) -> float:
    value = _number(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be over 0")
    return value


def _rule(text: str) -> AcceptanceRule:
    return AcceptanceRule(text)
