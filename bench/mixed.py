"""``dspark bench mixed``: one trace of mixed prompts and service classes on three servings of it, in turns.

``adaptive+budgets``   adaptive speculation; every request says its class and its latency budget, and is refused if its class says so
                       and the budget is predicted to be missed: a refused request has kept nothing
``adaptive``           the same server, told of neither
``plain``              a server without speculation, told of neither

Goodput is requests a second that meet every budget of their class: arrival rate x share that does. For the same arrivals
the share alone decides, so a ratio does not depend on how long the last answers take.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dspark.bench.http_client import Ask
from dspark.bench.load import Load, Measured, connect, find_model, run_load
from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.metrics import Limits
from dspark.bench.modes import rotated
from dspark.bench.online import COLUMNS, print_measured
from dspark.bench.prompt_sets import load_set
from dspark.bench.tables import Column, Table
from dspark.bench.traffic import NO_LIMITS, ServiceClass, assign, mix
from dspark.errors import DSparkError

WITH_BUDGETS, ADAPTIVE, PLAIN = "adaptive+budgets", "adaptive", "plain"
# Budgets when none are given, as multiples of what the plain server does for one stream: name -> (TTFT, TPOT).
RELATIVE_CLASSES = {"interactive": (8.0, 2.0), "batch": (40.0, 6.0)}
ANY = (ServiceClass("any", NO_LIMITS),)
CALM_REQUESTS = 8
SATURATING = 16  # streams that fill the plain server, to learn what it can do at all
KNEE_STEP = 1.25  # from one rate to the next in the search for the knee
KNEE_FALL = 0.9  # of the best goodput: less than this is beyond the knee
KNEE_TRIES = 12
REFUSED = "HTTP 503"


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """A whole run. ``rates`` empty: the knee is searched for. ``classes`` empty: made from ``RELATIVE_CLASSES``.

    ``refuses``: the servers' classes prefer a refusal to a late answer.
    """

    ask: Ask
    folder: Path
    sets: tuple[str, ...]
    rates: tuple[float, ...]
    classes: tuple[ServiceClass, ...]
    requests: int
    repeats: int
    seed: int
    timeout_s: float
    refuses: bool = False


@dataclass(frozen=True, slots=True)
class Serving:
    """One of the three contenders: a server, and whether it learns of the budgets."""

    name: str
    url: str
    tells_budgets: bool = False


class Traffic:
    """Sends the plan's trace under a load. No two measurements share cached prefixes, and equal seeds send equal requests."""

    def __init__(self, plan: MixedPlan) -> None:
        self._plan = plan
        self._sets = [load_set(plan.folder, name) for name in plan.sets]
        self._runs = 0

    def send(self, serving: Serving, classes: Sequence[ServiceClass], load: Load, requests: int, seed: int) -> Measured:
        """One measurement; ConfigError if the server is not there."""
        self._runs += 1
        return asyncio.run(self._send(serving, classes, load, requests, seed))

    async def _send(self, serving: Serving, classes: Sequence[ServiceClass], load: Load, requests: int, seed: int) -> Measured:
        async with connect(serving.url, None, self._plan.timeout_s) as client:
            ask = dataclasses.replace(self._plan.ask, model=await find_model(client), cache_salt=f"bench-{self._runs}")
            jobs = assign(ask, mix(self._sets, requests, seed), classes, seed, serving.tells_budgets)
            return await run_load(client, jobs, load, seed)


def run_mixed(plan: MixedPlan, adaptive_url: str, plain_url: str, out: TextIO | None) -> int:
    """Measure, print rows and ratios, write JSON lines; returns the number of failed requests."""
    plain = Serving(PLAIN, plain_url)
    servings = [Serving(WITH_BUDGETS, adaptive_url, tells_budgets=True), Serving(ADAPTIVE, adaptive_url), plain]
    traffic, table = Traffic(plan), Table([Column("serving", 22, is_text=True), *COLUMNS[1:]])
    traffic.send(servings[1], ANY, Load(concurrency=2), CALM_REQUESTS, plan.seed)  # live estimates need a first look
    calm = traffic.send(plain, ANY, Load(concurrency=1), CALM_REQUESTS, plan.seed)
    classes = plan.classes or relative_classes(calm)
    for one in classes:
        print(f"--class {one}", flush=True)

    def measure(name: str, serving: Serving, load: Load, seed: int) -> Measured:
        measured = traffic.send(serving, classes, load, plan.requests, seed)
        print_measured(table, name, load, measured)
        return measured

    rates = plan.rates or (_knee(lambda load: measure("plain, search", plain, load, plan.seed)),)
    origin = {"machine": describe_machine(), "commit": source_commit(), "classes_asked": [str(one) for one in classes]}
    failed = 0
    for rate in rates:
        shares: dict[str, list[float]] = {serving.name: [] for serving in servings}
        for repeat in range(plan.repeats):
            for serving in rotated(servings, repeat):
                measured = measure(f"{serving.name} {repeat + 1}", serving, Load(rate_per_s=rate), plan.seed + repeat)
                refused = measured.errors[REFUSED] if plan.refuses and serving.tells_budgets else 0
                failed += measured.errors.total() - refused
                shares[serving.name].append(measured.summary().goodput_share)
                if out is not None:
                    print(json.dumps(_record(plan, serving, rate, repeat) | measured.as_record() | origin), file=out, flush=True)
        for line in ratio_lines(rate, shares):
            print(line, flush=True)
    return failed


def relative_classes(calm: Measured) -> tuple[ServiceClass, ...]:
    """Budgets that this machine can keep at a low load: multiples of the medians of one stream; DSparkError if nothing was answered."""
    summary = calm.summary()
    ttft, tpot = summary.ttft_ms.p50, summary.tpot_ms.p50
    if ttft is None or tpot is None:
        raise DSparkError(f"the plain server answered nothing that could be timed: {calm.errors or 'answers of one token'}")
    return tuple(
        ServiceClass(name, Limits(round(first * ttft, 1), round(each * tpot, 1))) for name, (first, each) in RELATIVE_CLASSES.items()
    )


def _knee(measure: Callable[[Load], Measured]) -> float:
    """The knee of a server, searched from half of what it can do when it is full."""
    full = measure(Load(concurrency=SATURATING)).summary()
    if not full.requests_per_s:
        raise DSparkError(f"none of {full.requests} requests was answered: there is no load to search from")
    knee = find_knee(lambda rate: rate * measure(Load(rate_per_s=rate)).summary().goodput_share, full.requests_per_s / 2)
    print(f"knee: goodput of plain is highest at {knee:.3g} requests/s", flush=True)
    return knee


def find_knee(goodput: Callable[[float], float], start: float) -> float:
    """The rate at which goodput begins to fall: the best of a climb from ``start``, upwards, or downwards if that is better.

    Goodput of a rate that a server can keep is the rate itself, so a climb ends a little beyond the highest point.
    """
    found = {start: goodput(start)}
    _climb(goodput, found, start, KNEE_STEP)
    if max(found, key=found.__getitem__) == start:
        _climb(goodput, found, start, 1 / KNEE_STEP)
    return max(found, key=found.__getitem__)


def _climb(goodput: Callable[[float], float], found: dict[float, float], start: float, factor: float) -> None:
    rate = start
    for _ in range(KNEE_TRIES):
        rate *= factor
        found[rate] = goodput(rate)
        best = max(found.values())
        if found[rate] < KNEE_FALL * best or (factor > 1 and not best):  # more load does not help a server that keeps nothing
            return


def ratio_lines(rate: float, shares: Mapping[str, Sequence[float]]) -> list[str]:
    """Goodput of adaptive with budgets over that of the others at one rate: all turns together, and turn by turn."""
    each = ", ".join(f"{name} {rate * _mean(found):.3g}/s ({_mean(found):.0%})" for name, found in shares.items())
    lines = [f"goodput at {rate:.3g}/s: {each}"]
    for other in (ADAPTIVE, PLAIN):
        turns = ", ".join(_ratio(ours, theirs) for ours, theirs in zip(shares[WITH_BUDGETS], shares[other], strict=True))
        lines.append(f"{WITH_BUDGETS} / {other}: {_ratio(_mean(shares[WITH_BUDGETS]), _mean(shares[other]))} (turns: {turns})")
    return lines


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}x" if theirs else "- (nothing met its budgets)"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _record(plan: MixedPlan, serving: Serving, rate: float, repeat: int) -> dict[str, Any]:
    return {
        "kind": "mixed",
        "serving": serving.name,
        "prompt_set": "+".join(plan.sets),
        "rate_per_s": rate,
        "repeat": repeat,
        "refuses": plan.refuses,
        "seed": plan.seed + repeat,
        "temperature": plan.ask.temperature,
        "max_tokens": plan.ask.max_tokens,
    }
