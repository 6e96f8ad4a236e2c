"""The verifier engine: continuous batching of lossless speculative decoding. No Ray, no HTTP, one thread.

``step`` is the figure of the paper: collect drafts, plan, forward, judge, commit, propose.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from dspark.errors import BadRequest, Overloaded
from dspark.kernels.buckets import pad_rows
from dspark.kv_blocks import KeepsBlocks
from dspark.types import (
    Drafter,
    DraftsAhead,
    DraftTree,
    DraftTurn,
    Finish,
    Mode,
    PlanRow,
    Request,
    Speculation,
    StepOutcome,
    VerifyPlan,
)
from dspark.workers.blocks import BlockPool
from dspark.workers.verifier.ahead import RunAhead
from dspark.workers.verifier.aside import Aside
from dspark.workers.verifier.cohorts import Cohorts
from dspark.workers.verifier.costs import CostTable, LiveCosts
from dspark.workers.verifier.counters import EngineCounters
from dspark.workers.verifier.draft_planner import DraftPlanner
from dspark.workers.verifier.draft_policy import DraftPolicy
from dspark.workers.verifier.finish import Cut, cut
from dspark.workers.verifier.flights import Flights
from dspark.workers.verifier.forward import BestTokens
from dspark.workers.verifier.gate import Gate
from dspark.workers.verifier.judge import JudgeItem, Verdict, follow, judge, prompt_logprobs
from dspark.workers.verifier.laws import check_sampling
from dspark.workers.verifier.runner import GraphOptions, Runner, StepResult
from dspark.workers.verifier.scheduler import Limits, Scheduler
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.shape_policy import ShapePolicy
from dspark.workers.verifier.survival import SurvivalEstimator, make_estimator
from dspark.workers.verifier.targets import Target
from dspark.workers.verifier.text import TextStream
from dspark.workers.verifier.untold import Advance, Untold

Judge = Callable[[Tensor, Seq[JudgeItem]], list[Verdict]]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of an engine that are not about memory or the model."""

    max_model_len: int
    limits: Limits
    max_queued: int = 256
    speculation: Speculation = field(default_factory=Speculation)
    draft_wait_s: float = 0.05
    auto_trees: bool = False  # adaptive requests may get trees at few streams
    overlapped: bool = False  # host work of a step under the next forward, budgets from confidences two steps old
    graphs: GraphOptions | None = None  # steps from graphs; the runner must then be prepared


@dataclass(slots=True)
class StepTimes:
    """When the parts of a step were over, on the engine's clock, and what was drafted in it."""

    begin_s: float
    drafted_s: float = 0.0
    judged_s: float = 0.0
    num_drafting: int = 0
    depth: int = 0
    before_s: float = 0.0  # when the verdicts of the step before were known

    @property
    def draft_s(self) -> float:
        return self.drafted_s - self.begin_s

    @property
    def verify_s(self) -> float:
        return self.judged_s - self.drafted_s


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step teaches: its size and times."""

    num_tokens: int
    num_prefill: int
    context: int
    drafting_context: int
    times: StepTimes
    num_rows: int
    num_committed: int
    tree_nodes: int  # that adaptive requests' drafts could have; 0: chains
    is_chosen: bool  # whether all that drafted did as the policy chose
    is_free: bool  # and in the shape that was chosen, too


class Engine:
    """Serves requests with one target and one drafter; every public call must come from one thread at a time."""

    def __init__(
        self,
        target: Target,
        pool: BlockPool,
        drafter: Drafter,
        options: EngineOptions,
        tokenizer: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.target = target
        self.pool = pool
        self.drafter = drafter
        self.options = options
        self.tokenizer = tokenizer
        self.runner = Runner(target, pool, drafter.taps, getattr(drafter, "feed", None), options.graphs)
        survival = make_estimator("head", drafter.block_size, drafter.signals)
        self.drafts = DraftPlanner(DraftPolicy(drafter.block_size), survival, looks_back=options.overlapped)
        self.scheduler = Scheduler(pool, options.limits, self.drafts, self.runner.padded, self.runner.max_launched)
        self.shapes = ShapePolicy(options.auto_trees)
        self.tree_nodes = 0  # that drafts of adaptive requests may have now
        self.cohorts = Cohorts()
        self.on_step: Callable[[VerifyPlan, StepTimes], None] | None = None  # hears of every step when it is judged
        self.aside = Aside()
        self._ships_features = bool(drafter.taps) and getattr(drafter, "feed", None) is None
        self._untold = Untold()
        self._tells_late = self._ships_features and isinstance(drafter, KeepsBlocks) and not isinstance(drafter, DraftsAhead)
        can_run_ahead = options.overlapped and not self._ships_features
        gate, plain_seconds = Gate(clock), self.drafts.plain_seconds
        self.ahead = RunAhead(self.runner, self.scheduler, pool, options.max_model_len, can_run_ahead, gate, plain_seconds)
        self.drafts.runs_ahead, self.drafts.max_launched = self.ahead.can_run, self.runner.max_launched
        self.flights = Flights(self)
        self.landed_s = 0.0  # when the verdicts of the last step were known; 0 while nothing ran before
        self.judge: Judge = judge
        self.counters = EngineCounters()
        self.sequences: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    @property
    def survival(self) -> SurvivalEstimator:
        """What estimates the survival of drafts, and learns it from every judged one."""
        return self.drafts.survival

    @property
    def lost(self) -> str | None:
        """Why this engine can serve no more; None while it can."""
        return None if self.target.ranks is None else self.target.ranks.lost

    def close(self) -> None:
        """End what the engine has started besides itself; it must not step any more. Closing twice is fine."""
        if self.target.ranks is not None:
            self.target.ranks.close()
        if isinstance(self.drafter, DraftsAhead):
            self.drafter.end()

    def set_costs(self, costs: CostTable) -> None:
        """Let adaptive speculation trim by this table; without one it verifies every draft."""
        most = self.options.limits.max_batch_tokens
        self.drafts.costs = LiveCosts(costs, most, self.scheduler.padded)

    def add(self, request: Request) -> None:
        """Queue a request; BadRequest names the field, Overloaded when too many wait."""
        self.check(request)
        self.check_room(len(self.scheduler.waiting))
        speculation = request.speculation or self.options.speculation
        sequence = Sequence.of(request, speculation, self.options.max_model_len)
        sequence.arrived_s = self.clock()
        if request.sampling.stop:
            sequence.text = TextStream(self.tokenizer, request.sampling)
            sequence.text.push(sequence.output)
        sequence.stop_ids = self._stop_ids(sequence)
        sequence.stop_set = frozenset(sequence.stop_ids)
        if sequence.edits is not None:
            sequence.edits.stop_ids = sequence.stop_ids
        if not self.sequences:
            self.landed_s = 0.0  # what passed since the last step was no work
        self.sequences[request.id] = sequence
        self.scheduler.add(sequence)

    def check_room(self, num_waiting: int) -> None:
        """Raise Overloaded if one more than ``num_waiting`` requests would neither run at once nor find a place to wait."""
        places = max(0, self.options.limits.max_num_seqs - len(self.scheduler.running))
        if num_waiting >= places + self.options.max_queued:
            raise Overloaded(f"{num_waiting} requests are waiting; {places} can start and {self.options.max_queued} may wait")

    def check(self, request: Request) -> None:
        """Raise BadRequest if this engine could never serve the request."""
        if request.id in self.sequences:
            raise BadRequest(f"request id {request.id!r} is in use", "request_id")
        if not request.prompt_token_ids:
            raise BadRequest("the prompt is empty", "prompt")
        length, limit = len(request.prompt_token_ids), self.options.max_model_len
        if length >= limit:
            raise BadRequest(
                f"the prompt has {length} tokens; at most {limit - 1} fit (the model's context of {limit} less one token of output)",
                "prompt",
                "context_length_exceeded",
            )
        if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < self.target.vocab_size:
            raise BadRequest(f"a prompt token id is outside 0 to {self.target.vocab_size - 1}", "prompt")
        if request.sampling.n != 1:
            raise BadRequest("the engine runs one choice a request", "n")
        if request.sampling.stop and self.tokenizer is None:
            raise BadRequest("stop strings need a tokenizer, and this model has none", "stop")
        check_sampling(request.sampling, self.target.vocab_size)

    def abort(self, request_id: str) -> None:
        """Drop a request; its blocks go back at once. Unknown ids (already ended) are fine."""
        if (sequence := self.sequences.get(request_id)) is not None:
            self.catch_up()
            self.forget([sequence])

    def step(self) -> list[StepOutcome]:
        """Run one round for everything that is admitted; one outcome for each request that got tokens or ended."""
        if self.flights.under_way:
            return self.flights.land()
        times = StepTimes(self.clock(), before_s=self.landed_s)
        is_for_new, self.flights.is_for_new = self.flights.is_for_new, False
        plan, result = self._begin(times, is_for_new)
        if result is None:
            if is_for_new:
                self.flights.resume()
            return []
        self.runner.forget_counts()
        depth = 0 if is_for_new else self.flights.begin(plan, result, times.num_drafting > 0)
        verdicts = self._judge(plan, result)
        self.target.check()
        self.runner.keep_paths(plan, verdicts)
        times.judged_s = self.clock()
        if self.on_step is not None:
            self.on_step(plan, times)
        record = self._record(plan, times, verdicts)
        if times.before_s and not record.num_prefill and not self.drafts.policy.is_look:
            drafted, seconds = times.num_drafting > 0, times.judged_s - times.before_s
            if record.is_chosen:
                self.drafts.observe_step(record.num_rows, drafted, record.num_committed, record.context, seconds)
        if self.options.overlapped:
            self.aside.run(partial(self._learn, record))
        else:
            self._learn(record)
        outcomes, advances, ended = self._commit(plan, result, verdicts, times.judged_s)
        resumes = is_for_new or (not self.flights.under_way and self.flights.can_resume(behind_prompts=record.num_prefill > 0))
        if not self.flights.is_plain:
            self._propose(advances, ended, result.taps, depth, may_draft=not resumes)
        self.landed_s = times.judged_s
        self.forget(ended)
        if resumes:
            self.flights.resume()
        if is_for_new:
            self.ahead.note_pause(self.clock() - times.begin_s)
        return outcomes

    def _begin(self, times: StepTimes, is_for_new: bool) -> tuple[VerifyPlan, StepResult | None]:
        """Collect drafts, plan a step and launch it; no result where there is nothing to run. ``is_for_new``: of new requests alone."""
        self.scheduler.choose(times.begin_s)
        if is_for_new:
            self.scheduler.chosen = []
        self._take_turns()
        times.num_drafting, times.depth = self._collect()
        times.drafted_s = self.clock()
        plan = self.scheduler.plan(times.drafted_s, times.draft_s, whole_prompts=is_for_new)
        return plan, self.runner.forward(plan, self.sequences) if plan.rows else None

    def is_running(self, sequence: Sequence) -> bool:
        """Whether it has not ended, nor been aborted, since a step was launched for it."""
        return self.sequences.get(sequence.request.id) is sequence

    def _take_turns(self) -> None:
        """Where drafts are made elsewhere, let one of two cohorts sit the step out if that is predicted to pay."""
        if not isinstance(self.drafter, DraftsAhead) or self.drafts.costs is None:
            return
        drafted = {s.id: s.num_computed for s in self.scheduler.chosen if s.drafts_wanted}
        context = sum(drafted.values()) // max(1, len(drafted))
        takes_part = self.cohorts.choose(
            list(drafted), lambda count: self.drafts.verify_seconds(count, count * context), self.drafter.round_seconds
        )
        self.scheduler.chosen = [s for s in self.scheduler.chosen if s.id not in drafted or s.id in takes_part]

    def _collect(self) -> tuple[int, int]:
        """Attach the drafts that are ready; a stale or missing one is no draft. Returns how many were asked for, how deep."""
        want = {s.id: s.drafts_wanted for s in self.scheduler.chosen if s.drafts_wanted}
        self.counters.drafts_asked += len(want)
        drafts: dict[str, DraftTree] = self.drafter.collect(want, self.options.draft_wait_s) if want else {}
        for sequence in self.scheduler.chosen:
            draft = drafts.get(sequence.id)
            is_fresh = draft is not None and draft.base_len == sequence.num_known
            sequence.draft = draft.first(sequence.drafts_wanted) if draft is not None and is_fresh else None
            self.counters.drafts_arrived += is_fresh
        return len(want), max((s.draft_depth for s in self.scheduler.chosen), default=0)

    def _judge(self, plan: VerifyPlan, result: StepResult) -> dict[str, Verdict]:
        rows = [(row, first) for row, first in zip(plan.rows, result.first_row, strict=True) if row.samples]
        verdicts: dict[str, Verdict] = {}
        if result.best is not None:
            rows = self._follow(rows, result.best, verdicts)
        items = [self._item(row, first, row.num_commit) for row, first in rows]
        found = self.judge(result.logits, items) if items else []
        if whole := [self._item(row, first, row.num_draft) for row, first in rows if row.num_commit < row.num_draft]:
            self.counters.shadow_accepted += sum(verdict.accepted for verdict in self.judge(result.logits, whole))
        verdicts.update((item.request_id, verdict) for item, verdict in zip(items, found, strict=True))
        return verdicts

    def _follow(self, rows: list[tuple[PlanRow, int]], best: BestTokens, verdicts: dict[str, Verdict]) -> list[tuple[PlanRow, int]]:
        """Judge the rows that need no more than the device's own best tokens; returns the others."""
        others: list[tuple[PlanRow, int]] = []
        tokens: list[int] | None = None
        for row, first in rows:
            sequence = self.sequences[row.request_id]
            draft = sequence.draft if row.num_draft else None
            if not sequence.takes_best or row.num_commit < row.num_draft or not (draft is None or draft.is_chain):
                others.append((row, first))
                continue
            tokens = best.read() if tokens is None else tokens
            drafted = () if draft is None else draft.tokens[: row.num_draft]
            verdicts[row.request_id] = follow(tokens[first : first + len(drafted) + 1], drafted)
        return others

    def _item(self, row: PlanRow, first_row: int, num_draft: int) -> JudgeItem:
        """What the judge needs of a row whose first ``num_draft`` drafts may stand."""
        sequence = self.sequences[row.request_id]
        return JudgeItem(
            request_id=row.request_id,
            sampling=sequence.request.sampling,
            noise_seed=sequence.request.noise_seed,
            prompt=sequence.request.prompt_token_ids[: sequence.num_prompt],
            output=sequence.output,
            draft=sequence.draft.first(num_draft) if sequence.draft is not None and num_draft else None,
            first_row=first_row,
            stop_ids=sequence.stop_ids,
            may_branch=sequence.speculation.tree_nodes > 0,
        )

    def _record(self, plan: VerifyPlan, times: StepTimes, verdicts: dict[str, Verdict]) -> StepRecord:
        prefill = sum(row.num_known for row in plan.rows if row.num_known > 1)
        context = sum(row.start + row.num_known for row in plan.rows)
        drafting = sum(s.num_computed for s in self.scheduler.chosen if s.drafts_wanted)
        committed = sum(len(verdict.tokens) for verdict in verdicts.values())
        drafted = [s for s in self.scheduler.chosen if s.drafts_wanted]
        is_chosen, is_free = (all(map(test, drafted)) for test in (_is_chosen, _is_free))
        return StepRecord(plan.num_tokens, prefill, context, drafting, times, len(verdicts), committed, self.tree_nodes, is_chosen, is_free)

    def _learn(self, record: StepRecord) -> None:
        """Correct the cost table by a step that is over, and the estimates of survival by all steps before it."""
        self.survival.learn()
        costs, times = self.drafts.costs, record.times
        if costs is None:
            return
        predicted_s = costs.table.step_seconds(record.num_tokens - record.num_prefill, record.context)
        self.counters.timed_steps += 1
        self.counters.step_seconds += times.verify_s
        self.counters.predicted_seconds += predicted_s + costs.table.prefill_s * record.num_prefill
        if not record.num_prefill:
            if times.before_s:
                costs.observe_host(record.num_rows, times.begin_s - times.before_s, times.num_drafting > 0)
            costs.observe_verify(record.num_tokens, record.context, times.verify_s)
            if times.num_drafting == record.num_rows and record.is_free:
                self.shapes.observe(record.num_rows, record.tree_nodes, record.num_committed, times.judged_s - times.begin_s)
        if times.num_drafting:
            costs.observe_draft(times.num_drafting, times.depth, record.drafting_context, times.draft_s)

    def _stop_ids(self, sequence: Sequence) -> tuple[int, ...]:
        sampling = sequence.request.sampling
        return (() if sampling.ignore_eos else self.target.eos_ids) + sampling.stop_token_ids

    def _commit(
        self, plan: VerifyPlan, result: StepResult, verdicts: dict[str, Verdict], now_s: float
    ) -> tuple[list[StepOutcome], list[Advance], list[Sequence]]:
        """Commit every row; returns the outcomes, what the rows leave for the drafter, and the requests that ended."""
        outcomes: list[StepOutcome] = []
        advances: list[Advance] = []
        ended: list[Sequence] = []
        flat = 0
        self.counters.steps += 1
        self.counters.step_tokens += plan.num_tokens
        self.counters.budget += self.drafts.budget
        for index, row in enumerate(plan.rows):
            sequence = self.sequences[row.request_id]
            self._score_prompt(sequence, row.start, result, index)
            verdict = verdicts.get(row.request_id)
            accepted = verdict.nodes if verdict is not None else ()
            if verdict is not None:
                outcome = self.commit_tokens(sequence, verdict, row.num_commit, now_s)
                outcomes.append(outcome)
                if outcome.finish is not None:
                    ended.append(sequence)
            known = range(flat, flat + row.num_known)
            advances.append(Advance(sequence, [*known, *(known.stop + node for node in accepted)], row.start))
            self.scheduler.commit(sequence, min(row.start + row.num_known + len(accepted), sequence.num_known))
            flat += row.num_tokens
        return outcomes, advances, ended

    def commit_tokens(self, sequence: Sequence, verdict: Verdict, num_draft: int, now_s: float) -> StepOutcome:
        """Append a verdict's tokens as far as the request still runs."""
        done: Cut = cut(sequence, verdict.tokens, self.target.eos_ids)
        is_first = not sequence.output
        if sequence.draft is not None:
            accepted = verdict.nodes[: len(done.tokens)]
            self.survival.observe(sequence.draft, num_draft, accepted, is_cut=len(done.tokens) <= verdict.accepted)
        sequence.append(done.tokens, now_s)
        self.counters.count_round(num_draft, verdict.accepted, len(done.tokens), sequence.request.sampling.rule)
        return StepOutcome(
            request_id=sequence.id,
            base_len=sequence.num_known,
            tokens=done.tokens,
            accepted=min(verdict.accepted, len(done.tokens)),
            drafted=num_draft,
            logprobs=verdict.logprobs[: len(done.tokens)] if verdict.logprobs is not None else None,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first and sequence.wants_prompt_logprobs else None,
            finish=done.finish,
            stop_reason=done.stop_reason,
            num_cached_tokens=sequence.num_cached,
        )

    def _score_prompt(self, sequence: Sequence, start: int, result: StepResult, index: int) -> None:
        """Collect prompt log-probabilities of a chunk, once (a resumed request computes its prompt again)."""
        count = result.num_scored[index]
        if not sequence.wants_prompt_logprobs:
            return
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)  # nothing predicts the first token
        if count and start + 1 == len(sequence.prompt_logprobs):
            first = result.first_row[index] - count
            tokens = sequence.tokens[start + 1 : start + 1 + count]
            top = sequence.request.sampling.prompt_logprobs or 0
            sequence.prompt_logprobs.extend(prompt_logprobs(result.logits[first : first + count], tokens, top))

    def propose_to(self, sequences: Seq[Sequence], ended: Seq[Sequence], depth: int, may_draft: bool = True) -> None:
        """Let the drafter begin drafts of ``depth`` tokens for requests that steps launched ahead have brought forward."""
        self._propose([Advance(sequence, (), sequence.num_computed) for sequence in sequences], ended, None, depth, may_draft)

    def _propose(
        self, advances: Seq[Advance], ended: Seq[Sequence], taps: Tensor | None, depth: int | None, may_draft: bool = True
    ) -> None:
        """Tell the drafter what became known, with the projected features of every position that got KV for good.

        Of requests that ended as well: their last blocks are in the prefix cache, and must be whole for the drafter too.
        ``depth``: how deep to draft; None: not decided yet. ``may_draft``: whether any of them is to.
        """
        going = [s for s in self.scheduler.running if s not in ended]
        depth = self.drafts.depth(going) if depth is None else depth
        self.tree_nodes = self.shapes.nodes(len(going))
        if taps is not None and not ended and self._can_wait(going, depth) and self._untold.keep(advances, taps):
            for advance in advances:
                advance.sequence.draft_depth = advance.sequence.drafts_wanted = 0
            return
        advances, taps = self._untold.join(advances, taps)
        features: list[Tensor | None] = [None] * len(advances)
        if taps is not None and advances and self._ships_features:
            rows = [row for advance in advances for row in advance.rows]
            projected = self.drafter.project(pad_rows(taps[rows]))[: len(rows)]
            features = list(projected.split([len(advance.rows) for advance in advances]))
        room = self.drafts.most_drafting
        turns = []
        for advance, feature in zip(advances, features, strict=True):
            sequence = advance.sequence
            goes_on = may_draft and sequence.num_pending == 1 and sequence not in ended
            sequence.draft_depth = self._draft_depth(sequence, depth if room is None or room > 0 else 0) if goes_on else 0
            if room is not None and sequence.draft_depth and sequence.speculation.mode is Mode.ADAPTIVE:
                room -= 1
            nodes = sequence.max_nodes(sequence.draft_depth, self.options.max_model_len, self.tree_nodes)
            sequence.drafts_wanted = nodes or sequence.draft_depth
            turns.append(
                DraftTurn(
                    request_id=sequence.id,
                    base_len=sequence.num_known,
                    tokens=tuple(sequence.tokens[sequence.num_taught :]),
                    feature_start=advance.start,
                    features=feature,
                    max_draft=sequence.draft_depth,
                    sampling=sequence.request.sampling,
                    noise_seed=sequence.request.noise_seed,
                    max_nodes=nodes,
                    cache_salt=sequence.request.cache_salt,
                    num_computed=sequence.num_computed,
                )
            )
            sequence.num_taught = sequence.num_known
        self.drafter.propose(turns)

    def _can_wait(self, going: Seq[Sequence], depth: int) -> bool:
        """Whether a drafter that keeps its context under the target's block ids need not hear of a plain step at once.

        It must before a request ends or loses its place: its blocks may be found again.
        """
        if depth or not self._tells_late or self.pool.num_free < 2 * len(going):
            return False
        return all(s.speculation.mode is Mode.ADAPTIVE or not s.max_draft(self.drafter.block_size) for s in going)

    def catch_up(self) -> None:
        """Tell the drafter what it was not told yet."""
        if self._untold:
            self._propose([], [], None, 0, may_draft=False)

    def _draft_depth(self, sequence: Sequence, depth: int) -> int:
        """How many tokens deep to draft; ``depth`` is the policy's answer for adaptive verification."""
        most = sequence.max_draft(self.drafter.block_size)
        if sequence.speculation.mode is not Mode.ADAPTIVE:
            return most
        return min(most, depth) if most and depth and sequence.rest.is_due() else 0

    def forget(self, ended: Seq[Sequence]) -> None:
        """Drop requests that ended; their blocks go back."""
        for sequence in ended:
            del self.sequences[sequence.id]
            self.scheduler.remove(sequence)
            self.runner.release(sequence.id)
        if ended:
            self.drafter.close([sequence.id for sequence in ended])
        if not self.sequences:
            self.flights.drop()


def _is_chosen(sequence: Sequence) -> bool:
    """Whether the policy says if a request drafts, and how deep."""
    return sequence.speculation.mode is Mode.ADAPTIVE and not sequence.speculation.tree_nodes


def _is_free(sequence: Sequence) -> bool:
    """Whether another one says in what shape."""
    return sequence.speculation == Speculation() and sequence.request.sampling.is_exact


def abort_outcome(request_id: str, base_len: int, finish: Finish, error: str | None = None) -> StepOutcome:
    """The last outcome of a request that did not end by itself."""
    return StepOutcome(request_id, base_len, (), 0, finish=finish, error=error)
