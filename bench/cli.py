"""``dspark bench`` and its parts: flags in, tables and JSON lines out."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from dspark.bench.cohorts import CohortsPlan, draft_worker, run_cohorts
from dspark.bench.compare import ComparePlan, run_compare
from dspark.bench.demands import demand_lines
from dspark.bench.flags import COMPARE_DEFAULTS, GPU_PARTS, LOAD_DEFAULTS, TOPOLOGY_DEFAULTS, Command, make_parser, settle
from dspark.bench.http_client import Ask
from dspark.bench.load import Load
from dspark.bench.metrics import Limits
from dspark.bench.mixed import RELATIVE_CLASSES, MixedPlan, run_mixed
from dspark.bench.modes import parse_mode, parse_modes
from dspark.bench.offline import OfflinePlan, check_lossless, run_offline
from dspark.bench.online import OnlinePlan, run_online
from dspark.bench.peer import VllmSource
from dspark.bench.planner_time import run_planner
from dspark.bench.plots import draw
from dspark.bench.profile import ProfilePlan, run_profile
from dspark.bench.prompt_sets import load_set
from dspark.bench.report import report
from dspark.bench.results import offline, read_lines
from dspark.bench.router import RouterPlan, run_router
from dspark.bench.runners import Source
from dspark.bench.server_process import free_port, running, serve_command
from dspark.bench.survival_replay import FULL, ReplayPlan, run_replay
from dspark.bench.sweep import Held, make_levels
from dspark.bench.synthetic import SyntheticAcceptance
from dspark.bench.tempo import Tempo
from dspark.bench.topologies import TopologiesPlan, Topology, arrange, run_topologies
from dspark.bench.widen import Shape
from dspark.errors import ConfigError
from dspark.sampling import AcceptanceRule

SERVER_START_S = 300.0


def main(argv: Sequence[str]) -> int:
    """Run one command; the exit code is 1 when a check or a request failed. DSparkError if it cannot run at all."""
    args = make_parser(_RUN).parse_args(argv)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        return int(args.run(args))
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: object) -> None:
    """Leave as after Ctrl-C: servers that were started for a measurement end with it."""
    raise KeyboardInterrupt


def _offline(args: argparse.Namespace) -> int:
    plan = _offline_plan(args)
    checks = args.check_lossless or args.check_only
    if plan.synthetic is not None and checks:
        raise ConfigError("--synthetic-acceptance makes worthless text: there is nothing to check with --check-lossless")
    if args.resume and args.json is None:
        raise ConfigError("--resume reads the file that --json names, and there is none")
    held = Held(read_lines([args.json])) if args.resume and args.json.exists() else None
    folder = args.model or _embedded_model()
    tempo = Tempo() if args.steady else None
    source = Source(args.model, folder, args.drafter, max(args.concurrency), args.max_model_len, args.kv_tokens, plan.synthetic, tempo)
    encode = _chat_encoder(folder)
    is_lossless = not checks or check_lossless(plan, source.open, encode)
    if not args.check_only:
        with _json_out(args.json) as out:
            run_offline(plan, source.open, encode, out, held)
        if tempo is not None:
            print(tempo.summary())
    return 0 if is_lossless else 1


def _offline_plan(args: argparse.Namespace) -> OfflinePlan:
    synthetic = SyntheticAcceptance.parse(args.synthetic_acceptance) if args.synthetic_acceptance is not None else None
    modes = tuple(parse_modes(args.modes, args.drivers))
    if synthetic is not None and any(mode.name == "tree" for mode in modes):
        raise ConfigError("--synthetic-acceptance says nothing about siblings: leave tree out of --modes")
    if args.sampling and any(mode.speculation is None for mode in modes):
        raise ConfigError("--sampling is for our own engine: leave transformers out of --modes")
    return OfflinePlan(
        modes=modes,
        dtype=args.dtype,
        folder=args.prompts,
        sets=args.sets,
        levels=make_levels(args.concurrency, args.requests, args.max_tokens),
        temperatures=args.temperature,
        rules=args.acceptance,
        repeats=args.repeats,
        max_prompt_tokens=args.max_prompt_tokens,
        ignore_eos=args.ignore_eos,
        synthetic=synthetic,
        varies=args.vary_tokens,
        steady=args.steady,
        while_full=args.while_full,
        warm_up=args.warm_up,
        sampling=args.sampling,
    )


def _online(args: argparse.Namespace) -> int:
    ask = Ask(args.model or "", args.max_tokens, args.temperature, args.ignore_eos, args.endpoint == "chat")
    if args.compare_in_process:
        settle(args, COMPARE_DEFAULTS, {**LOAD_DEFAULTS, **TOPOLOGY_DEFAULTS}, "cannot be used with --compare-in-process")
        return _compare(args, ask)
    if args.compare_topologies:
        settle(args, {**COMPARE_DEFAULTS, **TOPOLOGY_DEFAULTS}, LOAD_DEFAULTS, "cannot be used with --compare-topologies")
        return _topologies(args, ask)
    own = {**COMPARE_DEFAULTS, **TOPOLOGY_DEFAULTS}
    settle(args, LOAD_DEFAULTS, own, "can only be used with --compare-in-process or --compare-topologies: a server has its own settings")
    if args.url is None:
        raise ConfigError("--url names the server to measure, for example --url http://127.0.0.1:8000")
    if args.classes and (args.ttft_ms is not None or args.tpot_ms is not None):
        raise ConfigError("--class has limits of its own: leave --ttft-ms and --tpot-ms out")
    if args.without_budgets and not args.classes:
        raise ConfigError("--without-budgets hides the budgets of --class, and there is none")
    rates = [Load(rate_per_s=rate) for rate in args.rate]
    plan = OnlinePlan(
        url=args.url,
        ask=ask,
        api_key=args.api_key,
        folder=args.prompts,
        sets=args.trace or args.sets,
        loads=tuple(rates or [Load(concurrency=level) for level in args.concurrency]),
        requests=args.requests,
        limits=Limits(args.ttft_ms, args.tpot_ms),
        seed=args.seed,
        timeout_s=args.timeout,
        trace=bool(args.trace),
        classes=tuple(args.classes),
        tells_budgets=not args.without_budgets,
    )
    with _json_out(args.json) as out:
        return 1 if asyncio.run(run_online(plan, out)) else 0


def _compare(args: argparse.Namespace, ask: Ask) -> int:
    """Measure a server (its own, unless --url names one) against an engine with the same settings in this process."""
    from dspark import LLM

    port = free_port()
    url = args.url or f"http://127.0.0.1:{port}"
    settings = ["--drafter", args.drafter, "--speculation", args.speculation, "--dtype", args.dtype]
    server = nullcontext() if args.url else running(serve_command(args.engine_model, port, settings), url, SERVER_START_S)
    plan = ComparePlan(
        url=url,
        ask=ask,
        api_key=args.api_key,
        folder=args.prompts,
        sets=args.sets,
        levels=args.concurrency,
        requests=args.requests,
        repeats=args.repeats,
        timeout_s=args.timeout,
        dtype=args.dtype,
    )
    with (
        _json_out(args.json) as out,
        server,
        LLM(args.engine_model, drafter=args.drafter, speculation=args.speculation, dtype=args.dtype) as llm,
    ):
        run_compare(plan, llm, out)
    return 0


def _topologies(args: argparse.Namespace, ask: Ask) -> int:
    """Start a server for each topology, all for the whole run."""
    if args.url is not None:
        raise ConfigError("--url names one server: --compare-topologies starts its own")
    plan = TopologiesPlan(ask, args.prompts, args.sets, args.concurrency, args.requests, args.repeats, args.timeout)
    with _json_out(args.json) as out, ExitStack() as stack:
        servers: list[tuple[Topology, str]] = []
        for topology in arrange(args.processes, args.draft_workers, args.drafter, args.speculation):
            port = free_port()
            servers.append((topology, f"http://127.0.0.1:{port}"))
            command = serve_command(args.engine_model, port, [*topology.settings, "--dtype", args.dtype, *args.server_flags])
            stack.enter_context(running(command, servers[-1][1], SERVER_START_S))
        run_topologies(plan, servers, out)
    return 0


def _cohorts(args: argparse.Namespace) -> int:
    """Start a draft worker, and an engine in this process that drafts with it."""
    from dspark import LLM

    encode = _chat_encoder(args.model or _embedded_model())
    prompts = [encode(prompt) for name in args.sets for prompt in load_set(args.prompts, name)]
    plan = CohortsPlan(prompts, args.concurrency, args.max_tokens, args.repeats, args.trace)
    shared = {"drafter": args.drafter, "dtype": args.dtype, "threads": args.threads, "max_num_seqs": max(args.concurrency)}
    flags = [text for name, value in shared.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with _json_out(args.json) as out, draft_worker([*([args.model] if args.model else []), *flags], SERVER_START_S) as (address, token):
        settings = shared | {"model": args.model, "prefix_cache": False}
        with LLM.with_draft_workers([address], token, draft_wait_ms=args.draft_wait_ms, **settings) as llm:
            run_cohorts(plan, llm, out)
    return 0


def _mixed(args: argparse.Namespace) -> int:
    """Start an adaptive and a plain server, both for the whole run: idle processes weigh on all alike."""
    plan = MixedPlan(
        ask=Ask("", args.max_tokens, args.temperature, args.ignore_eos),
        folder=args.prompts,
        sets=args.trace,
        rates=args.rates,
        classes=tuple(args.classes or ()),
        requests=args.requests,
        repeats=args.repeats,
        seed=args.seed,
        timeout_s=args.timeout,
        refuses=args.refuse,
    )
    names = [one.name for one in plan.classes] or list(RELATIVE_CLASSES)
    settings = {"reject_when_late": True} if plan.refuses else {}  # the budgets come with the requests
    known = ["--service-classes", json.dumps(dict.fromkeys(names, settings))]
    with _json_out(args.json) as out, ExitStack() as servers:
        urls: list[str] = []
        for mode in (["--speculation", "adaptive", "--drafter", args.drafter], ["--speculation", "off", "--drafter", "none"]):
            port = free_port()
            urls.append(f"http://127.0.0.1:{port}")
            command = serve_command(args.model, port, [*mode, *known, "--dtype", args.dtype, *args.server_flags])
            servers.enter_context(running(command, urls[-1], SERVER_START_S))
        return 1 if run_mixed(plan, urls[0], urls[1], out) else 0


def _simulate(args: argparse.Namespace) -> int:
    """The model is loaded for its cost table alone."""
    from dspark import LLM
    from dspark.bench.simulated import SimulatedPlan, make_kinds, relative_classes, run_simulated

    encode = _chat_encoder(args.model or _embedded_model())
    lengths = {name: [len(encode(prompt)) for prompt in load_set(args.prompts, name)] for name in args.trace}
    kinds = make_kinds(lengths, args.acceptance)
    with _json_out(args.json) as out, LLM(args.model, args.drafter, "adaptive", args.dtype, max_num_seqs=args.max_num_seqs) as llm:
        costs, limits = llm.engine.drafts.costs, llm.engine.options.limits
        if costs is None:
            raise ConfigError(f"--drafter {args.drafter} drafts nothing: there is no table of what drafts cost")
        classes = tuple(args.classes or relative_classes(kinds, costs.measured))
        plan = SimulatedPlan(args.rates, args.requests, args.repeats, args.seed, args.max_tokens, kinds, classes, limits)
        run_simulated(plan, llm.engine.target, costs.measured, out)
    return 0


def _planner(args: argparse.Namespace) -> int:
    with _json_out(args.json) as out:
        run_planner(args.requests, args.positions, args.estimators, args.repeats, out)
    return 0


def _survival(args: argparse.Namespace) -> int:
    from dspark import LLM

    plan = ReplayPlan(
        args.prompts, args.sets, args.requests, args.temperature, args.max_tokens, args.concurrency, args.trim, args.ignore_eos
    )
    settings = {"max_num_seqs": args.concurrency, "profile": False, "prefix_cache": False}
    with _json_out(args.json) as out, LLM(args.model, args.drafter, FULL, args.dtype, **settings) as llm:
        if not llm.engine.drafter.block_size:
            raise ConfigError("--drafter none drafts nothing: there is nothing to estimate")
        run_replay(plan, llm, _chat_encoder(args.model or _embedded_model()), out)
    return 0


def _profile(args: argparse.Namespace) -> int:
    from dspark import LLM

    mode = parse_mode(args.mode)
    if mode.speculation is None:
        raise ConfigError(f"--mode {args.mode}: only our own engine can be profiled")
    plan = ProfilePlan(mode, args.prompts, args.sets, args.concurrency, args.steps, args.dtype)
    drafter = args.drafter if mode.uses_drafter else "none"
    settings = {"max_num_seqs": args.concurrency, "prefix_cache": False, "profile": mode.needs_costs}
    with (
        _json_out(args.json) as out,
        LLM(args.model, drafter, str(mode.speculation), args.dtype, args.max_model_len, args.kv_tokens, **settings) as llm,
    ):
        run_profile(plan, llm, _chat_encoder(args.model or _embedded_model()), out)
    return 0


def _router(args: argparse.Namespace) -> int:
    with _json_out(args.json) as out:
        run_router(RouterPlan(args.replicas, args.seconds, args.repeats, args.seed), out)
    return 0


def _vllm(args: argparse.Namespace) -> int:
    folder = args.model or _embedded_model()
    plan = OfflinePlan(
        modes=(parse_mode(f"static:{args.draft_len}" if args.drafter else "plain"),),
        dtype=args.dtype,
        folder=args.prompts,
        sets=args.sets,
        levels=make_levels(args.concurrency, args.requests, args.max_tokens),
        temperatures=args.temperature,
        rules=(AcceptanceRule.RATIO,),
        repeats=args.repeats,
        max_prompt_tokens=args.max_prompt_tokens,
        ignore_eos=args.ignore_eos,
    )
    source = VllmSource(folder, args.drafter, args.draft_len, max(args.concurrency), args.max_model_len, args.memory_share)
    with _json_out(args.json) as out:
        run_offline(plan, source.open, _chat_encoder(folder), out)
    return 0


def _inflate(args: argparse.Namespace) -> int:
    from dspark.bench.inflate import InflatePlan, inflate, lay_out
    from dspark.bench.inflate_drafter import DrafterPlan, drafter_shape, inflate_drafter
    from dspark.deploy.default_model import default_drafter

    drafter = args.drafter or (default_drafter() if args.model is None else None)
    if drafter is None and args.drafter_out is not None:
        raise ConfigError("--drafter-out needs --drafter: only the embedded model has a drafter of its own")
    if args.drafter_out is None and (args.drafter is not None or args.small_drafter):
        raise ConfigError("--drafter and --small-drafter need --drafter-out, where the drafter goes")
    shape = Shape(args.hidden, args.intermediate, args.heads, args.kv_heads, args.head_dim)
    source = args.model or Path(_embedded_model())
    plan = InflatePlan(source, args.out, shape, args.layers, args.dtype)
    if drafter is not None and args.drafter_out is not None:
        own = drafter_shape(drafter, shape) if args.small_drafter else shape
        inflate_drafter(DrafterPlan(drafter, args.drafter_out, own, args.dtype), lay_out(plan), args.layers, print)
    inflate(plan, print)
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from dspark.bench.kernel_time import run_kernels

    with _json_out(args.json) as out:
        return 0 if run_kernels(args.kernels, args.repeats, out) else 1


def _gpus(args: argparse.Namespace) -> int:
    from dspark.bench.several_gpus import GpusPlan, devices, run_gpus

    if unknown := set(args.parts) - set(GPU_PARTS):
        raise ConfigError(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(GPU_PARTS)}")
    kind, count = devices(args.devices, args.ranks)
    plan = GpusPlan(
        kind=kind,
        count=count,
        parts=args.parts,
        model=args.model,
        drafter=args.drafter,
        speculation=args.speculation,
        dtype=args.dtype,
        streams=args.concurrency,
        tokens=args.max_tokens,
        requests=args.requests,
        kv_tokens=args.kv_request,
        repeats=args.repeats,
        prompts=args.prompts,
        sets=args.sets,
        threads=args.threads,
    )
    with _json_out(args.json) as out:
        return 1 if run_gpus(plan, out) else 0


def _report(args: argparse.Namespace) -> int:
    records = offline(read_lines(args.files))
    if not records:
        raise ConfigError("these files hold no offline results to compare")
    report(records, args.baseline)
    if args.png is not None:
        draw(records, args.png)
        print(f"wrote {args.png}")
    lines, all_met = demand_lines(records, args.bars)
    for line in lines:
        print(line)
    return 0 if all_met else 1


_RUN: Mapping[str, Command] = {
    "offline": _offline,
    "online": _online,
    "mixed": _mixed,
    "cohorts": _cohorts,
    "planner": _planner,
    "simulate": _simulate,
    "profile": _profile,
    "router": _router,
    "kernels": _kernels,
    "survival": _survival,
    "vllm": _vllm,
    "inflate": _inflate,
    "gpus": _gpus,
    "report": _report,
}


def _embedded_model() -> str:
    from dspark.deploy.default_model import default_cache, prepare

    return str(prepare(default_cache(), print))


def _chat_encoder(folder: str) -> Callable[[str], list[int]]:
    """Prompts as a user's message through the chat template of the model; as plain text if it has none."""
    from transformers import AutoTokenizer

    from dspark.prompting import encode, render_chat

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template:
        return lambda text: render_chat(tokenizer, [{"role": "user", "content": text}])
    return lambda text: encode(tokenizer, text)


@contextmanager
def _json_out(path: Path | None) -> Iterator[TextIO | None]:
    """A file to append JSON lines to; ConfigError if it cannot be opened."""
    if path is None:
        yield None
        return
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    with file:
        yield file
