"""One forward of the target over the rows of a plan, on one flat token axis."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from dspark.kernels.buckets import padded_size
from dspark.kernels.paged_attention import AttentionRow
from dspark.types import PlanRow, VerifyPlan
from dspark.workers.blocks import BlockPool
from dspark.workers.verifier.forward import Forward, StepInput
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.targets import Target
from dspark.workers.verifier.tree import depths, visible
from dspark.workers.verifier.verdict import Verdict


@dataclass(slots=True)
class StepResult:
    """What a forward leaves: logits [L, V] of the wanted tokens and taps [T, m * d] of all real tokens.

    ``first_row[i]`` is the first logits row of plan row i: ``1 + num_draft`` rows if it samples, preceded by
    ``num_scored[i]`` rows that only score prompt tokens.
    """

    logits: Tensor
    first_row: list[int]
    num_scored: list[int]
    taps: Tensor | None


class Runner:
    """Turns a plan into the flat token axis and runs the model on it."""

    def __init__(self, target: Target, pool: BlockPool, taps: tuple[int, ...]) -> None:
        self.target = target
        self.pool = pool
        self.taps = taps
        self._model = Forward(target, pool.num_blocks, pool.block_size, taps)
        self.store = self._model.store

    def forward(self, plan: VerifyPlan, sequences: Mapping[str, Sequence]) -> StepResult:
        """Run the rows; writes their KV. Padding up to ``plan.token_bucket`` writes nothing and is seen by nobody."""
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
        spare = padded_size(len(wanted), self.target.device, self.target.dtype) - len(wanted)
        inputs = StepInput(ids, positions, slots, rows, wanted + [0] * spare, plan.token_bucket - len(ids))
        with nullcontext() if self.target.ranks is None else self.target.ranks.step(inputs):
            logits, taps = self._model.run(inputs)
        return StepResult(logits[: len(wanted)], first_row, num_scored, taps)

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


def _num_scored(row: PlanRow, sequence: Sequence) -> int:
    """How many of the row's tokens are asked for prompt log-probabilities (each scores the token after it)."""
    if not sequence.wants_prompt_logprobs:
        return 0
    return max(0, min(row.start + row.num_known, sequence.num_prompt - 1) - row.start)
