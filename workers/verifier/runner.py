"""One forward of the target over the rows of a plan, on one flat token axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.buckets import graph_sizes, padded_size
from dspark.kernels.graphs import Capture
from dspark.kernels.paged_attention import AttentionRow
from dspark.types import DeviceDrafts, DeviceLaws, PlanRow, VerifyPlan
from dspark.workers.blocks import BlockPool
from dspark.workers.verifier.device_edits import DeviceEdits, Scores
from dspark.workers.verifier.device_judge import DeviceJudge
from dspark.workers.verifier.forward import BestTokens, Feed, Forward, StepInput
from dspark.workers.verifier.graphs import GraphForward, GraphSizes, fitting
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.step_buffers import HostStep
from dspark.workers.verifier.targets import Target
from dspark.workers.verifier.tree import depths, visible
from dspark.workers.verifier.verdict import Verdict


@dataclass(slots=True)
class StepResult:
    """What a forward leaves: logits [L, V] of the wanted tokens and taps [T, m * d] of all tokens, padding at the tail included.

    ``first_row[i]`` is the first logits row of plan row i: ``1 + num_draft`` rows if it samples, preceded by
    ``num_scored[i]`` rows that only score prompt tokens. ``best``: the best token of each logits row where the device has found it.
    """

    logits: Tensor
    first_row: list[int]
    num_scored: list[int]
    taps: Tensor | None
    best: BestTokens | None = None


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """That steps up to ``max_tokens`` run from graphs. ``longest``: tokens of a row that verifies a whole draft.

    ``law_width``: ids of the laws that a drafter on the device leaves.
    """

    capture: Capture
    max_tokens: int
    max_rows: int
    max_model_len: int
    longest: int = 1
    with_trees: bool = False
    with_matches: bool = False
    law_width: int = 1

    def sizes(self, block_size: int) -> GraphSizes:
        blocks = self.max_rows * -(-self.max_model_len // block_size)
        return GraphSizes(graph_sizes(self.max_tokens), self.max_rows, blocks, self.longest, self.with_trees, self.with_matches)


class Runner:
    """Turns a plan into the flat token axis and runs the model on it. With ``graphs``, call ``prepare`` before the first step."""

    def __init__(
        self, target: Target, pool: BlockPool, taps: tuple[int, ...], feed: Feed | None = None, graphs: GraphOptions | None = None
    ) -> None:
        self.target = target
        self.pool = pool
        self.taps = taps
        self._graphs: GraphForward | None = None
        self._judge: DeviceJudge | None = None
        self.draft_laws: DeviceLaws | None = None
        sizes: GraphSizes | None = None
        if graphs is None:
            self._model = Forward(target, pool.num_blocks, pool.block_size, taps, feed)
        else:
            sizes = graphs.sizes(pool.block_size)
            self._model = self._graphs = GraphForward(target, pool, taps, feed, sizes, graphs.capture)
            if target.ranks is None:
                self.draft_laws = _no_laws(graphs, target.device)
                edits = DeviceEdits(graphs.max_rows, target.vocab_size, self.draft_laws.tokens)
                self._judge = DeviceJudge(self._graphs.buffers, graphs.max_rows, self.draft_laws, edits, graphs.capture)
        self._sizes = () if sizes is None else sizes.tokens
        if target.ranks is not None:
            target.ranks.start(sizes)
        self.store = self._model.store

    def prepare(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Capture the graphs, if there are to be any."""
        if self._graphs is not None:
            self._graphs.prepare(progress)
            if self._judge is not None:
                self._judge.prepare(self._sizes, self._graphs.logits)

    def padded(self, num_tokens: int) -> int:
        """The size that a step of so many tokens is padded to."""
        if self._sizes:
            return fitting(self._sizes, num_tokens)
        return padded_size(num_tokens, self.target.device, self.target.dtype)

    @property
    def step_tokens(self) -> tuple[Tensor, Tensor]:
        """What every graph leaves on the device: the best token of each wanted row, and whether the token behind the row equals it."""
        assert self._graphs is not None
        return self._graphs.buffers.own, self._graphs.buffers.matched

    @property
    def max_launched(self) -> int:
        """Rows that ``launch`` takes at most; 0 without graphs, and where other ranks would have to be told of tokens."""
        return self._sizes[-1] if self._sizes and self.target.ranks is None else 0

    def give_tokens(self, tokens: NDArray[np.int64]) -> None:
        """Let the next step that is launched take these, as the tokens of rows 0, 1, … of the step before it."""
        assert self._graphs is not None
        self._graphs.give_tokens(tokens)

    def launch(self, step: HostStep) -> BestTokens:
        """Launch a step from the graphs, and wait for nothing; it may take its tokens from the step before."""
        assert self._graphs is not None
        size = self.padded(len(step.positions))
        self._graphs.replay(size, step)
        return self._graphs.own_tokens(len(step.wanted), self._judge_launched(size, step, 0, 1))

    def launch_drafts(self, step: HostStep, drafts: DeviceDrafts, num_drafting: int, num_drafts: int) -> BestTokens:
        """``launch`` where the first ``num_drafting`` rows verify ``num_drafts`` drafts each, all of which are on the device."""
        assert self._graphs is not None
        size = self.padded(len(step.positions))
        self._graphs.replay_drafts(size, step, drafts, num_drafting, num_drafts + 1)
        return self._graphs.own_tokens(len(step.wanted), self._judge_launched(size, step, num_drafting, num_drafts + 1))

    def _judge_launched(self, size: int, step: HostStep, num_drafting: int, row_tokens: int) -> Scores | None:
        """Leave the tokens of requests that take others in place of the best ones; what they scored, if anybody asks."""
        if step.asked is None:
            return None
        assert self._judge is not None
        return self._judge.run(size, step.asked, num_drafting, row_tokens, step.edits)

    def forget_counts(self) -> None:
        """The host judges a step: what the device knows of tokens so far is out of date."""
        if self._judge is not None:
            self._judge.edits.forget_counts()

    def release(self, request_id: str) -> None:
        """A request ended."""
        if self._judge is not None:
            self._judge.edits.release(request_id)

    def forward(self, plan: VerifyPlan, sequences: Mapping[str, Sequence]) -> StepResult:
        """Run the rows; writes their KV. Padding up to ``plan.token_bucket`` writes nothing and is seen by nobody."""
        inputs, first_row, num_scored = self._inputs(plan, sequences)
        num_wanted = len(inputs.wanted)
        spare = padded_size(num_wanted, self.target.device, self.target.dtype) - num_wanted
        inputs = replace(inputs, wanted=[*inputs.wanted, *[0] * spare])
        with nullcontext() if self.target.ranks is None else self.target.ranks.step(inputs):
            output = self._model.run(inputs)
        return StepResult(output.logits[:num_wanted], first_row, num_scored, output.taps, output.best)

    def launcher(self, plan: VerifyPlan, sequences: Mapping[str, Sequence]) -> Callable[[], BestTokens]:
        """The step of a plan, at most ``max_launched`` tokens, to be launched whenever it is called."""
        inputs, _, _ = self._inputs(plan, sequences)
        step = HostStep.of(inputs.ids, inputs.positions, inputs.slots, inputs.wanted, inputs.rows)
        return lambda: self.launch(step)

    def _inputs(self, plan: VerifyPlan, sequences: Mapping[str, Sequence]) -> tuple[StepInput, list[int], list[int]]:
        """A plan on the flat token axis, and of each row its first row of logits and how many prompt tokens it scores."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[AttentionRow] = []
        wanted: list[int] = []
        first_row: list[int] = []
        num_scored: list[int] = []
        for row in plan.rows:
            sequence = sequences[row.request_id]
            table = self.pool.table(row.request_id)
            begin, end = row.start, row.start + row.num_tokens
            draft = sequence.draft.first(row.num_draft) if row.num_draft and sequence.draft is not None else None
            branches = draft is not None and not draft.is_chain
            parents = draft.parents if draft is not None and branches else range(-1, row.num_draft - 1)
            rows.append(AttentionRow(len(ids), row.num_tokens, end, table, visible(parents, row.num_known) if branches else None))
            scored = _num_scored(row, sequence)
            first = len(ids) + row.num_known - (1 if row.samples else 0)
            wanted.extend(range(len(ids), len(ids) + scored))
            first_row.append(len(wanted))
            num_scored.append(scored)
            if row.samples:
                wanted.extend(range(first, first + 1 + row.num_draft))
            ids.extend(sequence.tokens[begin : begin + row.num_known])
            positions.extend(range(begin, begin + row.num_known))
            if draft is not None:
                ids.extend(draft.tokens)
                positions.extend(begin + row.num_known + depth for depth in depths(parents))
            slots.extend(self._slots(table, begin, end))
        return StepInput(ids, positions, slots, rows, wanted, plan.token_bucket - len(ids)), first_row, num_scored

    def keep_paths(self, plan: VerifyPlan, verdicts: Mapping[str, Verdict]) -> None:
        """Move the KV of accepted nodes to the positions that their tokens are committed to, wherever it is not there already.

        Every node had a slot of its own, in the order of the draft.
        """
        sources: list[int] = []
        targets: list[int] = []
        for row in plan.rows:
            verdict = verdicts.get(row.request_id)
            if verdict is None or verdict.path is None:
                continue
            base, table = row.start + row.num_known, self.pool.table(row.request_id)
            for depth, node in enumerate(verdict.path):
                if node != depth:
                    sources += self._slots(table, base + node, base + node + 1)
                    targets += self._slots(table, base + depth, base + depth + 1)
        if not sources:
            return
        if self.target.ranks is not None:
            self.target.ranks.move(sources, targets)
        self._model.move(sources, targets)

    def _slots(self, table: object, begin: int, end: int) -> list[int]:
        size = self.pool.block_size
        return [table[p // size] * size + p % size for p in range(begin, end)]  # type: ignore[index]


def _no_laws(graphs: GraphOptions, device: torch.device) -> DeviceLaws:
    """Room for the drafts of all rows and their laws."""
    shape = (graphs.max_rows, max(1, graphs.longest - 1), graphs.law_width)
    tokens, ids = (torch.zeros(part, dtype=torch.int64, device=device) for part in (shape[:2], shape))
    return DeviceLaws(tokens, ids, torch.zeros(shape, dtype=torch.float32, device=device))


def _num_scored(row: PlanRow, sequence: Sequence) -> int:
    """How many of the row's tokens are asked for prompt log-probabilities (each scores the token after it)."""
    if not sequence.wants_prompt_logprobs:
        return 0
    return max(0, min(row.start + row.num_known, sequence.num_prompt - 1) - row.start)
