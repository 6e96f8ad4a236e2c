"""What an engine counts; read by metrics and the bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark.sampling import AcceptanceRule

MAX_POSITIONS = 16  # of a draft that have counters of their own in the metrics


@dataclass(slots=True)
class RuleCounters:
    """Rounds that verified drafts under one acceptance rule."""

    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class EngineCounters:
    """Totals since start."""

    steps: int = 0
    step_tokens: int = 0  # tokens computed, drafted ones included
    rounds: int = 0  # request x step pairs that yielded tokens
    drafted_rounds: int = 0  # of those, with at least one drafted token
    drafted: int = 0
    accepted: int = 0
    generated: int = 0
    accepted_lengths: list[int] = field(default_factory=list)  # [k]: rounds that verified drafts and accepted k
    drafts_asked: int = 0  # of the drafter, one a request and step
    drafts_arrived: int = 0  # in time, and for the tokens that were known by then
    shadow_accepted: int = 0  # of shadow rounds that were trimmed: what verifying and committing everything would have accepted
    budget: int = 0  # drafted tokens that plans admitted
    windows: list[int] = field(default_factory=list)  # [k]: rounds that verified k drafted tokens
    timed_steps: int = 0
    step_seconds: float = 0.0  # forward and judge of those steps
    predicted_seconds: float = 0.0  # what the cost table said of them
    by_rule: dict[AcceptanceRule, RuleCounters] = field(default_factory=lambda: {rule: RuleCounters() for rule in AcceptanceRule})

    def count_round(self, drafted: int, accepted: int, generated: int, rule: AcceptanceRule) -> None:
        """Take in one request's share of a step."""
        self.rounds += 1
        self.drafted_rounds += drafted > 0
        self.drafted += drafted
        self.accepted += accepted
        self.generated += generated
        self.windows += [0] * (drafted + 1 - len(self.windows))
        self.windows[drafted] += 1
        self.accepted_lengths += [0] * (accepted + 1 - len(self.accepted_lengths))
        self.accepted_lengths[accepted] += drafted > 0
        self.by_rule[rule].drafted += drafted
        self.by_rule[rule].accepted += accepted

    def count_chains(self, drafted: int, accepted: Sequence[int], rules: Sequence[AcceptanceRule]) -> None:
        """``count_round`` of requests that each verified ``drafted`` drafts, and accepted so many of them."""
        count, total = len(accepted), sum(accepted)
        self.rounds += count
        self.drafted_rounds += count
        self.drafted += count * drafted
        self.accepted += total
        self.generated += count + total
        self.windows += [0] * (drafted + 1 - len(self.windows))
        self.windows[drafted] += count
        self.accepted_lengths += [0] * (drafted + 1 - len(self.accepted_lengths))
        for one, rule in zip(accepted, rules, strict=True):
            self.accepted_lengths[one] += 1
            self.by_rule[rule].drafted += drafted
            self.by_rule[rule].accepted += one

    def count_plain(self) -> None:
        """Take in a round of one token without drafts, not the first round of all."""
        self.rounds += 1
        self.generated += 1
        self.windows[0] += 1

    def accepted_by_position(self) -> dict[str, int]:
        """How often the drafted token at each position was accepted, as labelled counters; position 0 is the first of a draft."""
        rounds = list(self.accepted_lengths)
        longest = min(len(rounds) - 1, MAX_POSITIONS)
        return {f'accepted_tokens_per_pos_total{{position="{k}"}}': sum(rounds[k + 1 :]) for k in range(longest)}
