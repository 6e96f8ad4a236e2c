"""Drafting chains for R requests as one graph: from anchors and block tables (``draft_buffers.py``) to tokens, confidences and laws.

::

    outcome       [R, 3 * γ + 2] fp64 tokens, confidences, margins, anchor and position: one copy to the host
    own, matched  [N]         the target's token of every row of a step; whether the token behind a row is that one

What drafts is a ``Blocks``: all positions at once (``dspark_blocks.py``), or one after the other (``eagle3_blocks.py``). Where some of
the requests are sampled, chains that continue a step leave their tokens and laws for the judge of the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dspark.asked import COUPLED, records_in
from dspark.kernels.buckets import graph_sizes
from dspark.kernels.draft_rows import BlockStart, Paging, StepEnd, begin, begin_after, pack
from dspark.kernels.graphs import Capture, nothing_collected
from dspark.kernels.host_copy import HostCopy
from dspark.types import Continuations, DeviceDrafts, DeviceLaws, DraftedChains
from dspark.workers.drafter.block_draw import BlockDraft, DrawRows
from dspark.workers.drafter.draft_buffers import DraftBuffers, DraftRow, host_buffers
from dspark.workers.drafter.paged_context import DraftPools

GREEDY_WIDTH = 1  # greedy drafts ship no law: one candidate is enough
CONTINUING, CONTINUING_SAMPLED = 0, -1  # the keys of such graphs beside the widths of laws


class Blocks(Protocol):
    """Drafts γ tokens a row with a module; what it reads lies on the device and nothing waits for that."""

    @property
    def pools(self) -> DraftPools:
        """Keys and values of contexts, and of what is drafted behind them."""

    def draft(self, width: int, rows: DrawRows, start: BlockStart, paging: Paging) -> BlockDraft:
        """Chains [R, γ] by laws of ``width`` ids; a row at position 0 is padding (no anchor is a request's first token)."""


@dataclass(frozen=True, slots=True)
class GraphDraft:
    """What a graph leaves, until the next one runs."""

    draft: BlockDraft
    outcome: Tensor
    on_device: DeviceDrafts


class DraftGraphs:
    """Graphs for every number of rows up to ``max_rows``, for requests that are all greedy and for any.

    The pools of ``blocks`` must have ``spare_blocks(...)`` blocks more a row than the target's, from block ``first_spare`` on.
    """

    def __init__(self, blocks: Blocks, first_spare: int, max_rows: int, max_blocks: int, widths: tuple[int, ...]) -> None:
        self._blocks, self._widths = blocks, widths
        self._sizes = graph_sizes(max_rows)
        self._block_size = blocks.pools.config.block_size
        self._buffers = DraftBuffers(blocks.pools, first_spare, max_rows, max_blocks)
        self._outcomes = host_buffers(max_rows * (3 * self._block_size + 2), blocks.pools.device)
        self._turn = 0
        self._replays: dict[tuple[int, int], Callable[[], GraphDraft]] = {}

    @torch.inference_mode()
    def prepare(self, capture: Capture, step_tokens: tuple[Tensor, Tensor] | None, laws: DeviceLaws | None = None) -> None:
        """Capture all sizes, the largest first. ``step_tokens``: where steps of a target leave ``own`` and ``matched``, if it is here.

        ``laws``: where its judge looks for drafts that are sampled.
        """
        with nothing_collected():
            for size in self._sizes[::-1]:
                self._buffers.send_rows(size, [])
                for width in self._widths:
                    self._replays[size, width] = capture(self._program(size, width))
                if step_tokens is not None:
                    self._replays[size, CONTINUING] = capture(self._continuing(size, *step_tokens, None))
                if step_tokens is not None and laws is not None:
                    self._replays[size, CONTINUING_SAMPLED] = capture(self._continuing(size, *step_tokens, laws))

    @torch.inference_mode()
    def launch(self, rows: Sequence[DraftRow]) -> tuple[GraphDraft, Outcome]:
        """Draft for the rows; nothing waits for the device. At most three outcomes may be unread."""
        width = self._widths[0] if all(row.temperature == 0.0 for row in rows) else self._widths[-1]
        size = self._size(len(rows))
        self._buffers.send_rows(size, rows)
        return self._replay(size, width)

    @torch.inference_mode()
    def continue_step(self, rows: Continuations, tables: Sequence[Sequence[int]]) -> tuple[GraphDraft, Outcome]:
        """Draft behind the step that was launched last, before anybody knows what it accepted.

        ``tables`` cover all positions that the step may commit.
        """
        size = self._size(len(tables))
        held = np.fromiter(map(len, tables), np.int64, len(tables))
        if rows.asked is None:
            self._buffers.send(size, tables, held, rows.base_lens, first_rows=rows.first_rows, drafted=rows.num_drafts)
            return self._replay(size, CONTINUING)
        asked = records_in(rows.asked)
        self._buffers.send(
            size,
            tables,
            held,
            rows.base_lens,
            first_rows=rows.first_rows,
            drafted=rows.num_drafts,
            seeds=asked["seed"].copy(),
            temperatures=asked["temperature"].copy(),
            coupled=(asked["rule"] == COUPLED).astype(np.int32),
        )
        return self._replay(size, CONTINUING_SAMPLED)

    def _size(self, num_rows: int) -> int:
        return next(size for size in self._sizes if size >= num_rows)

    def _replay(self, size: int, key: int) -> tuple[GraphDraft, Outcome]:
        self._turn = (self._turn + 1) % len(self._outcomes)
        found = self._replays[size, key]()
        return found, Outcome(found.outcome, self._outcomes[self._turn], self._block_size)

    def _program(self, size: int, width: int) -> Callable[[], GraphDraft]:
        """Draft from anchors that the host knows."""
        rows = self._buffers.rows(size)

        def run() -> GraphDraft:
            draw = dataclasses.replace(rows.draw, coupled=rows.draw.coupled != 0)
            return self._draft(width, draw, begin(rows.anchors, rows.positions, rows.paging), rows.paging)

        return run

    def _continuing(self, size: int, own: Tensor, matched: Tensor, laws: DeviceLaws | None) -> Callable[[], GraphDraft]:
        """Draft from anchors that the last step of the target left: greedily, or by ``laws``, which are left there with the drafts."""
        rows = self._buffers.rows(size)
        zeros = torch.zeros(size, dtype=torch.int64, device=self._blocks.pools.device)
        greedy = DrawRows(zeros.float(), zeros, zeros, zeros != 0)
        step = StepEnd(own, matched, rows.first_rows, rows.drafted, self._block_size)

        def run() -> GraphDraft:
            start = begin_after(step, rows.positions, rows.paging)
            if laws is None:
                return self._draft(GREEDY_WIDTH, greedy, start, rows.paging)
            draw = DrawRows(rows.draw.temperature, rows.draw.seeds, start.positions + 1, rows.draw.coupled != 0)
            found = self._draft(self._widths[-1], draw, start, rows.paging)
            for kept, value in ((laws.tokens, found.draft.tokens), (laws.ids, found.draft.ids), (laws.probs, found.draft.probs)):
                kept[:size].copy_(value)
            return found

        return run

    def _draft(self, width: int, rows: DrawRows, start: BlockStart, paging: Paging) -> GraphDraft:
        draft = self._blocks.draft(width, rows, start, paging)
        outcome = pack(draft.tokens, draft.confidence, draft.margin, start.anchors, start.positions)
        return GraphDraft(draft, outcome, DeviceDrafts(start.anchors, draft.tokens, start.places, start.slots))


class Outcome:
    """Tokens, confidences, margins, anchors and positions on their way to the host."""

    def __init__(self, outcome: Tensor, host: Tensor, block_size: int) -> None:
        self._block_size = block_size
        self._numbers = HostCopy(outcome, host)

    def read(self, count: int) -> DraftedChains:
        """Wait for them; those of the first ``count`` rows."""
        gamma, numbers = self._block_size, self._numbers.read(count).numpy()
        whole = numbers.astype(np.int64)
        return DraftedChains(whole[:, :gamma], numbers[:, gamma : 2 * gamma], numbers[:, 2 * gamma : -2], whole[:, -2], whole[:, -1])
