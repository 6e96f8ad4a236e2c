"""How many verifiers there should be, and how much of the drafts they may verify, by latency budgets. Pure: time is an argument.

Too few requests keep their budgets: first the cluster's speculation is limited, if fewer verified tokens a step are predicted to
be enough (or nothing else can be done); otherwise verifiers are added, as many as are predicted to be enough, at most twice as
many. Enough requests keep them: the limit is lifted again, and a verifier is removed once the others are predicted to do
without it, at load x N / (N - 1), for the whole cooldown.

What the paper trail of such scalers teaches is kept here: requests that still wait count as soon as they are late (the queue is
part of the latency); requests of a verifier that has just started don't count; missing data decides nothing; a count that
failed at some rate of requests is not tried again near that rate (no 2 <-> 1 <-> 2); what cannot be scheduled is not waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from dspark.router.outlook import Drafting, Load, is_met, loaded, mean_view, share_met
from dspark.router.replica_count import CountRules, ReplicaCount, ScalingState
from dspark.router.samples import Sample
from dspark.types import LatencyBudget, ReplicaView

MAX_REPORT_AGE_S: Final = 10.0
LIMITS: Final = (1.0, 0.75, 0.5, 0.25, 0.0)  # of speculation
NOTICEABLE: Final = 0.02  # gain in the share met below which a change is not worth its trouble
RATE_SPAN_S: Final = 5.0
FALLING: Final = 0.95  # of the load before it
FAILED_RATE_SHARE: Final = 0.8  # a count that failed is tried again under this share of the rate at which it failed
FAILED_MEMORY: Final = 10.0  # down cooldowns after which a failed count may be tried again, doubled each time that it fails
MAX_DOUBLINGS: Final = 6


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator wants; ``default_budget`` is that of requests without one (for scaling alone).

    ``is_fixed``: the number of verifiers is somebody else's; only speculation is decided.
    """

    count: CountRules
    target_met: float
    window_s: float
    min_samples: int
    cold_start_s: float
    default_budget: LatencyBudget
    speculation_lever: bool
    is_fixed: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """One verifier at one moment; ``up_s`` is how long it has been there."""

    view: ReplicaView
    healthy: bool
    up_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """``met``: share of the requests in the window that kept their budgets, None if there were too few."""

    wanted: int
    speculation_limit: float
    state: ScalingState
    reason: str
    met: float | None = None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known when a decision is due."""

    samples: Sequence[Sample]  # those that count, late waiting ones included
    ended_per_s: float
    load: Load
    view: ReplicaView
    met: float


@dataclass(frozen=True, slots=True)
class _Failure:
    """A count that was too small, or a limit that was too high: when, at how many requests a second, and how often before."""

    at_s: float
    ended_per_s: float
    times: int


def _failure(before: _Failure | None, now_s: float, seen: _Seen) -> _Failure:
    return _Failure(now_s, seen.ended_per_s, 0 if before is None else min(before.times + 1, MAX_DOUBLINGS))


class VerifierScaler:
    """Call ``decide`` about once a second with all that came since the last call."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.count = ReplicaCount(rules.count)
        self.limit = 1.0
        self._limit_changed_s = float("-inf")
        self._judged_from_s = float("-inf")  # requests that came before are not this count's fault
        self._samples: deque[tuple[float, Sample]] = deque()  # when each came
        self._loads: deque[tuple[float, Load]] = deque()
        self._failed: dict[int, _Failure] = {}  # by count
        self._failed_limits: dict[float, _Failure] = {}
        self._drafting: Drafting | None = None

    def decide(self, now_s: float, reports: Sequence[Report], samples: Sequence[Sample]) -> Decision:
        """What to want from now on. ``samples``: requests that ended since the last call, and those that wait now."""
        present = [report for report in reports if not report.view.draining]
        silent = [report for report in present if report.view.age_s > MAX_REPORT_AGE_S or not report.healthy]
        self._keep(now_s, present, samples)
        if not present or silent:
            names = ", ".join(report.view.id for report in silent) or "any verifier"
            return self._hold(ScalingState.BLIND, f"no word of {names}")
        if self.rules.is_fixed:
            self.count.follow(len(present), now_s)
        state = self.count.observe(len(present), now_s)
        if state is not None:
            self._note_pressure(now_s, len(present))
            return self._hold(state, f"{len(present)} verifiers are there, {self.count.wanted} are wanted")
        seen = self._look(now_s, present, samples)
        if len(seen.samples) >= self.rules.min_samples and seen.met < self.rules.target_met:
            if self._load_falls(now_s):
                self._judged_from_s = now_s
                self.count.shrink_if_spare(False, now_s)
                return self._hold(ScalingState.SETTLING, f"{seen.met:.0%} of requests kept their budgets; the load is falling", seen.met)
            return self._help(now_s, seen)
        return self._spare(now_s, seen)

    def _keep(self, now_s: float, present: Sequence[Report], samples: Sequence[Sample]) -> None:
        warm = {report.view.id for report in present if report.up_s >= self.rules.cold_start_s}
        self._samples.extend((now_s, sample) for sample in samples if sample.ended and sample.replica_id in warm)
        if present:
            rows = sum(report.view.running + report.view.queued for report in present) / len(present)
            tokens = sum(report.view.queued_tokens for report in present) / len(present)
            self._loads.append((now_s, Load(rows, tokens)))
        for kept in (self._samples, self._loads):
            while kept and kept[0][0] < now_s - self.rules.window_s:
                kept.popleft()

    def _look(self, now_s: float, present: Sequence[Report], samples: Sequence[Sample]) -> _Seen:
        """The window since the last change of anything."""
        since_s = max(self.count.changed_s, self._limit_changed_s, self._judged_from_s, now_s - self.rules.window_s)
        ended = [sample for _, sample in self._samples if sample.arrived_s >= since_s]
        default = self.rules.default_budget
        waiting = [s for s in samples if not s.ended and s.arrived_s >= since_s and not is_met(s, default)]
        loads = [load for at_s, load in self._loads if at_s >= since_s] or [self._loads[-1][1]]
        view = mean_view([report.view for report in present])
        self._drafting = Drafting.unlimited(view) or self._drafting
        counted = [*ended, *waiting]
        return _Seen(
            samples=counted,
            ended_per_s=len(ended) / max(now_s - since_s, 1.0),
            load=Load(sum(load.rows for load in loads) / len(loads), sum(load.queued_tokens for load in loads) / len(loads)),
            view=view,
            met=sum(is_met(sample, default) for sample in counted) / len(counted) if counted else 1.0,
        )

    def _note_pressure(self, now_s: float, present: int) -> None:
        """A count that failed goes on failing until help has come: the most that it did meanwhile is the rate at which it fails."""
        failure = self._failed.get(present)
        if failure is not None and present < self.count.wanted:
            since_s = max(failure.at_s, now_s - RATE_SPAN_S)
            ended = sum(at_s > since_s for at_s, _ in self._samples)
            rate = max(failure.ended_per_s, ended / RATE_SPAN_S)
            self._failed[present] = replace(failure, ended_per_s=rate)

    def _load_falls(self, now_s: float) -> bool:
        """Whether requests in the system get fewer, as while a new verifier works off what had piled up before it came."""
        since_s = max(self.count.changed_s, now_s - self.rules.count.up_cooldown_s)
        rows = [load.rows for at_s, load in self._loads if at_s >= since_s]
        half = len(rows) // 2
        return half > 1 and sum(rows[-half:]) < FALLING * sum(rows[:half])

    def _help(self, now_s: float, seen: _Seen) -> Decision:
        """Too few requests keep their budgets."""
        rules, count = self.rules, self.count
        count.shrink_if_spare(False, now_s)
        missed = f"{seen.met:.0%} of {len(seen.samples)} requests kept their budgets"
        is_last_resort = rules.is_fixed or count.wanted >= rules.count.max_count or count.is_blocked(now_s)
        limit, share = self._best_limit(seen)
        helps = share >= (seen.met + NOTICEABLE if is_last_resort else rules.target_met)
        if limit < self.limit and helps:
            self._failed_limits[self.limit] = _failure(self._failed_limits.get(self.limit), now_s, seen)
            return self._set_limit(limit, now_s, seen, f"{missed}; {share:.0%} are expected with speculation at {limit:g}")
        if count.is_blocked(now_s):
            return self._hold(ScalingState.UNSCHEDULABLE, f"{missed}; the last verifier that was asked for did not come", seen.met)
        if is_last_resort:
            return self._hold(ScalingState.AT_LIMIT, f"{missed}, and no more verifiers may be added", seen.met)
        if not count.may_grow(now_s):
            return self._hold(ScalingState.SETTLING, f"{missed}; the last change is too young", seen.met)
        wanted, share = self._enough(seen)
        is_saturated = seen.load.rows > seen.view.max_running  # then one more helps, whatever a steady state would say
        if share < seen.met + NOTICEABLE and not is_saturated:
            return self._hold(ScalingState.NO_GAIN, f"{missed}; more verifiers would not help", seen.met)
        self._failed[count.wanted] = _failure(self._failed.get(count.wanted), now_s, seen)
        count.grow(wanted, now_s)
        return self._hold(ScalingState.SCALING, f"{missed}; {share:.0%} are expected of {wanted} verifiers", seen.met)

    def _spare(self, now_s: float, seen: _Seen) -> Decision:
        """Enough requests keep their budgets, or too few came to tell."""
        rules, count = self.rules, self.count
        comfortable = (1.0 + rules.target_met) / 2
        enough = len(seen.samples) >= rules.min_samples
        met = seen.met if enough else None
        if self.limit < 1.0 and now_s - self._limit_changed_s >= rules.count.up_cooldown_s and seen.met >= rules.target_met:
            higher = LIMITS[LIMITS.index(self.limit) - 1]
            if self._share_at(seen, limit=higher) >= comfortable and not self._failed_near(self._failed_limits.get(higher), seen, now_s):
                return self._set_limit(higher, now_s, seen, f"budgets are kept; speculation goes to {higher:g}")
        fewer = count.wanted - 1
        can_do_without = (
            not rules.is_fixed
            and fewer >= rules.count.min_count
            and seen.met >= rules.target_met
            and not self._failed_near(self._failed.get(fewer), seen, now_s)
            and not loaded(seen.view, seen.load, count.wanted / fewer).queued
            and self._share_at(seen, count.wanted / fewer) >= comfortable
        )
        if count.shrink_if_spare(can_do_without, now_s):
            return self._hold(ScalingState.SCALING, f"{fewer} verifiers are expected to be enough", met)
        if not enough:
            return self._hold(ScalingState.SETTLING, f"{len(seen.samples)} requests since the last change", met)
        return self._hold(ScalingState.STEADY, f"{seen.met:.0%} of {len(seen.samples)} requests kept their budgets", met)

    def _best_limit(self, seen: _Seen) -> tuple[float, float]:
        """The highest limit that is predicted to be enough, else the one under which most budgets are kept; and that share."""
        if not self.rules.speculation_lever or self._drafting is None:
            return self.limit, seen.met
        shares = [(limit, self._share_at(seen, limit=limit)) for limit in LIMITS]
        enough = [(limit, share) for limit, share in shares if share >= self.rules.target_met]
        return enough[0] if enough else max(shares, key=lambda entry: (entry[1], entry[0]))

    def _enough(self, seen: _Seen) -> tuple[int, float]:
        """The fewest verifiers that are predicted to be enough, at most twice as many as now; and the share met then."""
        now, most = self.count.wanted, min(2 * self.count.wanted, self.rules.count.max_count)
        for wanted in range(now + 1, most + 1):
            share = self._share_at(seen, now / wanted)
            if share >= self.rules.target_met:
                break
        return wanted, share

    def _share_at(self, seen: _Seen, factor: float = 1.0, limit: float | None = None) -> float:
        """Predicted share of kept budgets with ``factor`` times the load a verifier, or under another limit."""
        now = loaded(seen.view, seen.load, 1.0)
        limited = seen.view if limit is None or self._drafting is None else self._drafting.limited(seen.view, limit)
        return share_met(seen.samples, self.rules.default_budget, now, loaded(limited, seen.load, factor))

    def _failed_near(self, failure: _Failure | None, seen: _Seen, now_s: float) -> bool:
        """Whether something failed not long ago under nearly the present load."""
        if failure is None or now_s - failure.at_s > FAILED_MEMORY * 2**failure.times * self.rules.count.down_cooldown_s:
            return False
        return seen.ended_per_s > FAILED_RATE_SHARE * failure.ended_per_s

    def _set_limit(self, limit: float, now_s: float, seen: _Seen, reason: str) -> Decision:
        self.limit, self._limit_changed_s = limit, now_s
        return self._hold(ScalingState.SETTLING, reason, seen.met)

    def _hold(self, state: ScalingState, reason: str, met: float | None = None) -> Decision:
        return Decision(self.count.wanted, self.limit, state, reason, met)
