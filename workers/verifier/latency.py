"""What latency budgets ask of a step: who goes first, who may wait, and how much prefill fits. Pure; times are arguments.

A request may carry a time to first token (TTFT) and a time per output token after it (TPOT). Both are kept or missed as the
client sees them: TPOT is an average over the request, so a request that is ahead may lend time and one that is behind needs it
back. A request that cannot keep its budget any more no longer makes others wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

INF = math.inf
PATIENCE_S = 10.0  # a request without a (reachable) TTFT budget waits in line as if it had this one, so that it is never starved
MISSED = 1.5  # times its TPOT budget: beyond, and after MIN_TOKENS tokens, it will not be kept any more
MIN_TOKENS = 8
AIM = 0.9  # of a TPOT budget: prompts that come along are not predicted
HASTE = 0.5  # of the time to a first token that is planned with: others who are as urgent may come before it
MIN_CHUNK = 16  # prefill tokens of a step that go ahead whatever the budgets say
CATCH_UP = 16  # tokens in which a request that is behind is to be back on its pace: hurrying more would cost the others more than it gains
LEAST_PACE = 0.5  # of its budget that it is allowed meanwhile
AMPLE = 25.0  # steps: who can be left alone for longer, by its own budget, makes room for those who cannot
ROOM = 0.7  # of the longest step that the others' budgets allow, which those who can wait fill at most
EFFICIENCY = 0.85  # of the throughput of all rows that a step keeps if some are left out: what is put off has to be done all the same
StepSeconds = Callable[[int, int], float]  # (tokens, context positions) -> seconds


@dataclass(frozen=True, slots=True)
class Stake:
    """One running request that could take part in this step.

    ``allowed_s``: what the step may take for each token it gets (inf: no budget, or a missed one). ``expected``: tokens it
    gets a step. ``slack_s``: how long it can be left alone. ``left_out``: steps since it last took part.
    """

    context: int
    allowed_s: float = INF
    expected: float = 1.0
    slack_s: float = INF
    left_out: int = 0

    @property
    def limit_s(self) -> float:
        """Longest step that keeps its budget."""
        return self.allowed_s * self.expected


def stake(context: int, tpot_ms: float | None, num_after_first: int, since_first_s: float, expected: float, left_out: int) -> Stake:
    """The stake of a request that has had ``num_after_first`` tokens in the ``since_first_s`` since its first one."""
    if tpot_ms is None:
        return Stake(context, expected=expected, left_out=left_out)
    if num_after_first >= MIN_TOKENS and since_first_s > MISSED * tpot_ms / 1e3 * num_after_first:
        return Stake(context, expected=expected, left_out=left_out)
    budget = AIM * tpot_ms / 1e3
    ahead = budget * num_after_first - since_first_s
    allowed = budget + min(ahead, budget) if ahead > 0 else max(budget + ahead / CATCH_UP, LEAST_PACE * budget)
    return Stake(context, allowed, expected, max(0.0, ahead + budget * expected), left_out)


def choose_rows(stakes: Sequence[Stake], seconds: StepSeconds) -> list[bool]:
    """Which requests take part in a step: all of them, unless that breaks a budget that leaving some out would keep.

    Requests whose budgets leave them ample time make room first, whatever it costs: they were promised no more. They fill what the
    tightest budget of the others leaves, longest left out first.
    """
    everybody = seconds(len(stakes), sum(s.context for s in stakes))
    if not stakes or everybody <= min(s.limit_s for s in stakes):
        return [True] * len(stakes)
    patient = [i for i, s in enumerate(stakes) if AMPLE * everybody <= s.slack_s < INF]
    others = [i for i, s in enumerate(stakes) if not AMPLE * everybody <= s.slack_s < INF]
    if not others:
        return [True] * len(stakes)
    taking = [i for i, is_in in zip(others, _choose_of_hurried([stakes[i] for i in others], seconds), strict=True) if is_in]
    limit = ROOM * min(stakes[i].limit_s for i in taking)
    taking += _fill(stakes, taking, patient, limit, seconds, in_any_case=False)
    chosen = set(taking)
    return [i in chosen for i in range(len(stakes))]


def _choose_of_hurried(stakes: Sequence[Stake], seconds: StepSeconds) -> list[bool]:
    """``choose_rows`` among requests of which none has ample time.

    Requests that cannot wait for another step take part. The others fill what the tightest budget of those that take part leaves, and
    one of them always does, so that everybody moves. If that breaks a budget all the same, or the step would be much less efficient, all
    take part: nothing would be gained, and the line would grow.
    """
    everybody = seconds(len(stakes), sum(s.context for s in stakes))
    if everybody <= min(s.limit_s for s in stakes):
        return [True] * len(stakes)
    taking = [i for i, s in enumerate(stakes) if s.slack_s <= everybody]
    waiting = [i for i, s in enumerate(stakes) if s.slack_s > everybody]
    limit = min((stakes[i].limit_s for i in taking), default=INF)
    taking += _fill(stakes, taking, waiting, limit, seconds)
    chosen = set(taking)
    chosen_s = seconds(len(taking), sum(stakes[i].context for i in taking))
    is_efficient = len(taking) * everybody >= EFFICIENCY * len(stakes) * chosen_s
    keeps = chosen_s <= min(stakes[i].limit_s for i in taking)
    return [not (keeps and is_efficient) or i in chosen for i in range(len(stakes))]


def _fill(
    stakes: Sequence[Stake], taking: Sequence[int], waiting: Sequence[int], limit_s: float, seconds: StepSeconds, in_any_case: bool = True
) -> list[int]:
    """Those of ``waiting`` that fit beside ``taking`` within ``limit_s`` and their own limits, longest left out first.

    ``in_any_case``: the first of them takes part whatever it takes.
    """
    count, context = len(taking), sum(stakes[i].context for i in taking)
    filled: list[int] = []
    for i in sorted(waiting, key=lambda i: (-stakes[i].left_out, stakes[i].slack_s, i)):
        limit_s = min(limit_s, stakes[i].limit_s)
        if (filled or not in_any_case) and seconds(count + 1, context + stakes[i].context) > limit_s:
            break
        filled.append(i)
        count, context = count + 1, context + stakes[i].context
    return filled


def line_key(priority: int, arrived_s: float, ttft_ms: float | None, now_s: float, prefill_s: float) -> tuple[int, float]:
    """Place in the waiting line: by priority, then by the deadline of the first token, if it can still be kept."""
    if ttft_ms is None or arrived_s + ttft_ms / 1e3 < now_s + prefill_s:
        return priority, arrived_s + PATIENCE_S
    return priority, arrived_s + ttft_ms / 1e3


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt tokens that are to be computed: ``num_tokens`` of them, within ``left_s`` (inf: no budget, or a missed one)."""

    num_tokens: int
    left_s: float


def chunk_tokens(prefills: Sequence[Prefill], decode_s: float, limit_s: float, token_s: float, most: int) -> int:
    """How many prompt tokens a step may take in, at most ``most``.

    ``decode_s``: the step without them; ``limit_s``: longest step that keeps the budgets of those that decode; ``token_s``:
    seconds of a prompt token. Prompts get at least as long as the rest of the step takes: budgets are averages over a request, and
    a prompt in small pieces costs the same, later. If the first tokens of ``prefills`` (in their order) would come too late that way,
    the chunk is the one with the smallest worst overshoot of both. Where those that decode are late without any prompt, holding
    prompts back would only let the line grow: they get all there is. Prompts whose first token has ample time are last in line, and
    wait for an emptier step.
    """
    if math.isinf(limit_s) or token_s <= 0:
        return most
    hurried = sum(p.num_tokens for p in prefills if not AMPLE * decode_s <= p.left_s < INF)
    if hurried < sum(p.num_tokens for p in prefills):
        most = min(most, max(hurried, int((ROOM * limit_s - decode_s) / token_s)))
        if not most:
            return 0
    if decode_s >= limit_s:
        return most
    fits = min(max(int(max(limit_s - decode_s, decode_s) / token_s), MIN_CHUNK), most)
    ahead, needs = 0, []
    for prefill in prefills:
        ahead += prefill.num_tokens
        if math.isfinite(prefill.left_s):
            needs.append((ahead, max(HASTE * prefill.left_s, 1e-3)))

    def overshoot(chunk: int) -> float:
        step_s = decode_s + token_s * chunk
        late = max((math.ceil(tokens / chunk) * step_s / left_s for tokens, left_s in needs), default=0.0)
        return max(step_s / limit_s, late)

    best = fits
    chunk = fits
    while overshoot(best) > 1.0 and chunk < most:
        chunk = min(2 * chunk, most)
        if overshoot(chunk) < overshoot(best):
            best = chunk
    return best
