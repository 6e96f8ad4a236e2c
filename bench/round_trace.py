"""What verification and drafting did when, as a Chrome trace (chrome://tracing, https://ui.perfetto.dev).

Spans of the verifier are on its own clock. A draft worker says only how long it computed: its span is put before the answer's
arrival, so it may be late by the time the answer travelled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from ``begin_s`` to ``end_s``; ``track`` is where it is drawn."""

    track: str
    name: str
    begin_s: float
    end_s: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class RoundTrace:
    """Collects spans of one engine and its draft workers."""

    spans: list[Span] = field(default_factory=list)

    def attach(self, engine: Any) -> None:
        """Hear of every step of an engine, and of every round of its remote drafter."""
        engine.on_step = self._step
        engine.drafter.on_round = self._round

    def detach(self, engine: Any) -> None:
        """Hear of nothing any more."""
        engine.on_step = None
        engine.drafter.on_round = None

    def hidden_share(self) -> float:
        """The share of draft workers' computing time during which the verifier was verifying; 0 if nothing was drafted."""
        verified = [(span.begin_s, span.end_s) for span in self.spans if span.name == "verify"]
        drafted = [(span.begin_s, span.end_s) for span in self.spans if span.name == "draft"]
        total = sum(end - begin for begin, end in drafted)
        hidden = sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in drafted for start, stop in verified)
        return hidden / total if total else 0.0

    def write(self, path: Path) -> None:
        """Write the trace; its times count from the first span."""
        first_s = min((span.begin_s for span in self.spans), default=0.0)
        tracks = {track: number for number, track in enumerate(dict.fromkeys(span.track for span in self.spans))}
        events: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": track}} for track, number in tracks.items()
        ]
        for span in self.spans:
            times = {"ts": 1e6 * (span.begin_s - first_s), "dur": 1e6 * (span.end_s - span.begin_s)}
            events.append({"name": span.name, "ph": "X", "pid": 0, "tid": tracks[span.track], "args": span.facts} | times)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")

    def _step(self, plan: Any, times: Any) -> None:
        facts = {"requests": [row.request_id for row in plan.rows], "tokens": plan.num_tokens}
        if times.drafted_s > times.begin_s:
            self.spans.append(Span("verifier", "wait for drafts", times.begin_s, times.drafted_s))
        self.spans.append(Span("verifier", "verify", times.drafted_s, times.judged_s, facts))

    def _round(self, round_: Any) -> None:
        facts = {"requests": round_.num_drafting}
        self.spans.append(Span(f"on the way to {round_.worker_id}", "round", round_.sent_s, round_.answered_s, facts))
        if round_.num_drafting:
            begin_s = max(round_.sent_s, round_.answered_s - round_.worker_s)
            self.spans.append(Span(f"draft worker {round_.worker_id}", "draft", begin_s, round_.answered_s, facts))
