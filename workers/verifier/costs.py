"""What a step costs on this engine: measured at start, kept true by the steps that run (DSpark section 3.2, SPS(B)).

::

    verify   seconds(tokens) + context_s * (context positions that the step's rows attend to)
    prefill  seconds of each prompt token, which costs less than a verified one: it needs no row of the output head
    draft    first(requests) + deeper(requests) * (depth - 1) + draft_context_s * (context positions of the drafting requests)

On two cores with SmolLM2-135M the first line is within a tenth of what was measured from 1 to 256 tokens, 1 to 64 rows and
64 to 900 positions each; without the context 64 rows at 256 positions would be predicted at half their cost.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
HOST_RATE = 0.05  # of the running mean of the host's work
FLOWN_RATE = 0.1
LONGEST_HOST_ROW_S = 1e-3  # of a request; more is a disturbance


@dataclass(frozen=True, slots=True)
class Curve:
    """A monotone, piecewise linear cost: ``seconds[i]`` at ``sizes[i]``; beyond the last size the last slope goes on."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    @staticmethod
    def fit(points: Sequence[tuple[int, float]]) -> Curve:
        """The smallest non-decreasing curve through measured points (a cheaper larger step caps the smaller ones).

        A step can always be padded, so a size never costs more than a larger one was measured to cost.
        """
        ordered = sorted(points)
        seconds = [s for _, s in ordered]
        for i in range(len(seconds) - 2, -1, -1):
            seconds[i] = min(seconds[i], seconds[i + 1])
        return Curve(tuple(size for size, _ in ordered), tuple(seconds))

    def __call__(self, size: int) -> float:
        """Seconds at ``size`` (at least the first measured size)."""
        sizes, seconds = self.sizes, self.seconds
        if len(sizes) == 1:
            return seconds[0]
        right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (sizes[right] - sizes[left])
        return max(seconds[0], seconds[left] + slope * (size - sizes[left]))

    def dense(self, limit: int) -> Floats:
        """Seconds [limit + 1] at 0 .. ``limit``."""
        sizes = np.arange(limit + 1, dtype=np.float64)
        values: Floats = np.interp(sizes, self.sizes, self.seconds)
        if len(self.sizes) > 1 and limit > self.sizes[-1]:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2])
            values[self.sizes[-1] :] += slope * (sizes[self.sizes[-1] :] - self.sizes[-1])
        return values

    def scaled(self, factors: Sequence[float]) -> Curve:
        """The curve with each knot multiplied by its factor, monotone again."""
        return Curve.fit([(size, s * f) for size, s, f in zip(self.sizes, self.seconds, factors, strict=True)])


NOTHING = Curve((1,), (0.0,))


@dataclass(frozen=True, slots=True)
class CostTable:
    """What a step costs on this engine; see the module's first lines for the terms."""

    verify: Curve
    draft: Curve = NOTHING  # a block of depth 1, by requests
    verify_context_s: float = 0.0
    prefill_s: float = 0.0
    draft_deeper: Curve = NOTHING  # each further position of depth, by requests
    draft_context_s: float = 0.0

    def step_seconds(self, num_tokens: int, context_tokens: int = 0) -> float:
        """Seconds of a step that verifies ``num_tokens`` over rows with ``context_tokens`` positions of context in all."""
        return self.verify(num_tokens) + self.verify_context_s * context_tokens

    def draft_seconds(self, num_requests: int, depth: int, context_tokens: int = 0) -> float:
        """Seconds of drafting ``depth`` tokens for ``num_requests`` requests."""
        if not num_requests or not depth:
            return 0.0
        return self.draft(num_requests) + self.draft_deeper(num_requests) * (depth - 1) + self.draft_context_s * context_tokens


@dataclass(slots=True)
class Correction:
    """How far running steps are from a measured curve: a factor for all sizes and one for each knot, as logarithms."""

    RATE = 0.05  # of a knot's factor, for a step right at the knot
    COMMON_RATE = 0.02
    LARGEST = math.log(3.0)  # a step that took longer was disturbed; a factor never goes beyond

    sizes: tuple[int, ...]
    common: float = 0.0
    knots: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.knots = self.knots or [0.0] * len(self.sizes)

    def observe(self, size: int, predicted_s: float, measured_s: float) -> None:
        """Take in one step; sizes beyond the last knot count as the last."""
        if predicted_s <= 0 or measured_s <= 0:
            return
        error = min(max(math.log(measured_s / predicted_s), -self.LARGEST), self.LARGEST)
        self.common = self._bounded(self.common + self.COMMON_RATE * error)
        right = min(bisect_left(self.sizes, size), len(self.sizes) - 1)
        left = max(right - 1, 0) if self.sizes[right] > size else right
        span = self.sizes[right] - self.sizes[left]
        share = (size - self.sizes[left]) / span if span else 1.0
        for knot, weight in ((left, 1.0 - share), (right, share)):
            self.knots[knot] = self._bounded(self.knots[knot] + self.RATE * weight * error)

    def factors(self) -> list[float]:
        """What each knot's seconds are to be multiplied by."""
        return [math.exp(self._bounded(self.common + knot)) for knot in self.knots]

    def _bounded(self, value: float) -> float:
        return min(max(value, -self.LARGEST), self.LARGEST)


class LiveCosts:
    """A cost table that follows the machine: steps that run correct it, damped, and nothing else does.

    ``table`` is what holds now. A disturbed machine slows all sizes alike, which the common factor learns without a bias
    towards sizes that were not run lately; the knots learn what is particular to a size.
    """

    REFRESH_EVERY = 16  # steps; a new table costs a millisecond

    def __init__(self, measured: CostTable, max_tokens: int, padded: Callable[[int], int] = int) -> None:
        """``padded``: the size that a step of so many tokens is padded to."""
        self.measured = measured
        self.table = measured
        self._max_tokens = max_tokens
        self._padded = np.minimum([padded(size) for size in range(max_tokens + 1)], max_tokens)
        self._verify = Correction(measured.verify.sizes)
        self._draft = Correction(measured.draft.sizes)
        self._plain = Correction(measured.verify.sizes)
        self._plain_curve: Curve | None = None
        self._host_row_s: dict[bool, float] = {}  # by whether the round drafted
        self._flown: dict[int, float] = {}  # logarithms of factors, by the number of rows in bits
        self._num_observed = 0
        self._set_dense()

    def extra_seconds(self, base_tokens: int, context_tokens: int, max_extra: int, with_padding: bool = True) -> Floats:
        """Seconds [n + 1] of a step with ``base_tokens`` and 0 .. n more, n the largest that was asked for and is tabled.

        ``with_padding``: a staircase, as steps are padded; otherwise the curve through it.
        """
        last = min(base_tokens + max_extra, self._max_tokens)
        dense = self._stairs if with_padding else self._dense
        seconds: Floats = dense[base_tokens : last + 1] + self.table.verify_context_s * context_tokens
        return seconds

    def observe_verify(self, num_tokens: int, context_tokens: int, seconds: float) -> None:
        """A decode step (no prompt tokens) took ``seconds``, the judge included."""
        self._verify.observe(num_tokens, self.table.step_seconds(num_tokens, context_tokens), seconds)
        self._refresh()

    def observe_draft(self, num_requests: int, depth: int, context_tokens: int, seconds: float) -> None:
        """A draft round took ``seconds``."""
        self._draft.observe(num_requests, self.table.draft_seconds(num_requests, depth, context_tokens), seconds)
        self._refresh()

    def observe_plain(self, num_tokens: int, context_tokens: int, seconds: float) -> None:
        """A plain step that was launched ahead took ``seconds`` from the end of the one before: the host's work lies under it."""
        curve = self.measured.verify if self._plain_curve is None else self._plain_curve
        predicted_s = curve(num_tokens) + self.table.verify_context_s * context_tokens
        self._plain.observe(num_tokens, predicted_s, seconds)
        self._plain_curve = self._plain_curve or curve
        self._refresh()

    def plain_seconds(self, num_tokens: int, context_tokens: int) -> float:
        """Seconds of a step without drafts that is launched ahead: what the table says, until such steps have run."""
        if self._plain_curve is None:
            return self.table.step_seconds(num_tokens, context_tokens)
        return self._plain_curve(num_tokens) + self.table.verify_context_s * context_tokens

    def observe_host(self, num_rows: int, seconds: float, drafted: bool) -> None:
        """Between the verdicts of a round, which ``drafted`` or not, and the next one the host took ``seconds`` for so many requests."""
        row_s = min(seconds / num_rows, LONGEST_HOST_ROW_S)
        before_s = self._host_row_s.get(drafted)
        self._host_row_s[drafted] = row_s if before_s is None else before_s + HOST_RATE * (row_s - before_s)

    def host_seconds(self, num_rows: int, drafted: bool) -> float:
        """What to expect of it, of rounds of the other kind where none of this kind was seen; 0 where it is not measured."""
        known = self._host_row_s
        return known.get(drafted, known.get(not drafted, 0.0)) * num_rows

    def observe_flown(self, num_rows: int, depth: int, context_tokens: int, seconds: float) -> None:
        """A round of whole chains that was launched ahead took ``seconds`` from the end of the one before.

        Nothing waits for anything in such rounds: they take less than drafting and verifying measured one after the other, and more
        where the host has more to do than fits under the device's work.
        """
        predicted_s = self.table.step_seconds(num_rows * (depth + 1), context_tokens)
        predicted_s += self.table.draft_seconds(num_rows, depth, context_tokens)
        error = min(max(math.log(seconds / predicted_s), -Correction.LARGEST), Correction.LARGEST)
        level = num_rows.bit_length()
        before = self._flown.get(level)
        self._flown[level] = error if before is None else before + FLOWN_RATE * (error - before)

    def flown_factor(self, num_rows: int) -> float | None:
        """What such rounds take of what the table says, at this level of load or the nearest one that is known; None: at none."""
        if not self._flown:
            return None
        level = num_rows.bit_length()
        return math.exp(self._flown[min(self._flown, key=lambda known: (abs(known - level), known))])

    def _refresh(self) -> None:
        self._num_observed += 1
        if self._num_observed % self.REFRESH_EVERY:
            return
        m, verify, draft = self.measured, self._verify.factors(), self._draft.factors()
        common, draft_common = math.exp(self._verify.common), math.exp(self._draft.common)
        self.table = CostTable(
            verify=m.verify.scaled(verify),
            draft=m.draft.scaled(draft),
            verify_context_s=m.verify_context_s * common,
            prefill_s=m.prefill_s * common,
            draft_deeper=Curve(m.draft_deeper.sizes, tuple(s * draft_common for s in m.draft_deeper.seconds)),
            draft_context_s=m.draft_context_s * draft_common,
        )
        self._set_dense()
        if self._plain_curve is not None:
            self._plain_curve = m.verify.scaled(self._plain.factors())

    def _set_dense(self) -> None:
        """The table's curve at 0 .. the most tokens, and the staircase of padded steps."""
        self._dense = self.table.verify.dense(self._max_tokens)
        self._stairs = self._dense[self._padded]
