"""``dspark bench router``: routing decisions a second on one core, by the functions that routers use, over made-up replicas."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Final, TextIO

from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.tables import Column, Table
from dspark.router.policy import Standing, choose
from dspark.router.predict import Ask, Sent
from dspark.router.prefixes import CHUNK_TOKENS, PrefixIndex, chunk_keys
from dspark.types import LatencyBudget, ReplicaView

STEP_COSTS: Final = tuple((size, 0.006 + 0.00003 * size) for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
DRAFT_COSTS: Final = tuple((size, 0.001 + 0.00001 * size) for size in (1, 2, 4, 8, 16, 32, 64))
PROMPT_TOKENS: Final = 1024
SHARED_TOKENS: Final = 512  # of system prompts that many requests begin with
NUM_SHARED: Final = 50
NUM_ASKS: Final = 4096
BUDGET: Final = LatencyBudget(500.0, 30.0)

Look = Callable[[str], Standing | None]


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """What to measure: ``repeats`` times ``seconds`` of every case over ``replicas`` replicas."""

    replicas: int
    seconds: float
    repeats: int
    seed: int


@dataclass(frozen=True, slots=True)
class Case:
    """Requests over a cluster. ``hashes``: whether the keys of the prompt's prefix are made within the measurement."""

    name: str
    asks: Sequence[Ask]
    is_overloaded: bool = False
    hashes: bool = False


def run_router(plan: RouterPlan, out: TextIO | None) -> None:
    """Measure and print every case."""
    print(f"{describe_machine()}, processor time of one; {source_commit()}; {plan.replicas} replicas\n")
    rng = random.Random(plan.seed)
    prompts = _prompts(rng)
    ids = [f"verifier-{i}" for i in range(plan.replicas)]
    prefixes = _prefixes(rng, ids, prompts)
    table = Table([Column("case", 42, True), Column("decisions/s", 12), Column("us each", 8), Column("views read", 10)])
    for case in _cases(prompts):
        standings = {name: _standing(rng, name, case.is_overloaded) for name in ids}
        rates = [_rate(plan.seconds, case, prompts, ids, standings.get, prefixes) for _ in range(plan.repeats)]
        rate = statistics.median(rates)
        read = _views_read(case, ids, standings.get, prefixes)
        table.row(case.name, rate, 1e6 / rate, read)
        if out is not None:
            where = {"replicas": plan.replicas, "machine": describe_machine(), "commit": source_commit()}
            record = {"kind": "router", "case": case.name.strip(), "decisions_per_s": rate, "rates": rates, "views_read": read}
            out.write(json.dumps(record | where) + "\n")


def _cases(prompts: Sequence[Sequence[int]]) -> list[Case]:
    keys = [tuple(chunk_keys(prompt)) for prompt in prompts]

    def asks(budget: LatencyBudget, has_prefix: bool) -> list[Ask]:
        return [Ask(f"request-{i}", len(prompts[i]), budget, 0, keys[i] if has_prefix else ()) for i in range(len(prompts))]

    return [
        Case("load only", asks(LatencyBudget(), False)),
        Case("budgets", asks(BUDGET, False)),
        Case("budgets and prefixes", asks(BUDGET, True)),
        Case(f"  and hashing prompts of {PROMPT_TOKENS} tokens", asks(BUDGET, True), hashes=True),
        Case("  and no replica keeps the budget", asks(BUDGET, True), is_overloaded=True),
    ]


def _prompts(rng: random.Random) -> list[list[int]]:
    """Prompts of which three of four begin with one of a few system prompts."""
    shared = [[rng.randrange(150_000) for _ in range(SHARED_TOKENS)] for _ in range(NUM_SHARED)]
    prompts = []
    for _ in range(NUM_ASKS):
        start = rng.choice(shared) if rng.random() < 0.75 else []
        prompts.append([*start, *(rng.randrange(150_000) for _ in range(PROMPT_TOKENS - len(start)))])
    return prompts


def _prefixes(rng: random.Random, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> PrefixIndex:
    """An index after each prompt went to two replicas: a popular start is held by many, the rest by few."""
    index = PrefixIndex()
    for prompt in prompts:
        keys = chunk_keys(prompt)
        for _ in range(2):
            index.add(keys[: rng.randrange(SHARED_TOKENS // CHUNK_TOKENS, len(keys) + 1)], rng.choice(ids))
    return index


def _standing(rng: random.Random, name: str, is_overloaded: bool) -> Standing:
    running = 64 if is_overloaded else rng.randrange(65)
    queued = rng.randrange(20, 60) if is_overloaded else max(running - 60, 0) * rng.randrange(4)
    view = ReplicaView(
        id=name,
        address="127.0.0.1:1",
        queued=queued,
        running=running,
        max_running=64,
        queued_tokens=queued * PROMPT_TOKENS + rng.randrange(PROMPT_TOKENS),
        free_blocks=4000,
        num_blocks=8000,
        tokens_per_round=2.4,
        step_costs=STEP_COSTS,
        draft_costs=DRAFT_COSTS,
        prefill_token_s=0.00003,
        context_row_s=0.00002,
        drafted_per_round=2.1,
        waiting=((0, queued, queued * PROMPT_TOKENS),) if queued else (),
        age_s=rng.random() / 4,
    )
    return Standing(view, Sent(rng.randrange(3), rng.randrange(3) * PROMPT_TOKENS))


def _rate(seconds: float, case: Case, prompts: Sequence[Sequence[int]], ids: Sequence[str], look: Look, prefixes: PrefixIndex) -> float:
    """Decisions a second of processor time, over at least ``seconds``: what else the machine does hardly counts."""
    batch = 256
    asks = cycle(zip(case.asks, prompts, strict=True))
    count = 0
    begin = time.process_time()
    while (now := time.process_time()) - begin < seconds:
        for ask, prompt in islice(asks, batch):
            if case.hashes:
                ask = Ask(ask.id, ask.num_tokens, ask.budget, ask.priority, tuple(chunk_keys(prompt)))
            next(choose(ask, ids, look, prefixes))
        count += batch
    return count / (now - begin)


def _views_read(case: Case, ids: Sequence[str], look: Look, prefixes: PrefixIndex) -> float:
    """Mean number of views that a decision reads."""
    seen = 0

    def counting(replica_id: str) -> Standing | None:
        nonlocal seen
        seen += 1
        return look(replica_id)

    for ask in case.asks[:1000]:
        next(choose(ask, ids, counting, prefixes))
    return seen / len(case.asks[:1000])
