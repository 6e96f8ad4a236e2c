"""An engine that computes nothing: its steps take what a cost table says, and drafts are accepted by chance.

Scheduler, planner, policies and pool are the engine's own. Time is a clock that only steps move, so what a policy does to a trace of
requests can be seen without noise, and a minute of serving takes a second.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

from dspark.types import DraftSignals, DraftTree, DraftTurn, Mode, Speculation, VerifyPlan
from dspark.workers.blocks import BlockPool
from dspark.workers.drafter.none import NoDrafter
from dspark.workers.verifier.engine import Engine, EngineOptions
from dspark.workers.verifier.runner import StepResult
from dspark.workers.verifier.scheduler import Limits
from dspark.workers.verifier.verdict import JudgeItem, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from dspark.types import Drafter
    from dspark.workers.verifier.costs import CostTable
    from dspark.workers.verifier.sequence import Sequence as Running
    from dspark.workers.verifier.targets import Target

DRAFT_LEN = 7
SPREAD = 2.0  # of confidences around their mean: parameters of a beta distribution that sum up to it
SUREST = 0.99
TOKEN = 3  # whatever it is: nobody reads it


@dataclass(slots=True)
class Clock:
    """Seconds that have passed."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


class SimulatedDrafter:
    """Drafts whose confidences are drawn around the acceptance of the request's text, and are true."""

    block_size = DRAFT_LEN
    taps: tuple[int, ...] = ()
    signals = DraftSignals()

    def __init__(self, acceptance: Mapping[str, float], costs: CostTable, clock: Clock) -> None:
        """``acceptance``, by request: how likely a draft of its text is accepted if all before it were."""
        self.acceptance = acceptance
        self._costs, self._clock = costs, clock
        self._turns: dict[str, DraftTurn] = {}

    def project(self, taps: object) -> None:
        """No features."""

    def propose(self, turns: Sequence[DraftTurn]) -> None:
        """Note what is wanted; ``collect`` takes the time."""
        self._turns |= {turn.request_id: turn for turn in turns}

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """The drafts, after the seconds that the cost table says."""
        trees: dict[str, DraftTree] = {}
        context = depth = 0
        for name, limit in want.items():
            turn = self._turns.get(name)
            count = 0 if turn is None else min(limit, turn.max_draft)
            if turn is None or not count:
                continue
            confidence = self.confidence(name, turn.base_len)[:count]
            margin = [log(chance / (1 - chance)) for chance in confidence]
            trees[name] = DraftTree.chain(name, turn.base_len, (TOKEN,) * count, confidence, margin=margin)
            context, depth = context + turn.num_computed, max(depth, count)
        self._clock.now_s += self._costs.draft_seconds(len(trees), depth, context)
        return trees

    def close(self, request_ids: Sequence[str]) -> None:
        """Forget requests that ended."""
        for name in request_ids:
            self._turns.pop(name, None)

    def confidence(self, request_id: str, base_len: int) -> list[float]:
        """How likely each token drafted behind ``base_len`` known ones is accepted; the same whenever it is asked."""
        mean = self.acceptance[request_id]
        draw = random.Random(f"confidence {request_id} {base_len}")
        return [min(max(draw.betavariate(SPREAD * mean, SPREAD * (1 - mean)), 1 - SUREST), SUREST) for _ in range(DRAFT_LEN)]

    def judge(self, logits: Tensor, items: Sequence[JudgeItem]) -> list[Verdict]:
        """Accept as many drafts of each as chance has it."""
        return [Verdict((TOKEN,) * (count + 1), count) for count in map(self._num_accepted, items)]

    def _num_accepted(self, item: JudgeItem) -> int:
        if not item.drafted:
            return 0
        draw, chances = random.Random(f"accepted {item.request_id} {item.base_len}"), self.confidence(item.request_id, item.base_len)
        return len(list(itertools.takewhile(lambda chance: draw.random() < chance, chances[: len(item.drafted)])))


def simulated_engine(
    target: Target, costs: CostTable, clock: Clock, simulated: SimulatedDrafter, limits: Limits, longest: int, speculates: bool
) -> Engine:
    """An engine for requests of at most ``longest`` tokens that the drafter knows. ``target`` is not run: let the drafter judge."""
    drafter: Drafter = simulated if speculates else NoDrafter()
    pool = BlockPool(limits.max_num_seqs * (longest // 16 + 2))
    speculation = Speculation() if speculates else Speculation(Mode.OFF)
    options = EngineOptions(max_model_len=longest + 1, limits=limits, max_queued=len(simulated.acceptance), speculation=speculation)
    engine = Engine(target, pool, drafter, options, None, clock)
    engine.set_costs(costs)

    def forward(step: VerifyPlan, sequences: Mapping[str, Running]) -> StepResult:
        prompt = sum(row.num_known for row in step.rows if row.num_known > 1)
        context = sum(row.start + row.num_known for row in step.rows)
        clock.now_s += costs.step_seconds(max(1, step.num_tokens - prompt), context) + costs.prefill_s * prompt
        counts = [1 + row.num_draft if row.samples else 0 for row in step.rows]
        first_rows = [end - count for count, end in zip(counts, itertools.accumulate(counts), strict=True)]
        return StepResult(None, first_rows, [0] * len(step.rows), None)  # type: ignore[arg-type]

    engine.runner.forward = forward  # type: ignore[method-assign, assignment]
    return engine
