"""``dspark bench offline | online | report``: flags in, tables and JSON lines out."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from dspark.bench.compare import ComparePlan, run_compare
from dspark.bench.flags import COMPARE_DEFAULTS, LOAD_DEFAULTS, make_parser, settle
from dspark.bench.http_client import Ask
from dspark.bench.metrics import Limits
from dspark.bench.modes import parse_modes
from dspark.bench.offline import OfflinePlan, check_lossless, run_offline
from dspark.bench.online import Load, OnlinePlan, run_online
from dspark.bench.report import draw, print_report, rates_by_point, read_lines
from dspark.bench.runners import Source
from dspark.bench.server_process import free_port, running, serve_command
from dspark.errors import ConfigError

SERVER_START_S = 300.0


def main(argv: Sequence[str]) -> int:
    """Run one command; the exit code is 1 when a check or a request failed. DSparkError if it cannot run at all."""
    args = make_parser(_offline, _online, _report).parse_args(argv)
    return int(args.run(args))


def _offline(args: argparse.Namespace) -> int:
    plan = OfflinePlan(
        modes=tuple(parse_modes(args.modes)),
        dtype=args.dtype,
        folder=args.prompts,
        sets=args.sets,
        levels=args.concurrency,
        temperatures=args.temperature,
        rules=args.acceptance,
        max_tokens=args.max_tokens,
        requests=args.requests,
        repeats=args.repeats,
        max_prompt_tokens=args.max_prompt_tokens,
        ignore_eos=args.ignore_eos,
    )
    folder = args.model or _embedded_model()
    source = Source(args.model, folder, args.drafter, max(args.concurrency), args.max_model_len, args.kv_tokens)
    encode = _chat_encoder(folder)
    is_lossless = not (args.check_lossless or args.check_only) or check_lossless(plan, source.open, encode)
    if not args.check_only:
        with _json_out(args.json) as out:
            run_offline(plan, source.open, encode, out)
    return 0 if is_lossless else 1


def _online(args: argparse.Namespace) -> int:
    ask = Ask(args.model or "", args.max_tokens, args.temperature, args.ignore_eos, args.endpoint == "chat")
    if args.compare_in_process:
        settle(args, COMPARE_DEFAULTS, LOAD_DEFAULTS, "cannot be used with --compare-in-process")
        return _compare(args, ask)
    settle(args, LOAD_DEFAULTS, COMPARE_DEFAULTS, "can only be used with --compare-in-process: a server has its own settings")
    if args.url is None:
        raise ConfigError("--url names the server to measure, for example --url http://127.0.0.1:8000")
    rates = [Load(rate_per_s=rate) for rate in args.rate]
    plan = OnlinePlan(
        url=args.url,
        ask=ask,
        api_key=args.api_key,
        folder=args.prompts,
        sets=args.sets,
        loads=tuple(rates or [Load(concurrency=level) for level in args.concurrency]),
        requests=args.requests,
        limits=Limits(args.ttft_ms, args.tpot_ms),
        seed=args.seed,
        timeout_s=args.timeout,
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


def _report(args: argparse.Namespace) -> int:
    rates = rates_by_point(read_lines(args.files))
    if not rates:
        raise ConfigError("these files hold no offline results to compare")
    print_report(rates, args.baseline)
    if args.png is not None:
        draw(rates, args.png)
        print(f"wrote {args.png}")
    return 0


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
