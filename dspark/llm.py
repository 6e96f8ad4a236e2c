"""The Python door: ``LLM`` loads a model and generates, in this process, without Ray."""

from __future__ import annotations

import itertools
import logging
import numbers
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dspark.config import EngineConfig
from dspark.config_file import engine_config
from dspark.errors import BadRequest
from dspark.flight import Flight, TokenStream, run_all
from dspark.outputs import Collector, RequestOutput, make_output
from dspark.prompting import encode, render_chat
from dspark.sampling import SamplingParams
from dspark.types import Mode, Request, Speculation

if TYPE_CHECKING:
    from types import TracebackType

    from dspark.workers.build import Loaded
    from dspark.workers.verifier.engine import Engine

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or chat messages
log = logging.getLogger("dspark")


class LLM:
    """A model with its drafter, ready to generate.

    ``model`` is a folder or hub name (None: the embedded model); ``drafter`` auto, none, ngram or a folder;
    ``speculation`` adaptive, static:K or off. ``settings`` are the other fields of ``EngineConfig``. ConfigError names
    the setting that cannot work. Several threads may generate at once. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        model: str | None = None,
        drafter: str = "auto",
        speculation: str = "adaptive",
        dtype: str = "auto",
        max_model_len: int | None = None,
        kv_tokens: int | None = None,
        **settings: Any,
    ) -> None:
        named = {
            "model": model,
            "drafter": drafter,
            "speculation": speculation,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "kv_tokens": kv_tokens,
        }
        config = engine_config(named | settings)
        from dspark.workers.build import load_engine
        from dspark.workers.own_thread import call_in_own_thread

        self._open(call_in_own_thread(lambda: load_engine(config, log.info)))

    @classmethod
    def with_draft_workers(cls, addresses: Sequence[str], token: str, *, draft_wait_ms: float | None = None, **settings: Any) -> LLM:
        """An LLM whose drafts come from ``dspark draft-worker`` processes at these addresses (host:port), which all know ``token``.

        ``settings`` are the fields of ``EngineConfig``; the workers must have been given the same model, drafter and dtype.
        """
        config = engine_config(settings)
        from dspark.drafting import DraftWorkerFacts
        from dspark.router.drafters import assign_by_load
        from dspark.workers.disaggregated import RemoteDrafting, load_remote_engine
        from dspark.workers.own_thread import call_in_own_thread
        from dspark.workers.wire.draft_client import grpc_sessions

        facts = [DraftWorkerFacts(address, address, token) for address in addresses]
        wait_s = None if draft_wait_ms is None else draft_wait_ms / 1e3
        remote = RemoteDrafting(grpc_sessions("llm"), lambda links: links.set_workers(facts), assign_by_load, wait_s)
        return cls.of(call_in_own_thread(lambda: load_remote_engine(config, remote, log.info)))

    @classmethod
    def of(cls, loaded: Loaded) -> LLM:
        """An LLM around an engine that is already loaded."""
        llm = cls.__new__(cls)
        llm._open(loaded)
        return llm

    def _open(self, loaded: Loaded) -> None:
        from dspark.workers.verifier.host import EngineHost

        self._loaded = loaded
        self._host = EngineHost(loaded.engine)
        self._numbers = itertools.count()
        self._finalizer = weakref.finalize(self, self._host.close)  # also at exit, before threads are torn down

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None if it has none."""
        return self._loaded.tokenizer

    @property
    def model_name(self) -> str:
        return self._loaded.model_name

    @property
    def config(self) -> EngineConfig:
        """The settings in force; nothing in them is ``auto`` any more."""
        return self._loaded.config

    @property
    def engine(self) -> Engine:
        """The engine itself, to look at or to instrument; it belongs to its own thread while requests run."""
        return self._loaded.engine

    def describe(self) -> dict[str, Any]:
        """The effective configuration, with the architecture and the KV capacity."""
        return {"model_name": self.model_name, **self._loaded.describe}

    def stats(self) -> dict[str, float]:
        """Counters and gauges of the engine since it started."""
        return self._host.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculation: str | None = None,
        max_concurrency: int | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, batched, and return their results in order.

        A prompt is text, a list of token ids or a list of chat messages; a list of prompts may mix them. ``params`` is
        one for all or one each. ``speculation`` overrides the engine's for this call. ``max_concurrency`` limits how
        many sequences run at once (each of ``n`` counts). Everything is checked before anything runs: BadRequest.
        """
        self._check_open()
        if max_concurrency is None:
            max_concurrency = 2 * self.config.max_num_seqs  # half of them wait, ready to fill a place at once
        elif isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1:
            raise BadRequest(f"max_concurrency must be a whole number from 1, not {max_concurrency!r}", "max_concurrency")
        many = [prompts] if _is_single(prompts) else list(prompts)
        groups = [self._prepare(prompt, sampling, speculation) for prompt, sampling in zip(many, _one_each(params, len(many)), strict=True)]
        run_all(Flight(self._host, self, wakes_at_end=True), [collector for group in groups for collector in group], max_concurrency)
        return [make_output(group) for group in groups]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, speculation: str | None = None) -> TokenStream:
        """Complete one prompt and iterate over its deltas, one a verification round; with ``n`` > 1 choices interleave.

        The request starts at once. Closing or dropping the stream aborts it.
        """
        self._check_open()
        (sampling,) = _one_each(params, 1)
        return TokenStream(Flight(self._host, self), self._prepare(prompt, sampling, speculation))

    def close(self) -> None:
        """Stop the engine; requests that still run end with ``abort``. Closing twice is fine."""
        self._finalizer()

    def rest(self) -> None:
        """End the engine's threads until the next call; requests that still run end with ``abort``.

        Idle engines hold teams of compute threads, which slow other engines of the same process down
        (``dspark.workers.own_thread``): whoever uses several in turns lets the others rest.
        """
        self._check_open()
        self._finalizer.detach()
        self._host.stop()
        self._open(self._loaded)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this LLM is closed")
        self._host.start()

    def _prepare(self, prompt: Any, sampling: SamplingParams, speculation: str | None) -> list[Collector]:
        """One checked request for each of ``n`` choices."""
        from dspark.workers.verifier.text import TextStream

        mode = self._speculation(speculation)
        prompt_ids = self._token_ids(prompt)
        requests = [Request(f"llm-{next(self._numbers)}", prompt_ids, sampling.child(i), speculation=mode) for i in range(sampling.n)]
        self._loaded.engine.check(requests[0])  # the others differ in their seeds only
        return [Collector(i, request, TextStream(self.tokenizer, request.sampling)) for i, request in enumerate(requests)]

    def _token_ids(self, prompt: Any) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(encode(self.tokenizer, prompt))
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise BadRequest(f"a prompt is text, a list of token ids or a list of messages, not {type(prompt).__name__}", "prompt")
        if any(isinstance(item, Mapping) for item in prompt):
            return tuple(render_chat(self.tokenizer, prompt))
        if not all(isinstance(item, numbers.Integral) and not isinstance(item, bool) for item in prompt):
            raise BadRequest("a prompt that is a list must hold only whole numbers (token ids) or only messages", "prompt")
        return tuple(int(item) for item in prompt)

    def _speculation(self, text: str | None) -> Speculation | None:
        if text is None:
            return None
        try:
            mode = Speculation.parse(text)
        except (AttributeError, ValueError):
            raise BadRequest(f"speculation must be off, static:K, adaptive, shadow or tree:NODES, not {text!r}", "speculation") from None
        if mode.mode is not Mode.OFF and self._loaded.engine.drafter.block_size == 0:
            raise BadRequest(f"speculation {text!r} needs a drafter, and this engine has none", "speculation")
        return mode


def _is_single(prompts: Any) -> bool:
    """Whether this is one prompt: text, or a list of token ids or messages (not a list of prompts)."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return True  # what is no prompt at all is refused as one
    return bool(prompts) and isinstance(prompts[0], (numbers.Integral, Mapping))


def _one_each(params: Any, count: int) -> list[SamplingParams]:
    """Sampling parameters for ``count`` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise BadRequest("params must be SamplingParams, or a list of them", "params")
    if len(params) != count:
        raise BadRequest(f"{len(params)} params for {count} prompts", "params")
    return list(params)
