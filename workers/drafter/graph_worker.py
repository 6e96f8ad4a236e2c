"""A draft worker's drafter on a GPU: drafts come from CUDA graphs, context is stored in few launches."""

from __future__ import annotations

from collections.abc import Sequence

from dspark.kernels.graphs import Capture
from dspark.types import BlockTables, DraftLaw, DraftTree, DraftTurn, SignalRows
from dspark.workers.drafter.draft_buffers import spare_blocks
from dspark.workers.drafter.draft_graphs import GREEDY_WIDTH, DraftGraphs
from dspark.workers.drafter.dspark_blocks import DSparkBlocks
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.fused import fuse_context
from dspark.workers.drafter.graph_local import draft_row
from dspark.workers.drafter.local import NARROW_WIDTH, LocalDrafter, State, drafted_tree
from dspark.workers.drafter.tree_graphs import TreeGraphs

Rows = Sequence[tuple[str, State, int]]  # requests, their states, how many nodes


class GraphWorkerDrafter(LocalDrafter):
    """``LocalDrafter`` for requests of verifiers elsewhere; call ``prepare`` before the first.

    Graphs draft for at most ``max_rows`` requests at a time. Requests of more than ``max_model_len`` tokens are drafted for launch by
    launch.
    """

    def __init__(self, module: DSparkModule, tables: BlockTables, law_width: int, max_rows: int, max_model_len: int) -> None:
        spare = max_rows * spare_blocks(module.config, tables.block_size)
        super().__init__(module, tables, law_width, head_top_k=0, num_spare_blocks=spare)
        self._max_rows = max_rows
        self._max_blocks = -(-max_model_len // tables.block_size)
        width = min(law_width, module.config.draft_vocab_size)
        blocks = DSparkBlocks(module, self.pools, max_rows)
        self._graphs = DraftGraphs(blocks, tables.num_blocks, max_rows, self._max_blocks, (GREEDY_WIDTH, width))
        self._tree_graphs = TreeGraphs(blocks, tables.num_blocks, max_rows, self._max_blocks, min(width, NARROW_WIDTH))
        self._context = fuse_context(module)

    def prepare(self, capture: Capture) -> None:
        """Capture the graphs."""
        self._graphs.prepare(capture, None)
        self._tree_graphs.prepare(capture)

    def _store(self, fed: Sequence[tuple[DraftTurn, int]]) -> None:
        if self._context is None:
            super()._store(fed)
            return
        features, slots, positions = self._context_rows(fed)
        self._context.store(features, self.module.rotary(positions, features.dtype), self.pools, slots)

    def _draft(self, request_ids: Sequence[str], states: Sequence[State], counts: Sequence[int]) -> list[DraftTree]:
        rows = list(zip(request_ids, states, counts, strict=True))
        fitting = [row for row in rows if self._fits(row[0])]
        others = [row for row in rows if not self._fits(row[0])]
        chains, branching = ([row for row in fitting if (row[1].max_nodes > 0) is is_tree] for is_tree in (False, True))
        trees: list[DraftTree] = []
        for begin in range(0, len(chains), self._max_rows):
            trees += self._replayed(chains[begin : begin + self._max_rows])
        for begin in range(0, len(branching), self._tree_graphs.max_rows):
            trees += self._grown(branching[begin : begin + self._tree_graphs.max_rows])
        if others:
            trees += super()._draft([name for name, _, _ in others], [state for _, state, _ in others], [count for _, _, count in others])
        return trees

    def _fits(self, request_id: str) -> bool:
        return len(self._tables.table(request_id)) <= self._max_blocks

    def _replayed(self, rows: Rows) -> list[DraftTree]:
        """Chains from one graph."""
        found, outcome = self._graphs.launch([draft_row(state, self._tables.table(name), self.block_size) for name, state, _ in rows])
        ids, probs = found.draft.ids, found.draft.probs
        if not all(state.sampling.is_exact for _, state, _ in rows):
            ids, probs = ids.clone(), probs.clone()  # the graph's own tensors hold the laws only until it runs again
        chains = outcome.read(len(rows))
        signals = SignalRows(chains.confidence, chains.margin)
        numbers = zip(chains.tokens.tolist(), chains.confidence.tolist(), chains.margin.tolist(), strict=True)
        trees = []
        for i, ((name, state, count), (tokens, confidence, margin)) in enumerate(zip(rows, numbers, strict=True)):
            law = None if state.sampling.is_exact else DraftLaw(ids[i, :count], probs[i, :count])
            trees.append(DraftTree.chain(name, state.base_len, tokens[:count], confidence[:count], law, margin[:count], signals, i))
        return trees

    def _grown(self, rows: Rows) -> list[DraftTree]:
        """Trees from one graph."""
        counts = [count for _, _, count in rows]
        keeps_laws = not all(state.sampling.is_exact for _, state, _ in rows)
        asked = [draft_row(state, self._tables.table(name), self.block_size) for name, state, _ in rows]
        trees, _ = self._tree_graphs.launch(asked, max(counts), keeps_laws).read(counts)
        return [drafted_tree(name, state, tree) for (name, state, _), tree in zip(rows, trees, strict=True)]
