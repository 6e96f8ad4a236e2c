"""``dspark generate`` and ``dspark chat``: a model in this process, talked to from a terminal or a pipe."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from dspark.config import EngineConfig
from dspark.errors import BadRequest
from dspark.llm import LLM, Prompt
from dspark.outputs import RequestOutput
from dspark.sampling import SamplingParams

CHAT_HELP = "/reset forgets the conversation, /exit leaves"


def generate(config: EngineConfig, args: argparse.Namespace) -> int:
    """Complete the prompts and print the answers, as text or as JSON lines."""
    params = sampling_params(args)
    texts = args.prompts or [sys.stdin.read()]
    prompts: list[Prompt] = [[{"role": "user", "content": text}] if args.chat else text for text in texts]
    with open_llm(config) as llm:
        outputs = llm.generate(prompts, params)
    for text, output in zip(texts, outputs, strict=True):
        if args.json:
            print(json.dumps(as_json(text, output), ensure_ascii=False))
        else:
            for choice in output.choices:
                print(choice.text)
    return 0


def chat(config: EngineConfig, args: argparse.Namespace) -> int:
    """Answer line by line until ``/exit`` or the end of the input."""
    params = sampling_params(args)
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    with open_llm(config) as llm:
        _note(CHAT_HELP)
        while (line := _ask()) is not None and line != "/exit":
            if line == "/reset":
                messages = list(start)
            elif line.startswith("/"):
                _note(f"unknown command {line}; {CHAT_HELP}")
            elif line:
                messages = _answer(llm, messages, line, params)
    return 0


def profile(config: EngineConfig, args: argparse.Namespace) -> int:
    """Measure the step-cost table afresh, keep it, and print it."""
    from dspark.workers.build import measure_profile

    table = measure_profile(config, _note)
    if args.json:
        print(json.dumps(table))
    else:
        print("\n".join(_table_lines(table)))
    return 0


def _table_lines(table: Mapping[str, Any]) -> list[str]:
    """A cost table for people: seconds as milliseconds, one size a line."""
    lines = ["tokens  verify ms"]
    lines += [f"{size:6d}  {1e3 * s:9.2f}" for size, s in zip(table["verify"]["sizes"], table["verify"]["seconds"], strict=True)]
    lines.append(f"and {1e6 * table['verify_context_s']:.2f} us a position of context, {1e3 * table['prefill_s']:.3f} ms a prompt token")
    if table["draft"]["seconds"][-1] > 0:
        lines.append("requests  draft ms  each further position ms")
        pairs = zip(table["draft"]["sizes"], table["draft"]["seconds"], table["draft_deeper"]["seconds"], strict=True)
        lines += [f"{size:8d}  {1e3 * s:8.2f}  {1e3 * more:24.3f}" for size, s, more in pairs]
        lines.append(f"and {1e6 * table['draft_context_s']:.2f} us a position of context")
    return lines


def open_llm(config: EngineConfig) -> LLM:
    """Load an engine with progress on stderr."""
    from dspark.workers.build import load_engine

    llm = LLM.of(load_engine(config, _note))
    effective = llm.config
    _note(
        f"{llm.model_name}: {effective.dtype} on {effective.device}, context {effective.max_model_len},"
        f" KV for {effective.kv_tokens} tokens, drafter {effective.drafter}, speculation {effective.speculation}"
    )
    return llm


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling flags that were given, the rest at their defaults."""
    return SamplingParams(**{name: value for name, value in vars(args).items() if name in SamplingParams.__dataclass_fields__})


def as_json(prompt: str, output: RequestOutput) -> dict[str, Any]:
    """One result as plain data."""
    return {
        "prompt": prompt,
        "num_prompt_tokens": output.num_prompt_tokens,
        "num_cached_tokens": output.num_cached_tokens,
        "acceptance_length": round(output.acceptance_length, 3),
        "ttft_s": round(output.ttft_s, 6),
        "latency_s": round(output.latency_s, 6),
        "choices": [
            {
                "text": choice.text,
                "token_ids": list(choice.token_ids),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for choice in output.choices
        ],
    }


def _answer(llm: LLM, messages: list[dict[str, str]], line: str, params: SamplingParams) -> list[dict[str, str]]:
    """Stream one answer; returns the longer conversation, or the old one if the model could not take the question.

    Ctrl-C ends the answer, not the chat; what was said so far stays in the conversation.
    """
    asked = [*messages, {"role": "user", "content": line}]
    said: list[str] = []
    try:
        with llm.stream(asked, params) as stream:
            try:
                for delta in stream:
                    said.append(delta.text)
                    print(delta.text, end="", flush=True)
                print()
                _note(_statistics(stream.output))
            except KeyboardInterrupt:
                print(" [stopped]")
    except BadRequest as error:
        _note(f"error: {error} (/reset makes room)")
        return messages
    return [*asked, {"role": "assistant", "content": "".join(said)}]


def _statistics(output: RequestOutput) -> str:
    spent = f"{len(output.token_ids)} tokens in {output.latency_s:.2f} s, the first after {output.ttft_s:.2f} s"
    return f"[{spent}, acceptance length {output.acceptance_length:.2f}]"


def _ask() -> str | None:
    """The next line; None at the end of the input or at Ctrl-C."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    import readline  # noqa: F401  (gives input() history and editing)

    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
