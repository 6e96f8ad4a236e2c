"""Plain decoding one step ahead of the host: a step is launched before the tokens of the one before it are known here.

The tokens are on the device, where the next step takes them from (``step_buffers.py``), and everything else about it is known: every
request goes one position further. So the device computes step t + 1 while the host commits step t. A request that step t ended takes
part in step t + 1 for nothing; its token is dropped, and what it wrote lies in blocks that later steps write before they read.

That holds while nothing but plain decoding happens: all running requests take a token that the device finds (``device_judge.py``) and
draft nothing, and so will those who are let in (``gate.py``), whose prompts are rows of such a step. What they were promised a token must
be far more than such a step takes: nobody plans it. Anything else ends it: the step under way lands, and the next one is planned as ever
(``flights.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark.types import DeviceDrafts, VerifyPlan
from dspark.workers.blocks import BlockPool
from dspark.workers.verifier.device_edits import EDIT_ROWS
from dspark.workers.verifier.edits import LogitEdits
from dspark.workers.verifier.forward import BestTokens
from dspark.workers.verifier.gate import Gate
from dspark.workers.verifier.runner import Runner, StepResult
from dspark.workers.verifier.scheduler import Scheduler
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.step_buffers import Asked, HostStep

AMPLE = 0.7  # of a budget that plain steps may take at most where nobody plans them
Ints = NDArray[np.int64]
PlainSeconds = Callable[[int, int], float | None]


@dataclass(frozen=True, slots=True)
class Flight:
    """A plain step under way: row i computes position ``positions[i]`` of ``sequences[i]`` into ``slots[i]``.

    The last ``num_new`` of them have just been let in, and ``num_prompt`` tokens of their prompts before that position are computed, too.
    """

    sequences: list[Sequence]
    positions: Ints
    slots: Ints
    best: BestTokens
    num_new: int = 0
    num_prompt: int = 0

    @property
    def context(self) -> int:
        """Positions that all rows attend to."""
        return int(self.positions.sum()) + len(self.sequences)


@dataclass(frozen=True, slots=True)
class DraftedFlight:
    """A step under way that verifies ``num_drafts`` drafts of every sequence, which the host has not seen when it launches it.

    Behind them it computes the prompts of ``coming`` requests, which have just been let in.
    """

    sequences: list[Sequence]
    num_drafts: int
    best: BestTokens
    coming: list[Sequence]
    is_sampled: bool  # behind what stands and the target's token the step leaves -1


class RunAhead:
    """Launches plain steps early. ``can_run``: the drafter needs nothing of them on the host; ``gate``: when others are let in.

    ``plain_seconds``: of a step of so many requests over so many positions; None where that is not measured.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        pool: BlockPool,
        max_model_len: int,
        can_run: bool,
        gate: Gate,
        plain_seconds: PlainSeconds = lambda _, __: None,
    ) -> None:
        self._gate, self._plain_seconds = gate, plain_seconds
        self._max_model_len = max_model_len
        self._runner = runner
        self._scheduler = scheduler
        self._pool = pool
        self.can_run = can_run and runner.max_launched > 0
        self.launched = 0  # steps
        self.gate_opened = False  # when it was asked last

    def after_step(self, plan: VerifyPlan, result: StepResult, sequences: Mapping[str, Sequence]) -> Flight | None:
        """Launch the step after a planned one that is under way; None where that cannot be known to be plain."""
        if not self.can_run or result.best is None or any(result.num_scored):
            return None
        rows = [sequences[row.request_id] for row in plan.rows]
        if not self._is_alone(rows) or not all(
            row.samples and not row.num_draft and sequence.takes_best for row, sequence in zip(plan.rows, rows, strict=True)
        ):
            return None
        positions = np.fromiter((sequence.num_known for sequence in rows), np.int64, len(rows))
        return self._launch(rows, positions, np.asarray(result.first_row, dtype=np.int64), None)

    def after(self, flight: Flight, sequences: Mapping[str, Sequence], may_join: bool = False) -> Flight | None:
        """Launch the step after a flight whose tokens are not known yet. ``may_join``: whoever is let in by it goes on as the others."""
        source = np.arange(len(flight.sequences))
        rows = flight.sequences
        positions, slots = flight.positions + 1, flight.slots + 1
        gone = [i for i, sequence in enumerate(rows) if sequences.get(sequence.request.id) is not sequence]
        if gone:
            source = np.delete(source, gone)
            rows = [rows[i] for i in source]
            positions, slots = positions[source], slots[source]
        return self._launch(rows, positions, source, slots, may_join=may_join)

    def again(self, sequences: list[Sequence]) -> Flight | None:
        """Launch a step of requests whose last tokens the host knows, whoever waits; nothing may be under way."""
        self.give_tokens(sequences)
        positions = np.fromiter((len(sequence.tokens) - 1 for sequence in sequences), np.int64, len(sequences))
        return self._launch(sequences, positions, np.arange(len(sequences)), None, asks_gate=False)

    def give_tokens(self, sequences: list[Sequence]) -> None:
        """Let the next step that is launched find the last token of each of them where the step before it would have left it."""
        self._runner.give_tokens(np.fromiter((sequence.tokens[-1] for sequence in sequences), np.int64, len(sequences)))

    def note_pause(self, seconds: float) -> None:
        """Letting requests in kept those who run from going on for so long."""
        self._gate.took(seconds)

    def fitting_depth(self, sequences: list[Sequence], depth: int, beside_prompts: bool) -> int:
        """At most ``depth``, at least 1, so that the device can judge so many drafts of each.

        ``beside_prompts``: and that the prompts of all who wait and have a place fit beside them. Drafts come last: a draft left out costs
        its own gain, a prompt left out a whole place.
        """
        scheduler, room = self._scheduler, self._runner.max_launched
        if beside_prompts:
            places = max(0, scheduler.limits.max_num_seqs - len(scheduler.running))
            room -= sum(sequence.num_known for sequence in scheduler.waiting[:places])
        return min(depth, max(1, min(room, self._most_rows(sequences)) // len(sequences) - 1))

    def reserve_drafts(
        self, sequences: list[Sequence], reaches: Ints, num_drafts: int, asks_gate: bool, may_join: bool
    ) -> list[Sequence] | None:
        """Take blocks for the step that verifies ``num_drafts`` drafts of each, up to ``reaches`` [R]; None where more could happen.

        A request that will have ended before takes part for nothing. Unless ``asks_gate``, whoever waits goes on waiting. Returns those who
        are let in by that step, which takes ``may_join``: they go on as the others do.
        """
        self.gate_opened = False
        num_rows = len(sequences) * (num_drafts + 1)
        room = self._runner.max_launched - num_rows
        if (
            not self.can_run
            or min(room, self._most_rows(sequences) - num_rows) < 0
            or int(reaches.max()) > self._max_model_len
            or not self._is_alone(sequences)
        ):
            return None
        coming = self._coming(room, may_join) if asks_gate else []
        if coming is None:
            return None
        tables = [self._pool.table(sequence.request.id) for sequence in sequences]
        missing = -(-reaches // self._pool.block_size) - np.fromiter(map(len, tables), np.int64, len(tables))
        growing = np.flatnonzero(missing > 0)
        if int(missing[growing].sum()) > self._pool.num_free:
            return None
        for i in growing.tolist():
            if not self._pool.grow(sequences[i].request.id, int(reaches[i])):
                raise AssertionError("free blocks were counted before")
        for sequence, reach in zip(sequences, reaches.tolist(), strict=True):
            sequence.num_reserved = reach
        return coming

    def launch_drafts(self, sequences: list[Sequence], drafts: DeviceDrafts, num_drafts: int, coming: list[Sequence]) -> DraftedFlight:
        """Launch that step, with drafts on the device for each of the sequences."""
        self.launched += 1
        asked = asked_of([*sequences, *coming])
        step = HostStep.of_drafts([self._pool.table(sequence.request.id) for sequence in sequences], num_drafts + 1, asked)
        step = self._joined(step, coming) if coming else step
        best = self._runner.launch_drafts(step, drafts, len(sequences), num_drafts)
        return DraftedFlight(sequences, num_drafts, best, coming, asked[0] is not None)

    def _is_alone(self, sequences: list[Sequence]) -> bool:
        """Whether these are all that runs."""
        return len(sequences) == len(self._scheduler.running) and all(map(can_fly, sequences)) and self.keeps_budgets(sequences)

    def keeps_budgets(self, sequences: list[Sequence]) -> bool:
        """Whether steps of these that nobody plans keep what they were promised, and by far: drafts are only for what is faster."""
        promised = [s.request.latency_budget.tpot_ms for s in sequences if s.request.latency_budget.tpot_ms is not None]
        if not promised:
            return True
        seconds = self._plain_seconds(len(sequences), sum(s.num_known for s in sequences))
        return seconds is not None and seconds <= AMPLE * min(promised) / 1e3

    def _most_rows(self, sequences: list[Sequence]) -> int:
        """Rows of logits that a step of these may have beside those of who is let in by it, to be judged on the device."""
        scheduler, most = self._scheduler, self._runner.max_launched
        coming = scheduler.waiting[: max(0, scheduler.limits.max_num_seqs - len(scheduler.running))]
        has_edits = any(s.edits is not None for s in sequences) or any(s.edits is not None for s in coming)
        return min(most, EDIT_ROWS - len(coming)) if has_edits else most

    def _coming(self, room: int, may_join: bool) -> list[Sequence] | None:
        """Who is let in by the step to be launched, with prompts of ``room`` tokens at most; None: the gate opens and nobody can join."""
        scheduler = self._scheduler
        waiting, num_running = scheduler.waiting, len(scheduler.running)
        joins = may_join and bool(waiting) and waiting[0].num_known <= room
        self.gate_opened = self._gate.lets_in(waiting, num_running, scheduler.limits.max_num_seqs - num_running, joins)
        if not self.gate_opened:
            return []
        return (scheduler.let_in(room) or None) if joins else None

    def _launch(
        self,
        rows: list[Sequence],
        positions: Ints,
        source: Ints,
        slots: Ints | None,
        asks_gate: bool = True,
        may_join: bool = False,
    ) -> Flight | None:
        """Launch the rows that go on; row i takes its token from row ``source[i]`` of the step before.

        ``may_join``: with the prompts of requests that are let in, where a graph has room for all of them.
        """
        size = self._pool.block_size
        if len(rows) > self._most_rows(rows):
            return None
        coming = self._coming(self._runner.max_launched - len(rows), may_join) if asks_gate else []
        if coming is None:
            return None
        limits = np.fromiter((sequence.max_len for sequence in rows), np.int64, len(rows))
        if not (goes_on := positions + 1 < limits).all():  # the others end with the token that is under way
            kept = np.flatnonzero(goes_on)
            rows, positions, source = [rows[i] for i in kept], positions[kept], source[kept]
            slots = None if slots is None else slots[kept]
        begins = np.flatnonzero(positions % size == 0) if slots is not None else np.arange(len(rows))
        if not rows or len(begins) > self._pool.num_free:
            return None
        slots = np.empty(len(rows), dtype=np.int64) if slots is None else slots
        for i in begins:
            position = int(positions[i])
            if not self._pool.grow(rows[i].id, position + 1):
                raise AssertionError("free blocks were counted before")
            slots[i] = self._pool.table(rows[i].id)[position // size] * size + position % size
        for sequence, position in zip(rows, positions.tolist(), strict=True):
            sequence.num_reserved = position + 1
        tables = [self._pool.table(sequence.request.id) for sequence in rows]
        count, asked = len(rows), asked_of([*rows, *coming])
        ones = np.ones(count, dtype=np.int64)
        step = HostStep((), positions, slots, np.arange(count), ones, positions + 1, tables, source, asked=asked[0], edits=asked[1])
        self.launched += 1
        if not coming:
            return Flight(rows, positions, slots, self._runner.launch(step))
        joined, last = self._joined(step, coming), [*range(count)]
        last += (np.asarray(joined.wanted)[count:]).tolist()
        where, places = np.asarray(joined.positions)[last], np.asarray(joined.slots)[last]
        num_prompt = len(joined.positions) - len(last)
        return Flight([*rows, *coming], where, places, self._runner.launch(joined), len(coming), num_prompt)

    def _joined(self, step: HostStep, coming: list[Sequence]) -> HostStep:
        """A step, and behind it the pending tokens of requests that were let in."""
        count, size = len(step.positions), self._pool.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        tables = [self._pool.table(sequence.id) for sequence in coming]
        for sequence, table in zip(coming, tables, strict=True):
            sequence.num_reserved = sequence.num_known
            ids += sequence.tokens[sequence.num_computed :]
            positions += range(sequence.num_computed, sequence.num_known)
            slots += [table[p // size] * size + p % size for p in range(sequence.num_computed, sequence.num_known)]
        lengths = np.array([sequence.num_pending for sequence in coming])
        return HostStep(
            ids=np.concatenate([np.zeros(count, np.int64), ids]).astype(np.int64),
            positions=np.concatenate([step.positions, positions]).astype(np.int64),
            slots=np.concatenate([step.slots, slots]).astype(np.int64),
            wanted=np.concatenate([step.wanted, count + np.cumsum(lengths) - 1]),
            lengths=np.concatenate([step.lengths, lengths]),
            contexts=np.concatenate([step.contexts, [sequence.num_known for sequence in coming]]),
            tables=[*step.tables, *tables],
            source=None if step.source is None else np.concatenate([step.source, np.full(len(ids), -1)]),
            asked=step.asked,
            edits=step.edits,
        )


def can_fly(sequence: Sequence) -> bool:
    """Whether its next step can be launched before the host knows what this one brings, budgets apart."""
    return not sequence.scores_prompt


def has_budget(sequence: Sequence) -> bool:
    """Whether it was promised a time a token."""
    return sequence.request.latency_budget.tpot_ms is not None


def asked_of(sequences: list[Sequence]) -> Asked:
    """What they ask of sampling and do to their logits, in order."""
    edits: tuple[LogitEdits | None, ...] | None = None
    if any(s.edits is not None for s in sequences):
        edits = tuple([s.edits if s.needs_edits else None for s in sequences])
        edits = edits if any(edits) else None
    is_judged = edits is not None or any(s.is_sampled for s in sequences)
    return b"".join([s.asked for s in sequences]) if is_judged else None, edits
