"""Sampled requests judged on the device, behind a step that was launched before its turn.

The step's logits lie where its graph left them, the drafts and their laws where the drafter did (``DeviceLaws``), and what requests ask
of sampling is sent when it changes: with a request that comes or goes, or another number of drafts. A graph for each size of a step then
leaves the target's tokens in place of the best ones (``step_end.py``), so the next step and the next drafts follow as they do behind a
greedy step, and nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dspark.asked import records_in
from dspark.kernels.chain_judge import Chains, judge_chains
from dspark.kernels.graphs import Capture, nothing_collected
from dspark.kernels.sampling import SamplingRows
from dspark.kernels.step_end import note_chains
from dspark.types import DeviceLaws
from dspark.workers.verifier.step_buffers import HOST_COPIES, NOTHING, StepBuffers

OF_TOKENS = {"seeds": torch.int64, "top_p": torch.float64, "min_p": torch.float64, "temperature": torch.float32, "top_k": torch.int32}
OF_REQUESTS = {"request_seeds": torch.int64, "rules": torch.int32, "first_rows": torch.int32, "counts": torch.int32}
NO_ROW = -1  # in ``top_k`` and ``counts``


class DeviceJudge:
    """Judges steps of ``buffers`` of at most ``max_rows`` requests, whose drafts are ``laws``; call ``prepare`` before the first."""

    def __init__(self, buffers: StepBuffers, max_rows: int, laws: DeviceLaws, device: torch.device, capture: Capture) -> None:
        self._buffers, self._laws, self._capture = buffers, laws, capture
        self._max_rows = max_rows
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

    @torch.inference_mode()
    def prepare(self, sizes: tuple[int, ...], logits: Callable[[], Tensor]) -> None:
        """Capture the graphs of all sizes. ``logits`` says where steps leave theirs: [N, V]."""
        self._send(sizes[-1], b"", 0, 1)
        with nothing_collected():
            for size in sizes[::-1]:
                self._buffers.fill(size, self._buffers.row_choices(size, 1)[-1], NOTHING)
                self._replays[size] = self._capture(self._program(size, logits))

    @torch.inference_mode()
    def run(self, size: int, asked: bytes, num_drafting: int, row_tokens: int) -> None:
        """Judge the step of ``size`` tokens that was launched last: the first ``num_drafting`` requests have ``row_tokens`` rows of logits
        each, the others one. ``asked``: of all of them, in order."""
        if self._sent != (size, asked, num_drafting, row_tokens):
            self._send(size, asked, num_drafting, row_tokens)
        self._replays[size]()

    def _send(self, size: int, asked: bytes, num_drafting: int, row_tokens: int) -> None:
        self._sent = (size, asked, num_drafting, row_tokens)
        self._turn = (self._turn + 1) % HOST_COPIES
        records = records_in(asked)
        lengths = np.ones(len(records), np.int64)
        lengths[:num_drafting] = row_tokens
        ends = np.cumsum(lengths)
        last = int(ends[-1]) if len(records) else 0
        raw = self._pinned[self._turn].numpy()
        fields = {name: raw[slice(*span)].view(_numpy_type(self._fields[name])) for name, span in self._spans.items()}
        for name, column in (("seeds", "seed"), ("top_p", "top_p"), ("min_p", "min_p"), ("temperature", "temperature"), ("top_k", "top_k")):
            fields[name][:last] = np.repeat(records[column], lengths)
        fields["temperature"][last:size] = 0.0
        fields["top_k"][last:size] = NO_ROW
        for name, values in (("request_seeds", records["seed"]), ("rules", records["rule"]), ("first_rows", ends - lengths)):
            fields[name][: len(records)] = values
        fields["first_rows"][len(records) :] = 0
        fields["counts"][: len(records)] = lengths - 1
        fields["counts"][len(records) :] = NO_ROW
        self._device.copy_(self._pinned[self._turn], non_blocking=True)

    def _program(self, size: int, logits: Callable[[], Tensor]) -> Callable[[], None]:
        num_requests = min(size, self._max_rows)
        positions, wanted = self._buffers.wanted_positions(size)
        tokens = {name: self._fields[name][:size] for name in OF_TOKENS}
        requests = {name: self._fields[name][:num_requests] for name in OF_REQUESTS}
        laws = DeviceLaws(*(part[:num_requests] for part in (self._laws.tokens, self._laws.ids, self._laws.probs)))

        def run() -> None:
            predicted = positions.index_select(0, wanted) + 1
            rows = SamplingRows(tokens["temperature"], tokens["top_k"], tokens["top_p"], tokens["min_p"], tokens["seeds"], predicted)
            chains = Chains(
                rules=requests["rules"],
                first_rows=requests["first_rows"],
                counts=requests["counts"],
                seeds=requests["request_seeds"],
                base_lens=predicted.index_select(0, requests["first_rows"]),
                drafts=laws.tokens,
                law_ids=laws.ids,
                law_probs=laws.probs,
            )
            own, accepted = judge_chains(logits()[:size], rows, chains)
            note_chains(own, accepted, requests["first_rows"], requests["counts"], self._buffers.own, self._buffers.matched)

        return run


def _numpy_type(field: Tensor) -> np.dtype[np.generic]:
    return torch.empty(0, dtype=field.dtype).numpy().dtype
