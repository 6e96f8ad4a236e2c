"""``dspark bench simulate``: what latency budgets bring, on a clock that only steps move.

The engine's own scheduler and planner serve a trace like that of ``dspark bench mixed``; only the model is not run
(``workers/simulated.py``). A step takes what the engine's cost table says, and each drafted token is accepted by chance, with the
probability that the drafter states. So nothing is noise but the trace, which can be served again. Four servings of every trace::

    plain               no speculation, no budgets
    adaptive            told of no budgets
    budgets             told of them
    budgets, refusing   and requests are refused whose budget is predicted to be missed, as ``reject_when_late`` does

It shows what a policy is worth, not what a machine does: the host's own work, and a machine that changes speed, are left out.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.metrics import Limits as SetLimits
from dspark.bench.metrics import Timeline, median, percentile
from dspark.bench.mixed import RELATIVE_CLASSES
from dspark.bench.tables import Column, Table
from dspark.bench.traffic import ServiceClass
from dspark.errors import ConfigError
from dspark.router.admission import BudgetOutOfReach, refuse_late
from dspark.router.predict import NOTHING_SENT, Ask, predict
from dspark.sampling import SamplingParams
from dspark.types import LatencyBudget, Request

if TYPE_CHECKING:
    from dspark.workers.verifier.costs import CostTable
    from dspark.workers.verifier.engine import Engine
    from dspark.workers.verifier.host import EngineHost
    from dspark.workers.verifier.scheduler import Limits
    from dspark.workers.verifier.targets import Target

TOKEN = 3  # whatever it is: nobody reads it
COLUMNS = [
    Column("rate", 6),
    Column("serving", 18, is_text=True),
    Column("goodput", 8),
    Column("kept", 6),
    Column("each", 24, is_text=True),
    Column("refused", 7),
    Column("class", 12, is_text=True),
    Column("kept", 6),
    Column("TTFT p50/90", 12, is_text=True),
    Column("TPOT p50/90", 12, is_text=True),
]


@dataclass(frozen=True, slots=True)
class Kind:
    """Prompts of one kind: how long they are, and how likely a draft of their answers is accepted if all before it were."""

    name: str
    lengths: tuple[int, ...]
    acceptance: float


@dataclass(frozen=True, slots=True)
class Serving:
    """One way to serve the trace."""

    name: str
    speculates: bool = True
    tells_budgets: bool = False
    refuses: bool = False


SERVINGS = (
    Serving("plain", speculates=False),
    Serving("adaptive"),
    Serving("budgets", tells_budgets=True),
    Serving("budgets, refusing", tells_budgets=True, refuses=True),
)


@dataclass(frozen=True, slots=True)
class SimulatedPlan:
    """A whole run."""

    rates: tuple[float, ...]
    requests: int
    repeats: int
    seed: int
    max_tokens: int
    kinds: tuple[Kind, ...]
    classes: tuple[ServiceClass, ...]
    limits: Limits


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    id: str
    at_s: float
    kind: Kind
    num_prompt: int
    service_class: ServiceClass


@dataclass(slots=True)
class Served:
    """What became of a trace: chunks and tokens of each request that was let in."""

    chunks_s: dict[str, list[float]] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def timeline(self, arrival: Arrival) -> Timeline | None:
        """None of one that was refused."""
        chunks = self.chunks_s.get(arrival.id)
        return None if not chunks else Timeline(arrival.at_s, tuple(chunks), self.num_tokens[arrival.id])

    def keeps(self, arrival: Arrival) -> bool:
        """Whether it kept every budget of its class."""
        timeline = self.timeline(arrival)
        return timeline is not None and arrival.service_class.limits.are_met(timeline)


def make_trace(plan: SimulatedPlan, rate: float, seed: int) -> list[Arrival]:
    """Poisson arrivals, kinds and classes drawn at random; the prompts of a kind come in their order."""
    draw = random.Random(f"trace {seed}")
    lengths = {kind.name: itertools.cycle(kind.lengths) for kind in plan.kinds}
    shares = [one.share for one in plan.classes]
    arrivals, at_s = [], 0.0
    for number in range(plan.requests):
        at_s += draw.expovariate(rate)
        kind, chosen = draw.choice(plan.kinds), draw.choices(plan.classes, shares)[0]
        arrivals.append(Arrival(f"{seed}-{number}", at_s, kind, next(lengths[kind.name]), chosen))
    return arrivals


def serve(plan: SimulatedPlan, serving: Serving, arrivals: Sequence[Arrival], target: Target, costs: CostTable) -> Served:
    """Serve a trace to its end; ``target`` is not run."""
    from dspark.workers.simulated import Clock, SimulatedDrafter, simulated_engine
    from dspark.workers.verifier.host import EngineHost

    clock, served = Clock(), Served()
    simulated = SimulatedDrafter({arrival.id: arrival.kind.acceptance for arrival in arrivals}, costs, clock)
    longest = max(arrival.num_prompt for arrival in arrivals) + plan.max_tokens
    engine = simulated_engine(target, costs, clock, simulated, plan.limits, longest, serving.speculates)
    engine.judge = simulated.judge
    host = EngineHost(engine)  # for its view; its thread is not started
    coming = iter(arrivals)
    following = next(coming, None)
    while following is not None or engine.has_work:
        if not engine.has_work and following is not None:
            clock.now_s = max(clock.now_s, following.at_s)
        while following is not None and following.at_s <= clock.now_s:
            _arrive(plan, serving, following, engine, host, served)
            following = next(coming, None)
        for outcome in engine.step() if engine.has_work else ():
            if outcome.tokens:
                served.chunks_s.setdefault(outcome.request_id, []).append(clock.now_s)
                served.num_tokens[outcome.request_id] = served.num_tokens.get(outcome.request_id, 0) + len(outcome.tokens)
    return served


def _arrive(plan: SimulatedPlan, serving: Serving, arrival: Arrival, engine: Engine, host: EngineHost, served: Served) -> None:
    """Hand a request to the engine, or refuse it."""
    limits = arrival.service_class.limits
    budget = LatencyBudget(limits.ttft_ms, limits.tpot_ms) if serving.tells_budgets else LatencyBudget()
    if serving.refuses:
        ask = Ask(arrival.id, arrival.num_prompt, budget)
        try:
            refuse_late(ask, predict(host.view("simulated", ""), ask, arrival.num_prompt, NOTHING_SENT))
        except BudgetOutOfReach:
            served.refused.add(arrival.id)
            return
    sampling = SamplingParams(temperature=0.0, max_tokens=plan.max_tokens, ignore_eos=True)
    engine.add(Request(arrival.id, (TOKEN,) * arrival.num_prompt, sampling, noise_seed=0, latency_budget=budget, cache_salt=arrival.id))
    engine.sequences[arrival.id].arrived_s = arrival.at_s  # it may have come while a step ran


def run_simulated(plan: SimulatedPlan, target: Target, costs: CostTable, out: TextIO | None) -> None:
    """Serve every trace in every way, print rows and ratios, write JSON lines."""
    origin = {"machine": describe_machine(), "commit": source_commit(), "classes_asked": [str(one) for one in plan.classes]}
    for one in plan.classes:
        print(f"--class {one}", flush=True)
    print(f"{origin['machine']}; commit {origin['commit']}; simulated: {plan.requests} requests, {plan.repeats} traces a rate", flush=True)
    table = Table(COLUMNS)
    for rate in plan.rates:
        traces = [make_trace(plan, rate, plan.seed + repeat) for repeat in range(plan.repeats)]
        kept: dict[str, float] = {}
        for serving in SERVINGS:
            all_served = [serve(plan, serving, trace, target, costs) for trace in traces]
            shares = [sum(map(served.keeps, trace)) / len(trace) for served, trace in zip(all_served, traces, strict=True)]
            kept[serving.name] = sum(shares) / len(shares)
            refused = sum(len(served.refused) for served in all_served)
            rows = list(_class_rows(plan, all_served, traces))
            for place, row in enumerate(rows):
                head = [f"{rate:g}", serving.name, f"{rate * kept[serving.name]:.3g}", f"{kept[serving.name]:.0%}"]
                head += [" ".join(f"{share:.0%}" for share in shares), str(refused)]
                table.row(*(head if not place else [""] * len(head)), *row)
            if out is not None:
                record = {"kind": "simulated", "serving": serving.name, "rate_per_s": rate, "seed": plan.seed, "shares_kept": shares}
                print(json.dumps(record | {"refused": refused, "requests": plan.requests} | origin), file=out, flush=True)
        ratios = (f"{name} {kept[name] / kept['adaptive']:.2f} x" for name in kept if kept["adaptive"] and name != "adaptive")
        print(f"goodput at {rate:g}/s against adaptive: {', '.join(ratios)}", flush=True)


def _class_rows(plan: SimulatedPlan, all_served: Sequence[Served], traces: Sequence[Sequence[Arrival]]) -> Iterator[list[str]]:
    """The cells of every class: its share that was kept, TTFT and TPOT in milliseconds."""
    for one in plan.classes:
        pairs = [(s, a) for s, trace in zip(all_served, traces, strict=True) for a in trace if a.service_class is one]
        found = [timeline for s, a in pairs if (timeline := s.timeline(a)) is not None]
        ttft = [1e3 * timeline.ttft_s for timeline in found]
        tpot = [1e3 * timeline.tpot_s for timeline in found if timeline.tpot_s is not None]
        share = sum(s.keeps(a) for s, a in pairs) / max(1, len(pairs))
        cells = [f"{median(values):.0f}/{percentile(values, 90):.0f}" if values else "-" for values in (ttft, tpot)]
        yield [one.name, f"{share:.0%}", *cells]


def make_kinds(lengths: Mapping[str, Sequence[int]], acceptance: Sequence[float]) -> tuple[Kind, ...]:
    """Kinds of prompts by name; one acceptance is for all of them. ConfigError if there are neither one nor as many."""
    if len(acceptance) not in (1, len(lengths)) or not all(0 < chance < 1 for chance in acceptance):
        raise ConfigError(f"--acceptance must be a chance between 0 and 1 for each of {len(lengths)} prompt sets, or one for all")
    chances = list(acceptance) * (len(lengths) // len(acceptance))
    return tuple(Kind(name, tuple(sizes), chance) for (name, sizes), chance in zip(lengths.items(), chances, strict=True))


def relative_classes(kinds: Sequence[Kind], costs: CostTable) -> tuple[ServiceClass, ...]:
    """Budgets as multiples of what one plain stream takes by the table."""
    prompt = median([length for kind in kinds for length in kind.lengths])
    tpot_ms = 1e3 * costs.step_seconds(1, round(prompt))
    ttft_ms = 1e3 * costs.prefill_s * prompt + tpot_ms
    return tuple(
        ServiceClass(name, SetLimits(round(first * ttft_ms, 1), round(each * tpot_ms, 1)))
        for name, (first, each) in RELATIVE_CLASSES.items()
    )
