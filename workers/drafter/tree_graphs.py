"""Drafting trees for R requests as one graph: a block's forward, and the tree that grows from it (``tree_draw.py``) in fixed shapes.

Graphs are few: of the smallest that holds a batch the first rows are taken, and of each tree its first nodes, which are the best tree
of so many. More requests than the largest holds are drafted for in parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.draft_rows import begin
from dspark.kernels.graphs import Capture, nothing_collected
from dspark.kernels.host_copy import HostCopy
from dspark.types import MAX_TREE_NODES
from dspark.workers.drafter.draft_buffers import DraftBuffers, DraftRow, host_buffers
from dspark.workers.drafter.dspark_blocks import HEAD_TOP_K, DSparkBlocks
from dspark.workers.drafter.tree_draw import GrownTrees, TreeDraft, TreeRows, grow_trees, trees_of

TREE_ROWS = (1, 4, 16)
TREE_NODES = (8, 24, MAX_TREE_NODES)


@dataclass(frozen=True, slots=True)
class GraphTrees:
    """What a graph leaves, until the next one runs. ``numbers`` [R, 4 * n + 3]: of ``GrownTrees``, before them anchor and position."""

    numbers: Tensor
    ids: Tensor
    probs: Tensor


class TreeOutcome:
    """Trees on their way to the host. ``keeps_laws``: some of them are sampled, so their laws are kept, which the next graph overwrites."""

    def __init__(self, found: GraphTrees, host: Tensor, keeps_laws: bool) -> None:
        self._numbers = HostCopy(found.numbers, host)
        self._ids, self._probs = (found.ids.clone(), found.probs.clone()) if keeps_laws else (found.ids, found.probs)

    def read(self, num_nodes: Sequence[int]) -> tuple[list[TreeDraft], NDArray[np.int64]]:
        """Wait for them: the trees of the first rows, of at most so many nodes, and the anchors and positions [R, 2] they grow from."""
        numbers = self._numbers.read(len(num_nodes)).numpy()
        return trees_of(numbers[:, 2:], self._ids, self._probs, num_nodes), numbers[:, :2].astype(np.int64)


class TreeGraphs:
    """Graphs for trees of ``blocks``, with laws of ``width`` ids; at most ``max_rows`` requests at a time.

    The pools must have ``spare_blocks(...)`` blocks more a row than the target's, from block ``first_spare`` on.
    """

    def __init__(self, blocks: DSparkBlocks, first_spare: int, max_rows: int, max_blocks: int, width: int) -> None:
        self._blocks, self._width = blocks, width
        self._sizes = sorted({min(rows, max_rows) for rows in TREE_ROWS})
        self.max_rows = self._sizes[-1]
        self._buffers = DraftBuffers(blocks.pools, first_spare, self.max_rows, max_blocks)
        self._outcomes = host_buffers(self.max_rows * (4 * MAX_TREE_NODES + 3), blocks.pools.device)
        self._turn = 0
        self._replays: dict[tuple[int, int], Callable[[], GraphTrees]] = {}

    @torch.inference_mode()
    def prepare(self, capture: Capture) -> None:
        """Capture all sizes, the largest first."""
        with nothing_collected():
            for size in self._sizes[::-1]:
                self._buffers.send_rows(size, [])
                for nodes in TREE_NODES[::-1]:
                    self._replays[size, nodes] = capture(self._program(size, nodes))

    @torch.inference_mode()
    def launch(self, rows: Sequence[DraftRow], num_nodes: int, keeps_laws: bool) -> TreeOutcome:
        """Grow trees of at most ``num_nodes`` nodes; nothing waits for the device. At most three outcomes may be unread."""
        size = next(size for size in self._sizes if size >= len(rows))
        nodes = next(nodes for nodes in TREE_NODES if nodes >= num_nodes)
        self._buffers.send_rows(size, rows)
        self._turn = (self._turn + 1) % len(self._outcomes)
        return TreeOutcome(self._replays[size, nodes](), self._outcomes[self._turn], keeps_laws)

    def _program(self, size: int, num_nodes: int) -> Callable[[], GraphTrees]:
        rows, module = self._buffers.rows(size), self._blocks.module

        def run() -> GraphTrees:
            start = begin(rows.anchors, rows.positions, rows.paging)
            draw = dataclasses.replace(rows.draw, coupled=rows.draw.coupled != 0)
            wanted = TreeRows(draw, rows.levels, num_nodes, module.config.block_size, is_fixed=True)
            hidden = self._blocks.hidden(start, rows.paging)
            grown: GrownTrees = grow_trees(module, hidden, start.anchors, wanted, self._width, max(HEAD_TOP_K, self._width))
            before = torch.stack((start.anchors, start.positions), dim=1).to(torch.float64)
            return GraphTrees(torch.cat((before, grown.numbers), dim=1), grown.ids, grown.probs)

        return run
