"""What becomes of steps that were launched before their turn: they land, and the next one is kept under way.

A plain step takes its tokens from the step before it. A drafted one verifies chains that the drafter began behind that step, on the
device, and is judged there, too. In both the host commits step t while the device computes step t + 1, and whatever is alike for all
requests is done once a step, on arrays: at hundreds of streams that, and not the device, decides how fast a round is.

From plain steps to drafted ones and back it goes without a planned step in between, so that a look at what drafts would bring costs
little. Requests that are let in and go on as those that run do are computed beside such a step if a graph has room for their prompts;
otherwise a planned step computes these alone, and all of them fly on from the tokens that the host then knows: planning a step for
hundreds of requests takes longer than computing it (docs/adr/010).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, cast

import numpy as np

from dspark.types import Continuations, ContinuesSteps, DraftedChains, DraftsAhead, Mode, Speculation, StepOutcome, TokenLogprob, VerifyPlan
from dspark.workers.verifier.ahead import DraftedFlight, Flight, Ints, asked_of, can_fly, has_budget
from dspark.workers.verifier.forward import BestTokens
from dspark.workers.verifier.runner import StepResult
from dspark.workers.verifier.sequence import Sequence
from dspark.workers.verifier.verdict import Verdict

if TYPE_CHECKING:
    from dspark.workers.verifier.engine import Engine

TOLD_EVERY = 8  # plain steps after which a drafter elsewhere hears of them: it would have all of them to catch up with
OBSERVED_ROWS = 4  # of a step, in turns: the estimates are no better for more, and learning takes time from the engine's thread


class Flights:
    """At most one step of an engine that is under way before its turn."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._plain: Flight | None = None
        self._drafted: DraftedFlight | None = None
        self.is_for_new = False  # whether the next planned step is for waiting requests alone; the others fly on behind it
        self._untold = 0  # plain steps since the drafter last heard of any
        self._turn = 0  # where the next rows that are observed begin

    @property
    def under_way(self) -> bool:
        return self._plain is not None or self._drafted is not None

    @property
    def is_plain(self) -> bool:
        """Whether the step under way drafts nothing."""
        return self._plain is not None

    def begin(self, plan: VerifyPlan, result: StepResult, has_drafts: bool) -> int | None:
        """Launch the step after a planned one that runs, where it can be known; how deep to draft for it (None: too early to say).

        A planned step leaves the best tokens on the device: requests that take others fly on when the host has judged it.
        """
        sequences = [self._engine.sequences[row.request_id] for row in plan.rows]
        if not all(sequence.takes_best for sequence in sequences) and self._go_on_alike(sequences):
            return None
        depth = self._depth_behind(plan)
        if depth == 0:
            self._plain = self._engine.ahead.after_step(plan, result, self._engine.sequences)
        elif (depth or has_drafts) and result.best is not None:
            self._drafted = self._continue(plan, result)
        return depth

    def land(self) -> list[StepOutcome]:
        """Commit the step under way, after the next one has been launched if that is known."""
        if self._plain is not None:
            return self._land_plain(self._plain)
        assert self._drafted is not None
        return self._land_drafted(self._drafted)

    def can_resume(self, behind_prompts: bool = True) -> bool:
        """Whether all that run go on alike from tokens that the host knows: behind a step with prompts, or where some take other tokens
        than the best ones."""
        running = self._engine.scheduler.running
        if not self._engine.ahead.can_run or not (behind_prompts or not all(s.takes_best for s in running)):
            return False
        return bool(running) and all(s.num_pending == 1 for s in running) and self._go_on_alike(running)

    def resume(self) -> None:
        """Launch a step of all that run from what the host knows, if they go on alike; nothing may be under way."""
        if not self.can_resume():
            return
        sequences, block_size = self._engine.scheduler.running, self._engine.drafter.block_size
        self._fly(self._depth_of(sequences) if any(sequence.max_draft(block_size) for sequence in sequences) else 0)

    def _fly(self, depth: int) -> None:
        """``resume`` of requests that go on alike with drafts of this depth; 0: plainly."""
        engine = self._engine
        sequences = list(engine.scheduler.running)
        engine.landed_s = 0.0  # what the next step takes from here is no measure of such steps
        if not depth:
            self._plain = engine.ahead.again(sequences)
            return
        engine.ahead.give_tokens(sequences)
        names, known = [s.id for s in sequences], [len(s.tokens) for s in sequences]
        cast(ContinuesSteps, engine.drafter).follow(names, known, [s.tokens[-1] for s in sequences])
        for sequence in sequences:
            sequence.num_taught = len(sequence.tokens)
        nothing = np.zeros(len(sequences), np.int64)
        rows = Continuations(names, np.array(known) - 1, nothing, np.arange(len(sequences)), asked_of(sequences)[0])
        self._drafted = self._launch(sequences, rows, depth, asks_gate=False)

    def drop(self) -> None:
        """Forget the step under way: nobody is left whom it is for."""
        self._plain = None
        if self._drafted is not None:
            self._drafted = None
            cast(ContinuesSteps, self._engine.drafter).continued()

    def _depth_behind(self, plan: VerifyPlan) -> int | None:
        """How deep to draft for the next step, asked before this one's tokens are known."""
        engine = self._engine
        if not engine.ahead.can_run or any(row.num_draft for row in plan.rows):
            return None
        if any(row.num_known > 1 for row in plan.rows):  # who is let in is not counted yet where a depth is chosen
            return None if any(sequence.max_draft(engine.drafter.block_size) for sequence in engine.scheduler.running) else 0
        return self._next_depth()

    def _next_depth(self) -> int:
        """How deep to draft for the next step of what runs; 0: it is plain."""
        engine = self._engine
        drafting = [s for s in engine.scheduler.running if s.max_draft(engine.drafter.block_size)]
        if any(s.speculation.mode is not Mode.ADAPTIVE for s in drafting):
            return engine.drafter.block_size
        return engine.drafts.depth(engine.scheduler.running) if drafting else 0

    def _continue(self, plan: VerifyPlan, result: StepResult) -> DraftedFlight | None:
        """Let a drafter on the device begin the next blocks of greedy requests behind the step itself, and launch what verifies them."""
        engine = self._engine
        if not isinstance(engine.drafter, ContinuesSteps):
            return None
        chosen = [
            i for i, row in enumerate(plan.rows) if row.samples and row.num_commit == row.num_draft and self._can_continue(row.request_id)
        ]
        if not chosen:
            return None
        rows = [plan.rows[i] for i in chosen]
        sequences = [engine.sequences[row.request_id] for row in rows]
        bases = np.fromiter((row.start + row.num_known for row in rows), np.int64, len(rows))
        drafted = np.fromiter((row.num_draft for row in rows), np.int64, len(rows))
        first_rows = np.fromiter((result.first_row[i] for i in chosen), np.int64, len(rows))
        may_fly = len(rows) == len(plan.rows) and not any(result.num_scored)
        depth = max(sequence.draft_depth for sequence in sequences) if may_fly and _are_alike(sequences) else 0
        return self._launch(sequences, Continuations([s.id for s in sequences], bases, drafted, first_rows), depth)

    def _can_continue(self, request_id: str) -> bool:
        """Whether a request's next draft can be begun before the host knows what this step accepted."""
        sequence = self._engine.sequences[request_id]
        is_chain = sequence.draft is None or sequence.draft.is_chain
        drafts = sequence.speculation.mode in (Mode.STATIC, Mode.ADAPTIVE) and not sequence.speculation.tree_nodes
        return sequence.takes_best and is_chain and drafts

    def _launch(self, sequences: list[Sequence], rows: Continuations, depth: int, asks_gate: bool = True) -> DraftedFlight | None:
        """Begin the next blocks, and the step that verifies ``depth`` tokens of them where that is over 0 and there is room for it."""
        engine, drafter = self._engine, cast(ContinuesSteps, self._engine.drafter)
        # reserved before the drafts are launched: they say where KV goes
        may_join = depth > 0 and asks_gate and self._would_go_on_alike()
        if depth and sequences[0].speculation.mode is Mode.ADAPTIVE:
            depth = engine.ahead.fitting_depth(sequences, depth, beside_prompts=may_join)
        reaches = rows.base_lens + rows.num_drafts + 1 + depth
        coming = engine.ahead.reserve_drafts(sequences, reaches, depth, asks_gate, may_join) if depth else None
        self.is_for_new = depth > 0 and coming is None and self._can_be_apart()
        if self.is_for_new or (coming is None and not asks_gate):
            return None
        drafts = drafter.continue_step(rows)
        return None if coming is None else engine.ahead.launch_drafts(sequences, drafts, depth, coming)

    def _land_plain(self, flight: Flight) -> list[StepOutcome]:
        engine = self._engine
        depth = self._next_depth()
        self._plain = None if depth else engine.ahead.after(flight, engine.sequences, self._would_go_on_alike())
        self.is_for_new = not depth and self._plain is None and self._can_be_apart()
        turns = depth > 0 and self._go_on_alike(engine.scheduler.running)
        tokens = flight.best.read()
        engine.target.check()
        now_s = engine.clock()
        if engine.landed_s and not flight.num_new:
            engine.drafts.observe_step(len(tokens), False, len(tokens), flight.context, now_s - engine.landed_s)
            if engine.drafts.costs is not None:
                engine.drafts.costs.observe_plain(len(tokens), flight.context, now_s - engine.landed_s)
        engine.landed_s = now_s
        engine.counters.steps += 1
        engine.counters.step_tokens += len(tokens) + flight.num_prompt
        outcomes: list[StepOutcome] = []
        ended: list[Sequence] = []
        landed = [(s, token, i) for i, (s, token) in enumerate(zip(flight.sequences, tokens, strict=True)) if engine.is_running(s)]
        for sequence, token, row in landed:  # the others ended, or were aborted, while this step was under way
            sequence.draft = None
            outcome = self._commit_one(sequence, token) or engine.commit_tokens(
                sequence, Verdict((token,), 0, _scores(flight.best, sequence, row, (token,))), 0, now_s
            )
            outcomes.append(outcome)
            engine.scheduler.commit_ahead(sequence)
            if outcome.finish is not None:
                ended.append(sequence)
        self._untold += 1
        is_told = self._plain is None and not self.is_for_new and not turns
        if is_told or (self._untold >= TOLD_EVERY and isinstance(engine.drafter, DraftsAhead)):
            self._untold = 0
            engine.propose_to([sequence for sequence, *_ in landed], ended, depth)
        elif flight.num_new:
            new = flight.sequences[-flight.num_new :]
            engine.propose_to([sequence for sequence, *_ in landed if sequence in new], ended, 0, may_draft=False)
        engine.forget(ended)
        if turns and engine.scheduler.running:
            self._fly(min(depth, self._longest(engine.scheduler.running[0].speculation)))
        return outcomes

    def _commit_one(self, sequence: Sequence, token: int) -> StepOutcome | None:
        """``commit_tokens`` of a plain token, if nothing could end the request with it; otherwise None, and nothing is done."""
        base_len = len(sequence.tokens) + 1
        if base_len >= sequence.max_len or token in sequence.stop_ids or sequence.text is not None or sequence.first_s is None:
            return None
        if sequence.edits is not None and sequence.edits.scores:
            return None
        sequence.append_one(token)
        self._engine.counters.count_plain()
        return StepOutcome(sequence.request.id, base_len, (token,), 0, num_cached_tokens=sequence.num_cached)

    def _land_drafted(self, flight: DraftedFlight) -> list[StepOutcome]:
        engine, num_drafts = self._engine, flight.num_drafts
        drafter = cast(ContinuesSteps, engine.drafter)
        chains = drafter.continued()
        alive = [i for i, sequence in enumerate(flight.sequences) if engine.is_running(sequence)]
        sequences = [flight.sequences[i] for i in alive]  # the others ended, or were aborted, while this step was under way
        joined = [i for i, sequence in enumerate(flight.coming) if engine.is_running(sequence)]
        everybody, behind = [*sequences, *(flight.coming[i] for i in joined)], len(flight.sequences) * (num_drafts + 1)
        bases = np.fromiter((len(sequence.tokens) for sequence in everybody), np.int64, len(everybody))
        depth = self._depth_of(everybody)
        turns = not depth and bool(everybody) and self._go_on_alike(everybody)
        self._drafted = None
        if depth:
            drafted = np.array([num_drafts] * len(alive) + [0] * len(joined), np.int64)
            first_rows = np.array([i * (num_drafts + 1) for i in alive] + [behind + i for i in joined], np.int64)
            names = [sequence.request.id for sequence in everybody]
            rows = Continuations(names, bases, drafted, first_rows, asked_of(everybody)[0])
            self._drafted = self._launch(everybody, rows, depth)
        found = flight.best.numbers()
        own = found[:behind].reshape(-1, num_drafts + 1)
        engine.target.check()
        now_s = engine.clock()
        if len(alive) < len(flight.sequences):
            own, chains = own[alive], _rows_of(chains, alive)
        known = np.fromiter((sequence.tokens[-1] for sequence in sequences), np.int64, len(sequences))
        if not (np.array_equal(chains.positions, bases[: len(alive)] - 1) and np.array_equal(chains.anchors, known)):
            raise RuntimeError("a step was verified behind other tokens than those that the host knows")
        accepted = (own >= 0).sum(axis=1) - 1 if flight.is_sampled else _num_accepted(own, chains, num_drafts)
        if flight.coming:
            engine.landed_s = 0.0  # it took longer than a round does
        firsts = [i * (num_drafts + 1) for i in alive]
        outcomes, ended = self._commit_chains(sequences, own, accepted, num_drafts, now_s, (flight.best, firsts))
        is_chosen = bool(sequences) and sequences[0].speculation.mode is Mode.ADAPTIVE
        self._note(chains, accepted, num_drafts, outcomes, now_s, is_chosen)
        lengths = [outcome.base_len for outcome in outcomes]
        drafter.follow([outcome.request_id for outcome in outcomes], lengths, [sequence.tokens[-1] for sequence in sequences])
        for i in joined:
            token = int(found[behind + i])
            scores = _scores(flight.best, flight.coming[i], behind + i, (token,))
            outcome = engine.commit_tokens(flight.coming[i], Verdict((token,), 0, scores), 0, now_s)
            outcomes.append(outcome)
            engine.scheduler.commit_ahead(flight.coming[i])
            if outcome.finish is not None:
                ended.append(flight.coming[i])
        if self._drafted is None and not self.is_for_new and not turns:
            engine.propose_to(everybody, ended, depth)
        elif joined:
            engine.propose_to(everybody[len(alive) :], ended, 0, may_draft=False)
        engine.forget(ended)
        if turns and engine.scheduler.running:
            self._fly(0)
        return outcomes

    def _can_be_apart(self) -> bool:
        """Whether those that are let in by the next step go on as those do that run."""
        return self._engine.ahead.gate_opened and self._would_go_on_alike()

    def _would_go_on_alike(self) -> bool:
        """Whether there are requests that could be let in, and all of them go on as those do that run."""
        scheduler = self._engine.scheduler
        coming = scheduler.waiting[: scheduler.limits.max_num_seqs - len(scheduler.running)]
        if any(map(has_budget, scheduler.running)) or any(map(has_budget, coming)):
            return False  # how much of a prompt a step takes is planned for them
        return bool(coming) and self._go_on_alike([*scheduler.running, *coming])

    def _go_on_alike(self, sequences: list[Sequence]) -> bool:
        """Whether all of them take the target's own tokens and draft in the same way: as steps do that were launched before their turn."""
        drafter, first = self._engine.drafter, sequences[0].speculation
        if isinstance(drafter, DraftsAhead) or not all(map(can_fly, sequences)) or not _are_alike(sequences):
            return False
        if not self._engine.ahead.keeps_budgets(sequences):
            return False
        if first.mode is Mode.OFF or not drafter.block_size:
            return True
        drafts_chains = first.mode in (Mode.STATIC, Mode.ADAPTIVE) and not any(s.speculation.tree_nodes for s in sequences)
        return drafts_chains and isinstance(drafter, ContinuesSteps)

    def _depth_of(self, sequences: list[Sequence]) -> int:
        """How deep requests that are alike draft for the next step; 0: not at all."""
        if not sequences:
            return 0
        most = self._longest(sequences[0].speculation)
        return most if sequences[0].speculation.mode is Mode.STATIC else min(most, self._engine.drafts.depth(sequences))

    def _longest(self, speculation: Speculation) -> int:
        """How deep it lets a request draft."""
        most = self._engine.drafter.block_size
        return most if speculation.draft_len is None else min(most, speculation.draft_len)

    def _commit_chains(
        self,
        sequences: list[Sequence],
        own: Ints,
        accepted: Ints,
        num_drafts: int,
        now_s: float,
        scored: tuple[BestTokens, list[int]],
    ) -> tuple[list[StepOutcome], list[Sequence]]:
        """Commit the accepted drafts of every row and the target's own token behind them; returns outcomes and requests that ended.

        ``scored``: where scores of tokens are, and the first row of logits of each sequence.
        """
        engine = self._engine
        outcomes: list[StepOutcome] = []
        ended: list[Sequence] = []
        simple: list[Sequence] = []  # those that nothing could end
        counts: list[int] = []  # what they accepted
        best, firsts = scored
        for sequence, row, count, first in zip(sequences, own.tolist(), accepted.tolist(), firsts, strict=True):
            tokens = tuple(row[: count + 1])
            base_len = len(sequence.tokens) + count + 1
            scores = _scores(best, sequence, first, tokens)
            if base_len < sequence.max_len and sequence.text is None and sequence.stop_set.isdisjoint(tokens) and scores is None:
                sequence.append(tokens, now_s)
                simple.append(sequence)
                counts.append(count)
                outcome = StepOutcome(sequence.request.id, base_len, tokens, count, num_drafts, num_cached_tokens=sequence.num_cached)
            else:
                sequence.draft = None
                outcome = engine.commit_tokens(sequence, Verdict(tokens, count, scores), num_drafts, now_s)
                if outcome.finish is not None:
                    ended.append(sequence)
            outcomes.append(outcome)
            engine.scheduler.commit_ahead(sequence)
            sequence.num_taught = len(sequence.tokens)
        engine.counters.count_chains(num_drafts, counts, [sequence.rule for sequence in simple])
        return outcomes, ended

    def _note(
        self, chains: DraftedChains, accepted: Ints, num_drafts: int, outcomes: list[StepOutcome], now_s: float, is_chosen: bool
    ) -> None:
        """Teach counters, costs and estimates what the step was. ``is_chosen``: the policy chose how deep it drafted."""
        engine, num_rows = self._engine, len(accepted)
        counters, drafts = engine.counters, engine.drafts
        counters.steps += 1
        counters.step_tokens += num_rows * (num_drafts + 1)
        counters.budget += num_rows * num_drafts
        counters.drafts_asked += num_rows
        counters.drafts_arrived += num_rows
        if num_rows and engine.landed_s:
            num_tokens, context = num_rows + int(accepted.sum()), int(chains.positions.sum())
            drafts.observe_round(num_rows, num_drafts, num_tokens, context, now_s - engine.landed_s, is_chosen)
        engine.landed_s = now_s
        confidence, margin = chains.confidence[:, :num_drafts], chains.margin[:, :num_drafts]
        drafts.note_chains(confidence, margin)
        begin = self._turn if self._turn < num_rows else 0
        self._turn = begin + OBSERVED_ROWS
        part = slice(begin, begin + OBSERVED_ROWS)
        counts = [outcome.accepted for outcome in outcomes[part]]  # what followed the end of a request was never asked for
        is_cut = [len(outcome.tokens) <= outcome.accepted for outcome in outcomes[part]]
        engine.survival.observe_chains(confidence[part].tolist(), margin[part].tolist(), counts, is_cut)
        if engine.survival.has_enough:
            engine.aside.run(engine.survival.learn)


def _scores(best: BestTokens, sequence: Sequence, first_row: int, tokens: tuple[int, ...]) -> tuple[TokenLogprob, ...] | None:
    """Log-probabilities of a request's tokens, if it asks for them; they are behind each other from ``first_row`` on."""
    if sequence.edits is None or not sequence.edits.scores:
        return None
    top = sequence.request.sampling.logprobs or 0
    return tuple(best.score(first_row + i, token, top) for i, token in enumerate(tokens))


def _are_alike(sequences: list[Sequence]) -> bool:
    """Whether all of them draft as deep."""
    first = sequences[0].speculation
    return all(s.speculation.mode is first.mode and s.speculation.draft_len == first.draft_len for s in sequences)


def _num_accepted(own: Ints, chains: DraftedChains, num_drafts: int) -> Ints:
    """How many drafts of each row stand: those that are the best tokens of the rows before them, up to the first that is not."""
    stands = own[:, :num_drafts] == chains.tokens[:, :num_drafts]
    counts: Ints = np.logical_and.accumulate(stands, axis=1).sum(axis=1)
    return counts


def _rows_of(chains: DraftedChains, rows: Seq[int]) -> DraftedChains:
    """Some of the rows."""
    return DraftedChains(chains.tokens[rows], chains.confidence[rows], chains.margin[rows], chains.anchors[rows], chains.positions[rows])
