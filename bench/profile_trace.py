"""Where the time of marked steps went, read out of a profiler's trace (Chrome's trace format, as torch.profiler writes it).

What does the work are kernels and copies on a GPU, and operators on a CPU. Each belongs to the part of a round in
which the host launched it; those of the target's forward are told apart by name. What is left of the time nobody works: it belongs
to what the host was doing meanwhile. Times are microseconds on the trace's clock.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

MARK = "dspark."  # begins the name of every mark
STEP, DRAFT, JUDGE, PLAN = (MARK + verb for verb in ("step", "draft", "judge", "plan"))
IDLE = {
    PLAN: "idle: planning",
    DRAFT: "idle: drafting's host work",
    JUDGE: "idle: judging's host work",
    STEP: "idle: other host work of a step",
    "": "idle: between steps",
}
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ATTENTION = re.compile(r"attn|attention|fmha|flash|sdpa|^attend|^combine|^store_kv", re.IGNORECASE)
_GEMM = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|linear|^multiply|(?:^|[^a-z])(?:add|b|badd)?mm(?:$|[^a-z])", re.IGNORECASE)
GRAPH_RECORDS = 8  # more records than one call launches by itself
_REDUCTION = re.compile(r"reduce", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Span:
    """Something with a begin and an end. ``order`` names the launch it came with (-1: unknown); records of one graph share theirs."""

    begin: float
    end: float
    name: str
    launched: float = 0.0
    order: int = -1


@dataclass(slots=True)
class Parts:
    """Microseconds and records of each part over all marked steps, idle parts included; ``total`` is their sum."""

    steps: int
    total: float
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    records: Counter[str] = field(default_factory=Counter)
    idle: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def read_parts(events: Sequence[Mapping[str, Any]]) -> Parts:
    """The parts of a trace; ValueError if it has no marked step."""
    whole = [event for event in events if event.get("ph") == "X"]
    marks = sorted(
        (_span(event) for event in whole if event.get("cat") == "user_annotation" and str(event["name"]).startswith(MARK)),
        key=lambda mark: (mark.begin, -mark.end),
    )
    steps = [mark for mark in marks if mark.name == STEP]
    if not steps:
        raise ValueError("the trace has no marked step")
    begin, end = steps[0].begin, max(step.end for step in steps)
    work = _device_work(whole) or _host_work(whole)
    inner = Innermost(marks)
    work = sorted((span for span in work if begin <= span.launched <= end), key=lambda span: span.begin)
    end = max([end, *(span.end for span in work)])  # the device may be busy with the last step when the host has left it
    parts = Parts(len(steps), end - begin)
    heads = _heads(work, inner)
    for span in work:
        part = _part(span, inner, heads)
        parts.records[part] += 1
        parts.busy[part] += span.end - span.begin
    _share_out_idle(parts, work, inner, begin, end)
    return parts


class Innermost:
    """Which mark the host was in at a time: of nested ones the innermost."""

    def __init__(self, marks: Sequence[Span]) -> None:
        edges: list[float] = []
        names: list[str] = []
        stack: list[Span] = []

        def leave(until: float) -> None:
            while stack and stack[-1].end <= until:
                edges.append(stack.pop().end)
                names.append(stack[-1].name if stack else "")

        for mark in marks:
            leave(mark.begin)
            stack.append(mark)
            edges.append(mark.begin)
            names.append(mark.name)
        leave(float("inf"))
        self._edges, self._names = edges, names

    def at(self, time: float) -> str:
        """The mark's name; empty outside of all."""
        place = bisect.bisect_right(self._edges, time) - 1
        return self._names[place] if place >= 0 else ""

    def pieces(self, begin: float, end: float) -> list[tuple[str, float]]:
        """(name, length) of the pieces that the marks cut an interval into."""
        first, last = bisect.bisect_right(self._edges, begin), bisect.bisect_left(self._edges, end)
        cuts = [begin, *self._edges[first:last], end]
        return [(self.at(left), right - left) for left, right in pairwise(cuts)]


def _span(event: Mapping[str, Any]) -> Span:
    begin = float(event["ts"])
    return Span(begin, begin + float(event.get("dur", 0.0)), str(event["name"]), begin)


def _device_work(events: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Kernels and copies, with the time at which the host launched them."""
    launches = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    found = []
    for event in events:
        if event.get("cat") in _DEVICE:
            order = int(event.get("args", {}).get("correlation", -1))
            span = _span(event)
            found.append(Span(span.begin, span.end, span.name, launches.get(order, span.begin), order))
    return found


def _host_work(events: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Operators of all threads: products and attention whole, of all others the innermost."""
    threads: dict[object, list[Span]] = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            threads.setdefault(event.get("tid"), []).append(_span(event))
    found: list[Span] = []
    for spans in threads.values():
        spans.sort(key=lambda span: (span.begin, -span.end))
        covered = float("-inf")
        for span, after in zip(spans, [*spans[1:], None], strict=True):
            if span.begin < covered:
                continue
            if after is None or after.begin >= span.end or _ATTENTION.search(span.name) or _GEMM.search(span.name):
                found.append(span)
                covered = span.end
    return found


def _heads(work: Sequence[Span], inner: Innermost) -> set[int]:
    """Ids of the output head's products: the last one of every forward, in a graph or between two rounds of other work."""
    last: dict[tuple[int, int], Span] = {}
    round_of, is_going = 0, False
    sizes = Counter(span.order for span in work)
    for span in work:
        is_forward = inner.at(span.launched) not in (DRAFT, JUDGE)
        if is_forward and not is_going:
            round_of += 1
        is_going = is_forward
        if is_forward and _GEMM.search(span.name) and not _REDUCTION.search(span.name) and not _ATTENTION.search(span.name):
            is_graph = span.order >= 0 and sizes[span.order] >= GRAPH_RECORDS
            last[(span.order, 0) if is_graph else (-1, round_of)] = span
    return {id(span) for span in last.values()}


def _part(span: Span, inner: Innermost, heads: set[int]) -> str:
    verb = inner.at(span.launched)
    if verb == DRAFT:
        return "draft"
    if verb == JUDGE:
        return "judge"
    if id(span) in heads:
        return "head"
    if _ATTENTION.search(span.name):
        return "attention"
    if _GEMM.search(span.name):
        return "GEMM"
    return "norms, rotary, pointwise, copies"


def _share_out_idle(parts: Parts, work: Sequence[Span], inner: Innermost, begin: float, end: float) -> None:
    """Give the time in which nothing worked to what the host did, and take time in which several worked from the busy parts."""
    free, overlap = begin, 0.0
    for span in work:
        if span.begin > free:
            _idle(parts, inner, free, span.begin)
        else:
            overlap += min(free, span.end) - span.begin
        free = max(free, span.end)
    if end > free:
        _idle(parts, inner, free, end)
    busy = sum(parts.busy.values())
    if overlap and busy:
        for part in parts.busy:
            parts.busy[part] *= 1 - overlap / busy


def _idle(parts: Parts, inner: Innermost, begin: float, end: float) -> None:
    for name, length in inner.pieces(begin, end):
        parts.idle[IDLE.get(name, IDLE[STEP])] += length
