"""The target's forward as CUDA graphs, one or two for each size that steps are padded to: for few rows of several tokens, and for any.

A graph replays the launches of one forward without Python: on fixed tensors (``step_buffers.py``), from token ids to logits, best
tokens, taps and the drafter's context. Steps larger than the largest graph run the same kernels one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.errors import ConfigError
from dspark.kernels.graphs import Capture, nothing_collected
from dspark.kernels.host_copy import HostCopy
from dspark.kernels.small_linear import MAX_ROWS
from dspark.kernels.step_end import note_best
from dspark.kernels.top import first_argmax
from dspark.types import DeviceDrafts, TokenLogprob
from dspark.workers.blocks import BlockPool
from dspark.workers.verifier.attention import RaggedStep
from dspark.workers.verifier.device_edits import Scores
from dspark.workers.verifier.forward import Feed, Forward, StepInput, StepOutput
from dspark.workers.verifier.fused import join_products
from dspark.workers.verifier.step_buffers import NOTHING, HostStep, StepBuffers
from dspark.workers.verifier.targets import Target

SHOW_EVERY_S = 2.0
TIMED_REPLAYS = 20

Run = Callable[[], StepOutput]


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """What graphs are captured for. ``tokens``: sizes, rising; ``longest``: tokens that a row usually has at most."""

    tokens: tuple[int, ...]
    max_rows: int
    max_blocks: int  # block ids that the rows of one step name at most
    longest: int
    with_trees: bool
    with_matches: bool = False  # leave behind which drafts equal the best token before them


class OwnTokens:
    """The token of every wanted row, on its way to the host, and what it scored, if anybody asks for that."""

    def __init__(self, tokens: Tensor, host: Tensor, scores: Scores | None = None) -> None:
        self._scores = scores
        self._copy = HostCopy(tokens, host)

    def read(self) -> list[int]:
        """Wait for them."""
        tokens: list[int] = self.numbers().tolist()
        return tokens

    def numbers(self) -> NDArray[np.int64]:
        """``read`` as an array of its own."""
        numbers: NDArray[np.int64] = self._copy.read().numpy()
        return numbers

    def score(self, row: int, token: int, top: int) -> TokenLogprob:
        """Log-probability of the token that was taken at a row, with ``top`` alternatives."""
        assert self._scores is not None
        return self._scores.of(row, token, top)


class GraphForward(Forward):
    """A ``Forward`` that replays what it has captured; ``prepare`` captures."""

    def __init__(
        self, target: Target, pool: BlockPool, taps: tuple[int, ...], feed: Feed | None, sizes: GraphSizes, capture: Capture
    ) -> None:
        super().__init__(target, pool.num_blocks, pool.block_size, taps, feed)
        self.sizes = sizes
        self.buffers = StepBuffers(target.device, sizes.tokens[-1], sizes.max_rows, sizes.max_blocks)
        self._capture = capture
        self._replays: dict[tuple[int, int], Run] = {}  # by tokens and rows, padding included
        self._outputs: dict[str, Tensor] = {}  # shared by all graphs: each would keep its own otherwise
        is_cuda = target.device.type == "cuda"
        self._hosts = [torch.zeros(sizes.tokens[-1], dtype=torch.int64, pin_memory=is_cuda) for _ in range(3)]
        self._turn = 0

    @torch.inference_mode()
    def prepare(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Capture all sizes, the largest first so that the others fit into its memory. ConfigError if the device has too little."""
        sizes = self.sizes.tokens[::-1]
        begin = shown_s = time.perf_counter()
        with nothing_collected():
            for done, size in enumerate(sizes):
                if time.perf_counter() - shown_s > SHOW_EVERY_S:
                    shown_s = time.perf_counter()
                    progress(f"capturing graphs: {done} of {len(sizes)} sizes")
                try:
                    for num_rows in self._row_choices(size):
                        self._replays[size, num_rows] = self._captured(size, num_rows)
                except torch.OutOfMemoryError as error:
                    raise ConfigError(
                        f"{self.target.device} has too little memory left for the graph of {size} tokens: lower kv_tokens or graph_tokens"
                    ) from error
        progress(f"captured graphs of {len(sizes)} sizes up to {sizes[0]} tokens in {time.perf_counter() - begin:.1f} s")

    @torch.inference_mode()
    def run(self, inputs: StepInput) -> StepOutput:
        size = len(inputs.ids) + inputs.padding
        if size not in self.sizes.tokens:
            return super().run(inputs)
        step = HostStep.of(inputs.ids, inputs.positions, inputs.slots, inputs.wanted, inputs.rows)
        output = self.replay(size, step)
        return StepOutput(output.logits[: len(inputs.wanted)], output.taps, self.own_tokens(len(inputs.wanted)))

    def leave(self, output: StepOutput, ids: Tensor, wanted: Tensor) -> StepOutput:
        """The best tokens, where graphs leave them too, if there is room for so many."""
        count = wanted.shape[0]
        if count > self.sizes.tokens[-1]:
            return output
        self._note_best(first_argmax(output.logits), ids, wanted)
        return StepOutput(output.logits, output.taps, self.own_tokens(count))

    @torch.inference_mode()
    def give_tokens(self, tokens: NDArray[np.int64]) -> None:
        """Put tokens that the host knows where a step leaves its best ones; no step may be under way."""
        self.buffers.own[: len(tokens)].copy_(torch.from_numpy(tokens))

    @torch.inference_mode()
    def replay(self, size: int, step: HostStep) -> StepOutput:
        """Run a step of ``size`` tokens; nothing waits for the device."""
        num_rows = self._num_rows(size, step)
        self.buffers.fill(size, num_rows, step)
        return self._replays[size, num_rows]()

    @torch.inference_mode()
    def replay_drafts(self, size: int, step: HostStep, drafts: DeviceDrafts, num_drafting: int, row_tokens: int) -> None:
        """``replay`` where ids, positions and slots of the first ``num_drafting`` rows, ``row_tokens`` tokens each, are on the device."""
        num_rows = self._num_rows(size, step)
        self.buffers.fill(size, num_rows, step)
        self.buffers.overwrite(size, num_rows, drafts, num_drafting, row_tokens)
        self._replays[size, num_rows]()

    def logits(self) -> Tensor:
        """[N, V]: where every graph leaves its logits."""
        return self._outputs["logits"]

    @torch.inference_mode()
    def own_tokens(self, count: int, scores: Scores | None = None) -> OwnTokens:
        """The first ``count`` tokens of the step that was launched last; at most three are under way at once."""
        self._turn = (self._turn + 1) % len(self._hosts)
        return OwnTokens(self.buffers.own[:count], self._hosts[self._turn], scores)

    def _row_choices(self, size: int) -> tuple[int, ...]:
        return self.buffers.row_choices(size, self.sizes.longest)

    def _num_rows(self, size: int, step: HostStep) -> int:
        """Rows of the smallest layout that holds the step's and the padding's."""
        return next(num_rows for num_rows in self._row_choices(size) if num_rows > len(step.lengths))

    def _captured(self, size: int, num_rows: int) -> Run:
        sizes, buffers = self.sizes, self.buffers
        views = buffers.views(size, num_rows, self.block_size, min(size, sizes.longest), sizes.with_trees)
        buffers.fill(size, num_rows, NOTHING)

        def run() -> StepOutput:
            step = RaggedStep(self.store, views.batch, views.slots)
            ids = buffers.gather_ids(views)
            output = self.forward(ids, views.positions, views.wanted, step)
            self._note_best(first_argmax(output.logits), ids, views.wanted)
            taps = None if output.taps is None or self.feed is not None else self._kept("taps", output.taps)
            return StepOutput(self._kept("logits", output.logits), taps)

        return self._best(run) if size <= MAX_ROWS and self.target.device.type == "cuda" else self._capture(run)

    def _note_best(self, best: Tensor, ids: Tensor, wanted: Tensor) -> None:
        """Leave the best tokens [L] of the rows ``wanted`` of a step of ``ids`` [T] on the device."""
        own, matched = self.buffers.own[: len(best)], self.buffers.matched[: len(best)]
        if self.sizes.with_matches:
            note_best(best, ids, wanted, own, matched)
        else:
            own.copy_(best)

    def _best(self, run: Run) -> Run:
        """The faster of two graphs, with products of fused layers joined with what surrounds them and apart, as measured here."""
        captured: list[Run] = []
        for joins in (True, False):
            join_products(self.target, joins)
            captured.append(self._capture(run))
        seconds = [_seconds(replay) for replay in captured]
        joins = seconds[0] <= seconds[1]
        join_products(self.target, joins)
        return captured[0 if joins else 1]

    def _kept(self, name: str, value: Tensor) -> Tensor:
        """The first rows of the tensor that all graphs leave such values in."""
        if name not in self._outputs:  # at the first call, which is not captured
            self._outputs[name] = value.new_empty(self.sizes.tokens[-1], *value.shape[1:])
        kept = self._outputs[name][: value.shape[0]]
        kept.copy_(value)
        return kept


def _seconds(replay: Run) -> float:
    """Of one call of several in a row."""
    replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(TIMED_REPLAYS):
        replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / TIMED_REPLAYS


def fitting(sizes: Sequence[int], num_tokens: int) -> int:
    """The smallest of the rising sizes that holds so many tokens; beyond the largest, the number itself."""
    return next((size for size in sizes if size >= num_tokens), num_tokens)
