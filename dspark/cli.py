"""The command line: ``dspark serve | generate | chat | bench | train | …`` (``dspark --help``), the same as ``python -m dspark``.

Every configuration key is a flag; command line wins over environment, environment over file. An error that somebody
can act on is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dspark import __version__
from dspark.config import ServeConfig
from dspark.config_file import DRAFT_TOKEN, Key, keys, load_config
from dspark.errors import ConfigError, DSparkError

SERVE_LIBRARIES = frozenset({"ray", "fastapi", "grpc", "google", "opentelemetry", "prometheus_client", "starlette", "uvicorn"})
DRAFT_WORKER_KEYS = frozenset(
    {"draft_device", "draft_kv_tokens", "tls_ca_file", "tls_cert_file", "tls_key_file", "tls_server_name"}
    | {f"engine.{name}" for name in ("model", "revision", "drafter", "dtype", "device", "threads", "draft_law_width", "max_num_seqs")}
)
BENCH_LIBRARIES = frozenset({"httpx"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except DSparkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has left; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    if argv[:1] == ["bench"]:  # it has its own commands and flags
        return _bench(argv[1:])
    if argv[:1] == ["train"]:
        return _train(argv[1:])
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    args = _parse(parser, argv)
    return int(args.run(args))


def config_from(args: argparse.Namespace) -> ServeConfig:
    """The configuration that file, environment and flags add up to."""
    given = vars(args)
    overrides: dict[str, object] = {}
    for key in keys():
        if key.path in given:
            value = given[key.path]
            overrides[key.path] = key.parse(value) if isinstance(value, str) else value
    positional = given.get("positional_model")
    if positional is not None:
        if "engine.model" in overrides:
            raise ConfigError("the model is given twice: as an argument and with --model")
        overrides["engine.model"] = positional
    return load_config(given.get("config"), os.environ, overrides)


def _serve(args: argparse.Namespace) -> int:
    config = config_from(args)
    try:
        from dspark.cluster.serve import serve_forever

        serve_forever(config, show_dashboard=args.dashboard)
    except ModuleNotFoundError as error:
        raise _missing_library(error, SERVE_LIBRARIES, "serve") from error
    return 0


def _bench(argv: list[str]) -> int:
    try:
        from dspark.bench.cli import main as bench_main

        return int(bench_main(argv))
    except ModuleNotFoundError as error:
        raise _missing_library(error, BENCH_LIBRARIES, "bench") from error


def _train(argv: list[str]) -> int:
    from dspark.training.cli import main as train_main

    return int(train_main(argv))


def _missing_library(error: ModuleNotFoundError, libraries: frozenset[str], extra: str) -> Exception:
    """What to tell the user if the missing module belongs to an extra; otherwise the error as it is."""
    if (error.name or "").partition(".")[0] not in libraries:
        return error
    return ConfigError(f"dspark {extra} needs {error.name}: pip install 'dspark-serve[{extra}]'")


def _draft_worker(args: argparse.Namespace) -> int:
    config = config_from(args)
    host, _, port = args.listen.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--listen must be HOST:PORT, not {args.listen!r}")
    try:
        from dspark.workers.draft_process import Listen, run_draft_worker
        from dspark.workers.wire.tls import TlsFiles

        files = (config.tls_ca_file, config.tls_cert_file, config.tls_key_file)
        tls = TlsFiles(files[0], files[1], files[2], config.tls_server_name) if files[0] and files[1] and files[2] else None
        engine = config.engine.model_copy(update={"device": config.draft_device or config.engine.device})
        listen = Listen(host, int(port), os.environ.get(DRAFT_TOKEN, ""), tls)
        run_draft_worker(engine, config.draft_kv_tokens, listen, lambda line: print(line, flush=True))
    except ModuleNotFoundError as error:
        raise _missing_library(error, SERVE_LIBRARIES, "serve") from error
    return 0


def _generate(args: argparse.Namespace) -> int:
    from dspark.terminal import generate

    return generate(config_from(args).engine, args)


def _chat(args: argparse.Namespace) -> int:
    from dspark.terminal import chat

    return chat(config_from(args).engine, args)


def _profile(args: argparse.Namespace) -> int:
    from dspark.terminal import profile

    return profile(config_from(args).engine, args)


def _status(args: argparse.Namespace) -> int:
    from dspark.status import local_url, show, watch

    config = config_from(args)
    key = config.read_api_key()
    url, secret = args.url or local_url(config.host, config.port), None if key is None else key.get_secret_value()
    return watch(url, secret, args.json, args.interval) if args.watch else show(url, secret, args.json)


def _version(_: argparse.Namespace) -> int:
    print(__version__)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dspark", description="Lossless speculative decoding, served.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = _command(commands, "serve", _serve, "serve a model over HTTP on a Ray cluster")
    serve.add_argument("positional_model", nargs="?", metavar="MODEL", help="folder or hub name; without it the embedded model")
    serve.add_argument("--dashboard", action="store_true", help="start Ray's dashboard on the loopback interface")
    _add_config(serve, keys())

    engine = tuple(key for key in keys() if key.path.startswith("engine."))
    worker = _command(commands, "draft-worker", _draft_worker, "draft for verifiers elsewhere, without Ray")
    worker.add_argument("positional_model", nargs="?", metavar="MODEL", help="the target that it drafts for; without it the embedded one")
    worker.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help=f"port 0: a free one; {DRAFT_TOKEN} is the secret")
    _add_config(worker, tuple(key for key in keys() if key.path in DRAFT_WORKER_KEYS))

    generate = _command(commands, "generate", _generate, "complete prompts in this process")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="one or more; without any, standard input is the prompt")
    generate.add_argument("--chat", action="store_true", help="take each prompt as a user's message, through the chat template")
    generate.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    _add_sampling(generate, max_tokens=256)
    generate.add_argument("--n", type=int, default=1, metavar="N", help="answers a prompt (default 1)")
    _add_config(generate, engine)

    chat = _command(commands, "chat", _chat, "talk with a model in the terminal")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    _add_sampling(chat, max_tokens=512)
    _add_config(chat, engine)

    profile = _command(commands, "profile", _profile, "measure what steps cost on this machine, and keep it for the next start")
    profile.add_argument("--json", action="store_true", help="print the table as JSON")
    _add_config(profile, engine)

    status = _command(commands, "status", _status, "show what a running cluster does: verifiers, load, acceptance, budgets, speculation")
    status.add_argument("--url", metavar="URL", help="base URL of the server (default: --host and --port on this machine)")
    status.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    status.add_argument("--interval", type=_seconds, default=2.0, metavar="S", help="seconds between two looks of --watch (default 2)")
    status.add_argument("--json", action="store_true", help="print JSON")
    _add_config(status, tuple(key for key in keys() if key.path in ("host", "port", "api_key", "api_key_file")))

    _command(commands, "bench", _version, "measure; see dspark bench --help")  # dispatched in main, listed here
    _command(commands, "train", _version, "train a drafter for a model; see dspark train --help")
    _command(commands, "version", _version, "print the version")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.1 to 3600")
    return value


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run, usage=command.format_usage)
    return command


def _add_config(parser: argparse.ArgumentParser, wanted: Sequence[Key]) -> None:
    """A flag for every configuration key. Absent flags stay absent, so that environment and file can speak."""
    group = parser.add_argument_group("configuration", "each flag is also a key of --config and an environment variable")
    group.add_argument("--config", type=Path, metavar="FILE", help="YAML or TOML file")
    for key in wanted:
        text = f"{key.field.description} ({_default(key)}{key.variable})".replace("%", "%%")
        flags = [flag for flag in (key.flag, key.short_flag) if flag is not None]
        if key.is_bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, dest=key.path, help=text)
        else:
            group.add_argument(*flags, default=argparse.SUPPRESS, dest=key.path, metavar=_metavar(key), help=text)


def _default(key: Key) -> str:
    return "" if key.field.default is None else f"default {key.field.default}; "


def _metavar(key: Key) -> str:
    annotation = key.field.annotation
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    kinds = set(get_args(annotation) or (annotation,))
    return "N" if kinds & {int, float} else "FILE" if Path in kinds else "TEXT"


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Flags of ``SamplingParams``; those not given keep its defaults."""
    group = parser.add_argument_group("sampling")
    numbers: list[tuple[str, type, str]] = [
        ("temperature", float, "0 is greedy (default 1)"),
        ("top-p", float, "keep the most likely tokens of this mass (default 1)"),
        ("top-k", int, "keep this many tokens (default 0: all)"),
        ("min-p", float, "keep tokens at least this likely, relative to the best (default 0)"),
        ("presence-penalty", float, "default 0"),
        ("frequency-penalty", float, "default 0"),
        ("repetition-penalty", float, "default 1"),
        ("seed", int, "same seed, same text, whatever the drafter"),
        ("min-tokens", int, "no end before this many tokens"),
    ]
    group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default {max_tokens}")
    for name, kind, text in numbers:
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar="N", help=text)
    group.add_argument("--stop", action="append", default=argparse.SUPPRESS, metavar="TEXT", help="end at this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=argparse.SUPPRESS, help="go on behind the end token")
    group.add_argument("--acceptance", default=argparse.SUPPRESS, metavar="{ratio,coupled}", help="default: coupled with a seed")


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse; an unknown flag is an error that suggests one of the command's own."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        match = difflib.get_close_matches(flag.lstrip("-"), re.findall(r"--([a-z-]+)", args.usage()), 1)
        raise ConfigError(f"unknown argument {flag}" + (f"; did you mean --{match[0]}?" if match else ""))
    return args


if __name__ == "__main__":
    sys.exit(main())
