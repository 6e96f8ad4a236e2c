"""The peer, vLLM, as a runner: the same weights, prompts and lengths, and records with the same fields as our own.

It runs in a process of its own, since both engines take the whole GPU: run one after the other on one machine.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dspark.bench.metrics import Timeline
from dspark.bench.modes import BenchMode
from dspark.bench.runners import Counts, Prompts, Run, Runner, Settings
from dspark.errors import ConfigError

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
DRAFTS, VERIFIED, ACCEPTED = (f"vllm:spec_decode_num_{name}" for name in ("drafts", "draft_tokens", "accepted_tokens"))


@dataclass(frozen=True, slots=True)
class VllmSource:
    """How vLLM is started. ``drafter`` None: plain decoding; otherwise it verifies ``draft_len`` tokens of it every round."""

    folder: str
    drafter: str | None
    draft_len: int
    max_num_seqs: int
    max_model_len: int
    memory_share: float

    def open(self, modes: Sequence[BenchMode], dtype: str) -> dict[BenchMode, Runner]:
        """One engine for the only mode; ConfigError without vLLM."""
        (mode,) = modes
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(f"dspark bench vllm needs vLLM, which cannot be imported: {error}") from error
        speculative = {"method": "dspark", "model": self.drafter, "num_speculative_tokens": self.draft_len}
        engine = LLM(
            self.folder,
            dtype=dtype,
            max_model_len=self.max_model_len,
            gpu_memory_utilization=self.memory_share,
            max_num_seqs=self.max_num_seqs,
            seed=0,
            disable_log_stats=False,
            enable_prefix_caching=False,
            **({"speculative_config": speculative} if self.drafter else {}),
        )
        return {mode: VllmRunner(engine, self.drafter, self.draft_len if self.drafter else 0)}


class VllmRunner:
    """One vLLM engine."""

    def __init__(self, llm: Any, drafter: str | None, draft_len: int) -> None:
        self.engine = "vllm-" + importlib.metadata.version("vllm").partition("+")[0]
        self.drafter = drafter or "none"
        self.block_size = draft_len
        self._llm = llm

    def run(self, prompts: Prompts, concurrency: int, settings: Settings) -> Run:
        """Decode all prompts in groups of ``concurrency``; the next group begins when one has ended."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens, ignore_eos=settings.ignore_eos)
        work = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        before, started = self._counters(), time.perf_counter()
        outputs = []
        for first in range(0, len(work), concurrency):
            outputs += self._llm.generate(work[first : first + concurrency], params, use_tqdm=False)
        seconds = time.perf_counter() - started
        drafts, verified, accepted = (after - earlier for earlier, after in zip(before, self._counters(), strict=True))
        tokens = [tuple(output.outputs[0].token_ids) for output in outputs]
        counts = Counts(windows={round(verified / drafts): drafts} if drafts else {}, accepted=accepted)
        return Run(tuple(map(_timeline, outputs)), tuple(tokens), seconds, counts)

    def close(self) -> None:
        """Drop the engine."""
        self._llm = None

    def _counters(self) -> tuple[int, ...]:
        """Rounds that drafted, tokens drafted and tokens accepted so far."""
        values = {metric.name: int(getattr(metric, "value", 0)) for metric in self._llm.get_metrics()}
        return tuple(values.get(name, 0) for name in (DRAFTS, VERIFIED, ACCEPTED))


def _timeline(output: Any) -> Timeline:
    """First and last token on the clock of the request."""
    stats, count = output.metrics, len(output.outputs[0].token_ids)
    first = stats.first_token_latency
    return Timeline(0.0, (first, first + max(0.0, stats.last_token_ts - stats.first_token_ts)), count)
