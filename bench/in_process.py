"""The same load on the Python class: what a server adds is measured against this."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from dspark.bench.http_client import Answer, Ask
from dspark.bench.load import Measured
from dspark.bench.metrics import Timeline
from dspark.bench.traffic import Job
from dspark.errors import DSparkError
from dspark.sampling import SamplingParams


class Delta(Protocol):
    """What ``LLM.stream`` yields."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...


class Streams(Protocol):
    """The part of ``LLM`` that is used here."""

    def stream(self, prompt: Any, params: SamplingParams) -> Iterable[Delta]: ...


def run_in_process(llm: Streams, jobs: Sequence[Job], concurrency: int) -> Measured:
    """Answers to all jobs, with ``concurrency`` threads streaming at all times."""
    waiting, lock = iter(enumerate(jobs)), threading.Lock()
    answers: dict[int, Answer] = {}

    def take() -> tuple[int, Job] | None:
        with lock:
            return next(waiting, None)

    def stream() -> None:
        while (taken := take()) is not None:
            place, job = taken
            answers[place] = _answer(llm, job.ask, job.prompt)

    start = time.perf_counter()
    _run_threads(stream, concurrency)
    return Measured(tuple(jobs), tuple(answers[place] for place in range(len(jobs))), time.perf_counter() - start)


def _run_threads(work: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=work, name=f"stream-{i}", daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _answer(llm: Streams, ask: Ask, prompt: str) -> Answer:
    """Time one stream by the rules of the HTTP client: chunks with text count, or the end of an answer without any."""
    params = SamplingParams(max_tokens=ask.max_tokens, temperature=ask.temperature, ignore_eos=ask.ignore_eos)
    content = [{"role": "user", "content": prompt}] if ask.is_chat else prompt
    arrivals, tokens = [], 0
    sent = time.perf_counter()
    try:
        for delta in llm.stream(content, params):
            tokens += len(delta.token_ids)
            if delta.text:
                arrivals.append(time.perf_counter())
    except DSparkError as error:
        return Answer(None, str(error))
    return Answer(Timeline(sent, tuple(arrivals or [time.perf_counter()]), max(tokens, 1)))
