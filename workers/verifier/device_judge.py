"""Requests that are sampled, edit their logits or ask for scores, judged on the device behind a step that was launched before its turn.

The step's logits lie where its graph left them, the drafts and their laws where the drafter did (``DeviceLaws``), and what requests ask
of sampling is sent when it changes: with a request that comes or goes, or another number of drafts. A graph for each size of a step then
leaves the target's tokens in place of the best ones (``step_end.py``), so the next step and the next drafts follow as they do behind a
greedy step, and nothing waits for the host. Where some of the requests edit logits or are scored (``device_edits.py``) other graphs do
the same, one for each number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.asked import records_in
from dspark.kernels.chain_judge import Chains, judge_chains
from dspark.kernels.graphs import Capture, nothing_collected
from dspark.kernels.sampling import SamplingRows
from dspark.kernels.step_end import note_chains
from dspark.types import DeviceLaws
from dspark.workers.verifier.device_edits import EDIT_ROWS, DeviceEdits, Scores, numpy_type
from dspark.workers.verifier.edits import LogitEdits
from dspark.workers.verifier.step_buffers import HOST_COPIES, NOTHING, StepBuffers

OF_TOKENS = {"seeds": torch.int64, "top_p": torch.float64, "min_p": torch.float64, "temperature": torch.float32, "top_k": torch.int32}
OF_REQUESTS = {"request_seeds": torch.int64, "rules": torch.int32, "first_rows": torch.int32, "counts": torch.int32}
NO_ROW = -1  # in ``top_k`` and ``counts``
EDIT_SIZES = tuple(2**k for k in range(EDIT_ROWS.bit_length()))  # rows of logits that graphs with edits are captured for


class DeviceJudge:
    """Judges steps of ``buffers`` of at most ``max_rows`` requests, whose drafts are ``laws``; call ``prepare`` before the first."""

    def __init__(self, buffers: StepBuffers, max_rows: int, laws: DeviceLaws, edits: DeviceEdits, capture: Capture) -> None:
        self._buffers, self._laws, self._capture = buffers, laws, capture
        self._max_rows, self.edits = max_rows, edits
        device = laws.tokens.device
        counts = dict.fromkeys(OF_TOKENS, buffers.max_tokens) | dict.fromkeys(OF_REQUESTS, max_rows)
        types = OF_TOKENS | OF_REQUESTS
        self._spans: dict[str, tuple[int, int]] = {}
        begin = 0
        for name in sorted(types, key=lambda name: -types[name].itemsize):  # the wide ones first, so that all are aligned
            end = begin + counts[name] * types[name].itemsize
            self._spans[name] = (begin, end)
            begin = -(-end // 16) * 16
        self._device = torch.zeros(begin, dtype=torch.uint8, device=device)
        self._fields = {name: self._device[slice(*span)].view(types[name]) for name, span in self._spans.items()}
        self._pinned = [torch.zeros(begin, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(HOST_COPIES)]
        self._turn = 0
        self._sent: tuple[int, bytes, int, int] | None = None
        self._replays: dict[int, Callable[[], None]] = {}
        self._editing: dict[tuple[int, bool], Callable[[], None]] = {}
        self._edit_sizes: list[int] = []

    @torch.inference_mode()
    def prepare(self, sizes: tuple[int, ...], logits: Callable[[], Tensor]) -> None:
        """Capture the graphs of all sizes. ``logits`` says where steps leave theirs: [N, V]."""
        self._send(sizes[-1], b"", 0, 1)
        with nothing_collected():
            for size in sizes[::-1]:
                self._buffers.fill(size, self._buffers.row_choices(size, 1)[-1], NOTHING)
                self._replays[size] = self._capture(self._program(size, logits))
            self._edit_sizes = [size for size in EDIT_SIZES if size <= sizes[-1]] or [sizes[-1]]
            self.edits.send((), np.empty(0, np.int64))
            for size in self._edit_sizes[::-1]:
                for scores in (True, False):
                    self._editing[size, scores] = self._capture(self._editing_program(size, logits, scores))

    @torch.inference_mode()
    def run(
        self, size: int, asked: bytes, num_drafting: int, row_tokens: int, edits: tuple[LogitEdits | None, ...] | None = None
    ) -> Scores | None:
        """Judge the step of ``size`` tokens that was launched last: the first ``num_drafting`` requests have ``row_tokens`` rows of logits
        each, the others one. ``asked``, ``edits``: of all of them, in order. Returns scores where somebody asks for them."""
        is_sent = self._sent == (size, asked, num_drafting, row_tokens)
        if not is_sent:
            self._send(size, asked, num_drafting, row_tokens)
        if edits is None:
            self._replays[size]()
            return None
        lengths = row_lengths(len(records_in(asked)), num_drafting, row_tokens)
        num_rows = int(lengths.sum())
        if not is_sent or not self.edits.holds(edits):
            self.edits.send(edits, lengths)
        rows = next(rows for rows in self._edit_sizes if rows >= num_rows)
        positions, wanted = self._buffers.wanted_positions(size)
        count = min(rows, size)
        torch.index_select(positions, 0, wanted[:count], out=self.edits.positions[:count])
        scores = any(one is not None and one.scores for one in edits)
        self._editing[rows, scores]()
        return self.edits.sent_scores(num_rows) if scores else None

    def _send(self, size: int, asked: bytes, num_drafting: int, row_tokens: int) -> None:
        self._sent = (size, asked, num_drafting, row_tokens)
        self._turn = (self._turn + 1) % HOST_COPIES
        records = records_in(asked)
        lengths = row_lengths(len(records), num_drafting, row_tokens)
        ends = np.cumsum(lengths)
        last = int(ends[-1]) if len(records) else 0
        raw = self._pinned[self._turn].numpy()
        fields = {name: raw[slice(*span)].view(numpy_type(self._fields[name])) for name, span in self._spans.items()}
        for name, column in (("seeds", "seed"), ("top_p", "top_p"), ("min_p", "min_p"), ("temperature", "temperature"), ("top_k", "top_k")):
            fields[name][:last] = np.repeat(records[column], lengths)
        fields["temperature"][last:] = 0.0
        fields["top_k"][last:] = NO_ROW
        for name, values in (("request_seeds", records["seed"]), ("rules", records["rule"]), ("first_rows", ends - lengths)):
            fields[name][: len(records)] = values
        fields["first_rows"][len(records) :] = 0
        fields["counts"][: len(records)] = lengths - 1
        fields["counts"][len(records) :] = NO_ROW
        self._device.copy_(self._pinned[self._turn], non_blocking=True)

    def _program(self, size: int, logits: Callable[[], Tensor]) -> Callable[[], None]:
        positions, wanted = self._buffers.wanted_positions(size)

        def run() -> None:
            self._judge(logits()[:size], positions.index_select(0, wanted) + 1)

        return run

    def _editing_program(self, size: int, logits: Callable[[], Tensor], scores: bool) -> Callable[[], None]:
        """The same of rows that are edited, or scored besides."""

        def run() -> None:
            raw = logits()[:size]
            self.edits.positions[:size].add_(1)  # from where the rows are to what they predict
            edited = self.edits.edit(raw, min(size, self._max_rows))
            own, accepted = self._judge(edited, self.edits.positions[:size])
            self.edits.count(own, accepted, self._fields["counts"][: own.shape[0]])
            if scores:
                self.edits.score(raw, self._buffers.own[:size])

        return run

    def _judge(self, logits: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Judge rows of logits [N, V] that predict positions [N], and leave what stands where steps do. Part of a graph."""
        size = logits.shape[0]
        num_requests = min(size, self._max_rows)
        tokens = {name: self._fields[name][:size] for name in OF_TOKENS}
        requests = {name: self._fields[name][:num_requests] for name in OF_REQUESTS}
        rows = SamplingRows(tokens["temperature"], tokens["top_k"], tokens["top_p"], tokens["min_p"], tokens["seeds"], predicted)
        chains = Chains(
            rules=requests["rules"],
            first_rows=requests["first_rows"],
            counts=requests["counts"],
            seeds=requests["request_seeds"],
            base_lens=predicted.index_select(0, requests["first_rows"]),
            drafts=self._laws.tokens[:num_requests],
            law_ids=self._laws.ids[:num_requests],
            law_probs=self._laws.probs[:num_requests],
        )
        own, accepted = judge_chains(logits, rows, chains)
        note_chains(own, accepted, requests["first_rows"], requests["counts"], self._buffers.own, self._buffers.matched)
        return own, accepted


def row_lengths(num_requests: int, num_drafting: int, row_tokens: int) -> NDArray[np.int64]:
    """Rows of logits of each request of a step, those that draft first."""
    lengths = np.ones(num_requests, np.int64)
    lengths[:num_drafting] = row_tokens
    return lengths
