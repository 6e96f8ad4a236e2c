"""What decodes in a benchmark: our engine in one mode, or transformers' ``generate`` on the same weights."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dspark import LLM, SamplingParams, __version__
from dspark.bench.metrics import Timeline
from dspark.bench.modes import TRANSFORMERS, BenchMode
from dspark.sampling import AcceptanceRule
from dspark.types import Mode, Speculation

if TYPE_CHECKING:
    import torch

    from dspark.outputs import RequestOutput

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How every request of a point is sampled. ``rule`` None leaves the acceptance rule to the engine."""

    max_tokens: int
    temperature: float = 0.0
    rule: AcceptanceRule | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """Work done by an engine: forward steps, rounds that verified drafts, drafted tokens verified and accepted."""

    steps: int = 0
    drafted_rounds: int = 0
    verified: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """What came of some prompts, in their order."""

    timelines: tuple[Timeline, ...]
    token_ids: tuple[tuple[int, ...], ...]
    seconds: float
    counts: Counts


class Runner(Protocol):
    """Something that decodes prompts. ``engine`` is its name with its version; ``block_size`` the longest draft (0: none)."""

    @property
    def engine(self) -> str: ...
    @property
    def drafter(self) -> str: ...
    @property
    def block_size(self) -> int: ...

    def run(self, prompts: Prompts, concurrency: int, settings: Settings) -> Run:
        """Decode all prompts, ``concurrency`` at a time."""

    def close(self) -> None:
        """Give threads and memory back; closing twice is fine."""


class EngineRunner:
    """Our engine in one mode. Runners of several modes may share one ``llm``: the mode goes with every request."""

    def __init__(self, llm: LLM, speculation: Speculation) -> None:
        self.engine = f"dspark-{__version__}"
        self.llm = llm
        self.speculation = speculation
        speculates = speculation.mode is not Mode.OFF
        self.drafter = llm.config.drafter if speculates else "none"
        self.block_size = int(llm.describe()["draft_block_size"]) if speculates else 0

    def run(self, prompts: Prompts, concurrency: int, settings: Settings) -> Run:
        """Decode all prompts, ``concurrency`` at a time; the next begins when one ends."""
        params = SamplingParams(
            max_tokens=settings.max_tokens, temperature=settings.temperature, acceptance=settings.rule, ignore_eos=settings.ignore_eos
        )
        steps = self.llm.stats()["steps_total"]
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, speculation=str(self.speculation), max_concurrency=concurrency)
        seconds = time.perf_counter() - started
        self.llm.rest()
        choices = [output.choices[0] for output in outputs]
        counts = Counts(
            steps=round(self.llm.stats()["steps_total"] - steps),
            drafted_rounds=sum(choice.drafted_rounds for choice in choices),
            verified=sum(choice.drafted for choice in choices),
            accepted=sum(choice.accepted for choice in choices),
        )
        return Run(tuple(map(_timeline, outputs)), tuple(output.token_ids for output in outputs), seconds, counts)

    def close(self) -> None:
        """Stop the engine."""
        self.llm.close()


def _timeline(output: RequestOutput) -> Timeline:
    arrivals = output.choices[0].arrivals_s
    return Timeline(output.submitted_at, tuple(output.submitted_at + arrival for arrival in arrivals), len(output.token_ids))


class TransformersRunner:
    """``model.generate`` of transformers, one prompt after the other: the baseline everybody has."""

    drafter = "none"
    block_size = 0

    def __init__(self, model: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.engine = f"{TRANSFORMERS}-{importlib.metadata.version('transformers')}"
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def run(self, prompts: Prompts, concurrency: int, settings: Settings) -> Run:
        """Decode one prompt at a time; ValueError for any other concurrency."""
        if concurrency != 1:
            raise ValueError("the transformers baseline runs one prompt at a time")
        started = time.perf_counter()
        with ThreadPoolExecutor(1) as apart:  # a thread that ends: idle teams of compute threads would slow the engines down
            answers = apart.submit(lambda: [self._generate(prompt, settings) for prompt in prompts]).result()
        seconds = time.perf_counter() - started
        timelines, tokens = zip(*answers, strict=True)
        return Run(timelines, tokens, seconds, Counts(steps=sum(map(len, tokens))))

    def _generate(self, prompt: Sequence[int], settings: Settings) -> tuple[Timeline, tuple[int, ...]]:
        import torch

        ids = torch.tensor([list(prompt)], device=self.model.device)
        clock = ArrivalClock()
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": 1.0, "top_k": 0}
        if settings.ignore_eos:
            sampling["min_new_tokens"] = settings.max_tokens
        sent = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.max_tokens, streamer=clock, **sampling
            )
        tokens = tuple(output[0, ids.shape[1] :].tolist())
        return Timeline(sent, tuple(clock.arrivals), len(tokens)), tokens

    def close(self) -> None:
        """Drop the weights."""
        self.model = None


class ArrivalClock:
    """A streamer for ``generate`` that only notes when each token came; the first call carries the prompt."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """One call with the prompt, then one a token."""
        if self._has_prompt:
            self.arrivals.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to do when the answer ends: the last token has been put."""


@dataclass(frozen=True, slots=True)
class Source:
    """What the runners load. ``model`` is the engine's (None: the embedded one), ``folder`` where its weights lie."""

    model: str | None
    folder: str
    drafter: str
    max_num_seqs: int
    max_model_len: int | None = None
    kv_tokens: int | None = None

    def open(self, modes: Sequence[BenchMode], dtype: str) -> dict[BenchMode, Runner]:
        """A runner for every mode: one engine without a drafter, one shared by all modes that speculate, one baseline.

        The prefix cache is off: repeats of a prompt shall cost what the first one cost.
        """
        shared: dict[bool, LLM] = {}
        runners: dict[BenchMode, Runner] = {}
        for mode in modes:
            if mode.speculation is None:
                runners[mode] = TransformersRunner(self.folder, dtype)
                continue
            if mode.uses_drafter not in shared:
                shared[mode.uses_drafter] = self._engine(modes if mode.uses_drafter else (), dtype)
            runners[mode] = EngineRunner(shared[mode.uses_drafter], mode.speculation)
        return runners

    def _engine(self, modes: Sequence[BenchMode], dtype: str) -> LLM:
        """An engine for some modes; without any, one that never drafts. Only adaptive ones need step costs."""
        is_adaptive = any(mode.speculation is not None and mode.speculation.mode is Mode.ADAPTIVE for mode in modes)
        return LLM(
            self.model,
            drafter=self.drafter if modes else "none",
            speculation="off" if not modes else "adaptive" if is_adaptive else "static:1",
            dtype=dtype,
            max_model_len=self.max_model_len,
            kv_tokens=self.kv_tokens,
            max_num_seqs=self.max_num_seqs,
            prefix_cache=False,
        )
