"""What decodes in a benchmark: our engine in one mode, or transformers' ``generate`` on the same weights."""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dspark import LLM, SamplingParams, __version__
from dspark.bench.metrics import Timeline
from dspark.bench.modes import TRANSFORMERS, BenchMode
from dspark.bench.synthetic import SyntheticAcceptance, force
from dspark.bench.tempo import Tempo
from dspark.errors import ConfigError
from dspark.sampling import AcceptanceRule
from dspark.types import Mode, Speculation

if TYPE_CHECKING:
    import torch

    from dspark.outputs import RequestOutput

Prompts = Sequence[Sequence[int]]
GOLDEN = (5**0.5 - 1) / 2
_WINDOW = re.compile(r'verified_window_total\{drafts="(\d+)"\}')


@dataclass(frozen=True, slots=True)
class Settings:
    """How every request of a point is sampled. ``rule`` None leaves the acceptance rule to the engine.

    ``varies``: answers may have from half of ``max_tokens`` to one and a half. ``more``: other fields of ``SamplingParams``.
    """

    max_tokens: int
    temperature: float = 0.0
    rule: AcceptanceRule | None = None
    ignore_eos: bool = False
    varies: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def lengths(self, count: int) -> list[int]:
        """The most tokens of each of ``count`` answers: spread evenly, and the same for everybody who asks."""
        if not self.varies:
            return [self.max_tokens] * count
        return [max(1, round(self.max_tokens * (0.5 + place * GOLDEN % 1.0))) for place in range(1, count + 1)]


@dataclass(frozen=True, slots=True)
class Counts:
    """Work done by an engine.

    ``steps``: forwards; ``windows``: how many rounds (request x step pairs that yielded tokens) verified 0, 1, 2, … drafted
    tokens; ``accepted`` drafted tokens. ``timed_steps`` steps took ``measured_s``, and a cost table had said ``predicted_s``.
    """

    steps: int = 0
    windows: Mapping[int, int] = field(default_factory=dict)
    accepted: int = 0
    timed_steps: int = 0
    predicted_s: float = 0.0
    measured_s: float = 0.0

    @property
    def rounds(self) -> int:
        return sum(self.windows.values())

    @property
    def drafted_rounds(self) -> int:
        """Rounds that verified at least one drafted token."""
        return self.rounds - self.windows.get(0, 0)

    @property
    def verified(self) -> int:
        """Drafted tokens verified."""
        return sum(size * rounds for size, rounds in self.windows.items())


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
    """Our engine in one mode. Runners of several modes may share one ``llm``: the mode goes with every request.

    ``tempo``: tell all times in steady seconds; ConfigError if the engine is not on the CPU.
    """

    def __init__(self, llm: LLM, speculation: Speculation, tempo: Tempo | None = None) -> None:
        if tempo is not None and (device := llm.engine.target.device).type != "cpu":
            raise ConfigError(f"--steady times work of a CPU, and the engine is on {device}")
        self.engine = f"dspark-{__version__}"
        self.llm = llm
        self.speculation = speculation
        self._tempo = tempo
        speculates = speculation.mode is not Mode.OFF
        self.drafter = llm.config.drafter if speculates else "none"
        self.block_size = int(llm.describe()["draft_block_size"]) if speculates else 0

    def run(self, prompts: Prompts, concurrency: int, settings: Settings) -> Run:
        """Decode all prompts, ``concurrency`` at a time; the next begins when one ends."""
        params = [
            SamplingParams(
                max_tokens=most,
                temperature=settings.temperature,
                acceptance=settings.rule,
                ignore_eos=settings.ignore_eos,
                **settings.more,
            )
            for most in settings.lengths(len(prompts))
        ]
        before = self.llm.stats()
        with nullcontext() if self._tempo is None else self._tempo.watching(self.llm.engine):
            started = time.perf_counter()
            outputs = self.llm.generate(prompts, params, speculation=str(self.speculation), max_concurrency=concurrency)
            ended = time.perf_counter()
        self.llm.rest()
        counts = _counts(before, self.llm.stats(), sum(output.choices[0].accepted for output in outputs))
        at: Callable[[float], float] = (lambda moment_s: moment_s) if self._tempo is None else self._tempo.at
        timelines = tuple(_timeline(output, at) for output in outputs)
        return Run(timelines, tuple(output.token_ids for output in outputs), at(ended) - at(started), counts)

    def close(self) -> None:
        """Stop the engine."""
        self.llm.close()


def _counts(before: Mapping[str, float], after: Mapping[str, float], accepted: int) -> Counts:
    """What the engine did between two looks at its statistics; ``accepted`` drafted tokens were in answers."""
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    windows = {int(found[1]): round(grown[name]) for name in grown if (found := _WINDOW.fullmatch(name)) and grown[name]}
    return Counts(
        steps=round(grown["steps_total"]),
        windows=windows,
        accepted=accepted,
        timed_steps=round(grown["timed_steps_total"]),
        predicted_s=grown["predicted_seconds_total"],
        measured_s=grown["step_seconds_total"],
    )


def _timeline(output: RequestOutput, at: Callable[[float], float]) -> Timeline:
    sent_s = output.submitted_at
    arrivals = tuple(at(sent_s + arrival) for arrival in output.choices[0].arrivals_s)
    return Timeline(at(sent_s), arrivals, len(output.token_ids))


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
            asked = list(zip(prompts, settings.lengths(len(prompts)), strict=True))
            answers = apart.submit(lambda: [self._generate(prompt, most, settings) for prompt, most in asked]).result()
        seconds = time.perf_counter() - started
        timelines, tokens = zip(*answers, strict=True)
        num_tokens = sum(map(len, tokens))
        return Run(timelines, tokens, seconds, Counts(steps=num_tokens, windows={0: num_tokens}))

    def _generate(self, prompt: Sequence[int], max_tokens: int, settings: Settings) -> tuple[Timeline, tuple[int, ...]]:
        import torch

        ids = torch.tensor([list(prompt)], device=self.model.device)
        clock = ArrivalClock()
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": 1.0, "top_k": 0}
        if settings.ignore_eos:
            sampling["min_new_tokens"] = max_tokens
        sent = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, streamer=clock, **sampling
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
    synthetic: SyntheticAcceptance | None = None
    tempo: Tempo | None = None

    def open(self, modes: Sequence[BenchMode], dtype: str) -> dict[BenchMode, Runner]:
        """A runner for every mode: an engine without a drafter and one shared by all modes that speculate, both for each
        driver, and one baseline.

        The prefix cache is off: repeats of a prompt shall cost what the first one cost. ConfigError if ``tempo`` does not fit.
        """
        shared: dict[tuple[bool, str], LLM] = {}
        runners: dict[BenchMode, Runner] = {}
        for mode in modes:
            if mode.speculation is None:
                if self.tempo is not None:
                    raise ConfigError(f"--steady watches our own engine: leave {mode.label} out of --modes")
                runners[mode] = TransformersRunner(self.folder, dtype)
                continue
            alike = (mode.uses_drafter, mode.driver)
            if alike not in shared:
                shared[alike] = self._engine([other for other in modes if (other.uses_drafter, other.driver) == alike], dtype)
            runners[mode] = EngineRunner(shared[alike], mode.speculation, self.tempo)
        return runners

    def _engine(self, modes: Sequence[BenchMode], dtype: str) -> LLM:
        """An engine for modes that all speculate or all do not, under one driver."""
        speculates = modes[0].uses_drafter
        llm = LLM(
            self.model,
            drafter=self.drafter if speculates else "none",
            speculation="off" if not speculates else "adaptive" if any(mode.needs_costs for mode in modes) else "static:1",
            dtype=dtype,
            max_model_len=self.max_model_len,
            kv_tokens=self.kv_tokens,
            max_num_seqs=self.max_num_seqs,
            prefix_cache=False,
            **({"driver": modes[0].driver} if modes[0].driver else {}),
        )
        if speculates and self.synthetic is not None:
            force(llm.engine, self.synthetic)
        return llm
