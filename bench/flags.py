"""The flags of ``dspark bench`` and how their values are read."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dspark.bench.demands import Demand
from dspark.bench.modes import KNOWN
from dspark.bench.prompt_sets import DEFAULT_FOLDER, DEFAULT_SETS
from dspark.bench.records import WARM_UP_TOKENS
from dspark.bench.traffic import ServiceClass
from dspark.errors import BadRequest, ConfigError
from dspark.sampling import AcceptanceRule, SamplingParams

# Flags of `online` that mean something to one kind of run only; the other kind refuses them.
LOAD_DEFAULTS: Mapping[str, object] = {
    "rate": (),
    "seed": 0,
    "ttft_ms": None,
    "tpot_ms": None,
    "trace": (),
    "classes": (),
    "without_budgets": False,
}
COMPARE_DEFAULTS: Mapping[str, object] = {
    "engine_model": None,
    "drafter": "auto",
    "speculation": "adaptive",
    "dtype": "bfloat16",
    "repeats": 3,
}
TOPOLOGY_DEFAULTS: Mapping[str, object] = {"processes": 2, "draft_workers": 1, "server_flags": ()}
FLAGS = {"classes": "--class"}  # where a flag is not named as what it sets
ESTIMATORS = ("head", "margin", "constant")
GPU_PARTS = ("transport", "tensor", "experts", "kv", "drafting")
DTYPES = ("bfloat16", "float16", "float32")
Command = Callable[[argparse.Namespace], int]
T = TypeVar("T")


def make_parser(run: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of all commands; ``run`` of what it returns is the chosen one of ``run``."""
    parser = argparse.ArgumentParser("dspark bench", description="Measure speculation, servers, and what they add.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, add_flags, text in (
        ("offline", _add_offline, "modes of speculation against each other, in this process"),
        ("online", _add_online, "load on an OpenAI-compatible server"),
        ("mixed", _add_mixed, "goodput of mixed traffic: adaptive with and without latency budgets, and plain, on own servers"),
        ("simulate", _add_simulate, "the same on a clock that only steps move: what latency budgets bring, without noise"),
        ("cohorts", _add_cohorts, "two cohorts of requests that hide drafting by a draft worker under verification, with a trace"),
        ("planner", _add_planner, "host time of a step's decisions about drafts, without a model"),
        ("survival", _add_survival, "the estimators of acceptance against each other, on rounds of real text"),
        ("profile", _add_profile, "where a round's time goes, part by part, and how far each is from what the machine allows"),
        ("router", _add_router, "routing decisions a second, over made-up replicas"),
        ("kernels", _add_kernels, "time of every kernel against the device's limits, its reference and torch's own"),
        ("gpus", _add_gpus, "several GPUs in one call: transport, parallel verifiers, KV that moves, where drafts are made"),
        ("vllm", _add_vllm, "the peer: vLLM on the same weights, prompts and lengths, with the same records"),
        ("inflate", _add_inflate, "write a large model that computes what a small one does, to measure large models on real text"),
        ("report", _add_report, "ratios between the modes in result files, and their curves"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run[name])
        add_flags(command)
    return parser


def settle(args: argparse.Namespace, used: Mapping[str, object], refused: Mapping[str, object], why: str) -> None:
    """Fill in the defaults of one kind of run; ConfigError for flags of the other kind."""
    given = [FLAGS.get(name, "--" + name.replace("_", "-")) for name in refused if hasattr(args, name)]
    if given:
        raise ConfigError(f"{', '.join(given)} {why}")
    for name, value in used.items():
        if not hasattr(args, name):
            setattr(args, name, value)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: the sets chat, code, math")
    parser.add_argument("--ignore-eos", action="store_true", help="always generate --max-tokens")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append one JSON line a result")


def _add_levels(parser: argparse.ArgumentParser, levels: tuple[int, ...]) -> None:
    shown = ",".join(map(str, levels))
    parser.add_argument("--concurrency", type=_list_of(_positive), default=levels, metavar="N,M", help=f"streams at once (default {shown})")


def _add_sets(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--sets", type=_list_of(str), default=DEFAULT_SETS, metavar="A,B", help="prompt sets: NAME.jsonl in --prompts")


def _add_offline(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_prompts(parser)
    _add_levels(parser, (1, 4, 16))
    modes = "plain,static:3,adaptive"
    rules = (AcceptanceRule.RATIO,)
    _add_work(parser)
    parser.add_argument("--model", help="folder or hub name (default: the embedded model)")
    parser.add_argument("--drafter", default="auto", help="auto, none, ngram, or a folder (default auto)")
    parser.add_argument("--modes", default=modes, help=f"of {KNOWN} (default {modes})")
    parser.add_argument("--drivers", type=_list_of(str), default=("",), metavar="A,B", help="of plain, overlapped: every mode under each")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--acceptance", type=_list_of(_rule), default=rules, metavar="A,B", help="of ratio, coupled (default ratio)")
    parser.add_argument("--max-model-len", type=_positive, metavar="N", help="default: the model's")
    parser.add_argument("--kv-tokens", type=_positive, metavar="N", help="KV pool of each engine (default: from free memory)")
    parser.add_argument("--resume", action="store_true", help="skip points that the --json file holds for this machine and commit")
    vary = "answers of different lengths, from half of --max-tokens to one and a half, the same in all modes: else plain ones end together"
    parser.add_argument("--vary-tokens", action="store_true", help=vary)
    steady = "tell times as they would be if the CPU never changed its speed, from work that is always the same, done between steps"
    parser.add_argument("--steady", action="store_true", help=steady)
    warm = f"tokens of each answer of a level's warm-up, so that what adapts has settled (default {WARM_UP_TOKENS})"
    parser.add_argument("--warm-up", type=_positive, default=WARM_UP_TOKENS, metavar="TOKENS", help=warm)
    fields = 'other fields of SamplingParams, as JSON: {"presence_penalty": 0.5, "logprobs": 1}'
    parser.add_argument("--sampling", type=_sampling, default={}, metavar="JSON", help=fields)
    full = "tok/s of the time in which all streams were busy: until one ended for which no request waited (default: of all of it)"
    parser.add_argument("--while-full", action="store_true", help=full)
    parser.add_argument(
        "--synthetic-acceptance",
        metavar="CURVE",
        help="force acceptance, at real cost: a rate (0.8), or accepted lengths for 1, 2, … drafts (1.84,2.51,…)",
    )
    parser.add_argument("--check-lossless", action="store_true", help="first compare greedy tokens of every mode with plain, in fp32")
    parser.add_argument("--check-only", action="store_true", help="only that comparison, no measurement")


def _add_work(parser: argparse.ArgumentParser) -> None:
    """What is decoded at every point, whoever decodes it."""
    tokens, requests = "new tokens a request, for all levels or for each", "requests, for all levels or for each (default: one a stream)"
    parser.add_argument("--max-tokens", type=_list_of(_positive), default=(128,), metavar="N,M", help=f"{tokens} (default 128)")
    parser.add_argument("--requests", type=_list_of(_positive), metavar="N,M", help=requests)
    parser.add_argument("--temperature", type=_list_of(_number), default=(0.0,), metavar="T,U", help="default 0.0")
    parser.add_argument("--repeats", type=_positive, default=1, metavar="N", help="interleaved repeats; medians are reported (default 1)")
    parser.add_argument("--max-prompt-tokens", type=_positive, default=1200, metavar="N", help="skip longer prompts (default 1200)")


def _add_vllm(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_prompts(parser)
    _add_levels(parser, (1, 64, 256))
    _add_work(parser)
    parser.add_argument("--model", help="folder (default: the embedded model)")
    parser.add_argument("--drafter", metavar="FOLDER", help="let it speculate with this drafter (default: plain decoding)")
    parser.add_argument("--draft-len", type=_positive, default=7, metavar="K", help="drafted tokens it verifies every round (default 7)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--max-model-len", type=_positive, default=2048, metavar="N", help="default 2048")
    parser.add_argument("--memory-share", type=_share, default=0.6, metavar="P", help="of the GPU's memory that it may take (default 0.6)")


def _add_online(parser: argparse.ArgumentParser) -> None:
    sets = parser.add_mutually_exclusive_group()
    _add_sets(sets)
    trace = "sets mixed at random instead of one after the other, for example chat,code,math"
    sets.add_argument("--trace", type=_list_of(str), default=argparse.SUPPRESS, metavar="A,B", help=trace)
    _add_prompts(parser)
    _add_levels(parser, (1, 8))
    parser.add_argument("--max-tokens", type=_positive, default=128, metavar="N", help="new tokens a request (default 128)")
    parser.add_argument("--requests", type=_positive, metavar="N", help="requests at each point (default: by the load)")
    parser.add_argument("--url", metavar="URL", help="base URL of the server, with or without /v1")
    parser.add_argument("--model", help="name to ask for (default: the first that the server lists)")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="bearer token (default: OPENAI_API_KEY)")
    parser.add_argument("--endpoint", choices=("chat", "completions"), default="chat", help="default chat")
    parser.add_argument("--temperature", type=_number, default=0.0, metavar="T", help="default 0")
    parser.add_argument("--timeout", type=_over_zero, default=600.0, metavar="S", help="silence that fails a request (default 600)")
    # Absent means not given, so that the other kind of run can refuse it: see settle.
    load = parser.add_argument_group("load", argument_default=argparse.SUPPRESS)
    load.add_argument("--rate", type=_list_of(_over_zero), metavar="R,S", help="Poisson arrivals a second, instead of --concurrency")
    load.add_argument("--seed", type=int, metavar="N", help="of arrival times, mix and classes (default 0)")
    load.add_argument("--ttft-ms", type=_number, metavar="MS", help="limit for goodput")
    load.add_argument("--tpot-ms", type=_number, metavar="MS", help="limit for goodput")
    _add_class(load)
    load.add_argument("--without-budgets", action="store_true", help="do not tell the server of classes and budgets")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--compare-in-process", action="store_true", help="measure LLM.stream in turns; without --url start a server")
    topologies = "start servers of as many processes: colocated, disaggregated, plain; measure them in turns"
    kinds.add_argument("--compare-topologies", action="store_true", help=topologies)
    compare = parser.add_argument_group("--compare-… (settings of all sides)", argument_default=argparse.SUPPRESS)
    compare.add_argument("--engine-model", metavar="MODEL", help="folder or hub name (default: the embedded model)")
    compare.add_argument("--drafter", help="auto, none, ngram, or a folder (default auto)")
    compare.add_argument("--speculation", help="off, static:K or adaptive (default adaptive)")
    compare.add_argument("--dtype", choices=DTYPES, help="default bfloat16")
    compare.add_argument("--repeats", type=_positive, metavar="N", help="turns of each side; medians are reported (default 3)")
    topology = parser.add_argument_group("--compare-topologies", argument_default=argparse.SUPPRESS)
    topology.add_argument("--processes", type=_positive, metavar="N", help="verifiers and draft workers together (default 2)")
    topology.add_argument("--draft-workers", type=_positive, metavar="N", help="of them, where drafting is disaggregated (default 1)")
    topology.add_argument("--server-flags", type=shlex.split, metavar="TEXT", help="more flags of dspark serve, for all servers")


def _add_class(parser: argparse._ActionsContainer) -> None:
    text = "a service class, NAME:ttft_ms=MS,tpot_ms=MS,share=S; again for others"
    parser.add_argument("--class", dest="classes", type=_service_class, action="append", metavar="CLASS", help=text)


def _add_mixed(parser: argparse.ArgumentParser) -> None:
    trace = f"prompt sets that are mixed at random (default {','.join(DEFAULT_SETS)})"
    parser.add_argument("--trace", type=_list_of(str), default=DEFAULT_SETS, metavar="A,B", help=trace)
    _add_prompts(parser)
    _add_class(parser)
    rates = "Poisson arrivals a second, or auto: where goodput of plain begins to fall (default auto)"
    parser.add_argument("--rates", type=_rates, default=(), metavar="auto|R,S", help=rates)
    parser.add_argument("--requests", type=_positive, default=48, metavar="N", help="requests of each turn (default 48)")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N", help="turns of each serving, new arrivals in each (default 3)")
    parser.add_argument("--max-tokens", type=_positive, default=64, metavar="N", help="new tokens a request (default 64)")
    parser.add_argument("--temperature", type=_number, default=0.0, metavar="T", help="default 0")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of arrival times, mix and classes (default 0)")
    parser.add_argument("--timeout", type=_over_zero, default=600.0, metavar="S", help="silence that fails a request (default 600)")
    parser.add_argument("--model", help="folder or hub name (default: the embedded model)")
    parser.add_argument("--drafter", default="auto", help="of the adaptive server: auto, ngram, or a folder (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--server-flags", type=shlex.split, default=[], metavar="TEXT", help="more flags of dspark serve, for both servers")
    refuse = "let the server told of budgets refuse requests that it predicts to be late (reject_when_late); a refusal keeps no budget"
    parser.add_argument("--refuse", action="store_true", help=refuse)


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    trace = f"prompt sets that are mixed at random (default {','.join(DEFAULT_SETS)})"
    parser.add_argument("--trace", type=_list_of(str), default=DEFAULT_SETS, metavar="A,B", help=trace)
    parser.add_argument("--prompts", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: the sets chat, code, math")
    _add_class(parser)
    parser.add_argument("--rates", type=_list_of(_over_zero), required=True, metavar="R,S", help="Poisson arrivals a second")
    parser.add_argument("--requests", type=_positive, default=200, metavar="N", help="requests of each trace (default 200)")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N", help="traces at each rate (default 3)")
    parser.add_argument("--max-tokens", type=_positive, default=128, metavar="N", help="new tokens a request (default 128)")
    chances = "chance that a draft is accepted if those before it were, one for all sets or one each (default 0.7)"
    parser.add_argument("--acceptance", type=_list_of(_over_zero), default=(0.7,), metavar="P,Q", help=chances)
    parser.add_argument("--max-num-seqs", type=_positive, default=64, metavar="N", help="requests that run at once (default 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of arrival times, mix and classes (default 0)")
    parser.add_argument("--model", help="folder or hub name, for its cost table (default: the embedded model)")
    parser.add_argument("--drafter", default="auto", help="auto, ngram, or a folder (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append one JSON line a result")


def _add_cohorts(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_prompts(parser)
    _add_levels(parser, (4, 16))
    parser.add_argument("--max-tokens", type=_positive, default=64, metavar="N", help="new tokens a request (default 64)")
    parser.add_argument("--repeats", type=_positive, default=3, metavar="N", help="turns of each mode; medians are reported (default 3)")
    parser.add_argument("--model", help="folder or hub name (default: the embedded model)")
    parser.add_argument("--drafter", default="auto", help="auto, or a folder (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="compute threads of each process (default 1)")
    parser.add_argument("--draft-wait-ms", type=_number, default=500.0, metavar="MS", help="longest wait for drafts (default 500)")
    parser.add_argument("--trace", type=Path, metavar="OUT", help="write the last run of two cohorts as a Chrome trace")


def _add_planner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=_list_of(_positive), default=(1, 16, 64, 256), metavar="N,M", help="default 1,16,64,256")
    parser.add_argument("--positions", type=_positive, default=7, metavar="N", help="drafted tokens a request (default 7)")
    _add_estimators(parser)
    parser.add_argument("--repeats", type=_positive, default=500, metavar="N", help="steps; medians are reported (default 500)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append one JSON line a result")


def _add_estimators(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--estimators", type=_list_of(_estimator), default=ESTIMATORS, metavar="A,B", help=f"of {', '.join(ESTIMATORS)}")


def _add_survival(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_prompts(parser)
    parser.add_argument("--model", help="folder or hub name (default: the embedded model)")
    parser.add_argument("--drafter", default="auto", help="auto, ngram, or a folder (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--requests", type=_positive, default=40, metavar="N", help="prompts of each set (default 40)")
    parser.add_argument("--temperature", type=_list_of(_number), default=(0.0, 1.0), metavar="T,U", help="of every prompt (default 0,1)")
    parser.add_argument("--max-tokens", type=_positive, default=128, metavar="N", help="new tokens a request (default 128)")
    parser.add_argument("--concurrency", type=_positive, default=16, metavar="N", help="streams at once (default 16)")
    trim = "learn only from tokens predicted to survive with this probability (default 0,0.3)"
    parser.add_argument("--trim", type=_list_of(_share), default=(0.0, 0.3), metavar="P,Q", help=trim)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    parser.add_argument("--prompts", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: the sets chat, code, math")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append the result as a JSON line")
    parser.add_argument("--model", help="folder or hub name (default: the embedded model)")
    parser.add_argument("--drafter", default="auto", help="auto, ngram, or a folder (default auto)")
    parser.add_argument("--mode", default="adaptive", help="plain, static:K, adaptive[:K] or tree[:NODES] (default adaptive)")
    parser.add_argument("--concurrency", type=_positive, default=1, metavar="N", help="streams (default 1)")
    parser.add_argument("--steps", type=_positive, default=20, metavar="N", help="rounds, timed once without and once with the profiler")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--max-model-len", type=_positive, metavar="N", help="default: the model's")
    parser.add_argument("--kv-tokens", type=_positive, metavar="N", help="KV pool (default: from free memory)")


def _add_router(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replicas", type=_positive, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--seconds", type=_over_zero, default=1.0, metavar="S", help="of each case and repeat (default 1)")
    parser.add_argument("--repeats", type=_positive, default=5, metavar="N", help="medians are reported (default 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the made-up replicas and requests (default 0)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append one JSON line a case")


def _add_inflate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Llama-class model (default: the embedded model)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the large model goes; must be empty")
    sizes = (("hidden", 4096), ("intermediate", 14336), ("layers", 36), ("heads", 32), ("kv-heads", 8), ("head-dim", 128))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--drafter", type=Path, metavar="FOLDER", help="the source's drafter (default: the embedded one)")
    parser.add_argument("--drafter-out", type=Path, metavar="FOLDER", help="write it for the large model, its layers of that shape")
    parser.add_argument("--small-drafter", action="store_true", help="let its layers keep their heads and MLP (cheaper)")


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernels", type=_list_of(str), default=(), metavar="A,B", help="only those whose names begin so (default all)")
    parser.add_argument("--repeats", type=_positive, default=11, metavar="N", help="medians are reported (default 11)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append one JSON line a kernel and shape")


def _add_gpus(parser: argparse.ArgumentParser) -> None:
    _add_sets(parser)
    _add_levels(parser, (1, 16))
    parser.add_argument("--prompts", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: the sets chat, code, math")
    parser.add_argument("--json", type=Path, metavar="OUT", help="append one JSON line a row")
    parser.add_argument("--parts", type=_list_of(str), default=GPU_PARTS, metavar="A,B", help=f"of {', '.join(GPU_PARTS)} (default all)")
    kinds = "auto is the GPUs that are visible, or CPUs (default auto)"
    parser.add_argument("--devices", choices=("auto", "cpu", "cuda"), default="auto", help=kinds)
    parser.add_argument("--ranks", type=_positive, metavar="N", help="devices to use (default: all visible GPUs; 2 CPU processes)")
    model = "folder, for example of dspark bench inflate (default: random ones for ranks, the embedded one for the rest)"
    parser.add_argument("--model", metavar="FOLDER", help=model)
    parser.add_argument("--drafter", default="auto", help="auto, or a folder (default auto)")
    parser.add_argument("--speculation", default="adaptive", help="of part drafting (default adaptive)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--max-tokens", type=_positive, default=128, metavar="N", help="new tokens a request (default 128)")
    parser.add_argument("--requests", type=_positive, default=32, metavar="N", help="of each arrangement of part drafting (default 32)")
    parser.add_argument("--kv-request", type=_positive, default=4096, metavar="N", help="tokens whose KV moves (default 4096)")
    parser.add_argument("--repeats", type=_positive, default=5, metavar="N", help="medians are reported (default 5)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="compute threads of each process (default: torch's)")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines of bench offline or vllm")
    parser.add_argument("--baseline", metavar="LABEL", help="divide by this mode (default: plain)")
    bar = "fail unless it holds, as geometric mean of the sets: 'plain / vllm-0.26.0 plain @ 1,64 >= 1.5'; again for others"
    parser.add_argument("--bar", dest="bars", type=_demand, action="append", default=[], metavar="BAR", help=bar)
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw throughput, budgets and step times")


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


def _sampling(text: str) -> dict[str, Any]:
    """Fields of ``SamplingParams`` that no other flag sets."""
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("not an object")
        if taken := set(fields) & {"n", "max_tokens", "temperature", "acceptance", "ignore_eos"}:
            raise ValueError(f"other flags set {', '.join(sorted(taken))}")
        if isinstance(bias := fields.get("logit_bias"), dict):
            fields["logit_bias"] = {int(token): value for token, value in bias.items()}
        SamplingParams(**fields)
    except (ValueError, TypeError, BadRequest) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return fields


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


def _share(text: str) -> float:
    value = _number(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not under 1")
    return value


def _estimator(text: str) -> str:
    if text not in ESTIMATORS:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(ESTIMATORS)}")
    return text


def _rule(text: str) -> AcceptanceRule:
    return AcceptanceRule(text)


def _service_class(text: str) -> ServiceClass:
    try:
        return ServiceClass.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _demand(text: str) -> Demand:
    try:
        return Demand.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rates(text: str) -> tuple[float, ...]:
    return () if text == "auto" else _list_of(_over_zero)(text)
