"""A module grafted onto a target on the same GPU: it takes its context inside the target's own forward, and drafts from graphs.

The target's step hands over taps, ids, positions and slots of all its tokens, drafted ones included (``Feed``): what was rejected is
written again by the step that computes those positions, as the target's own KV is. ``propose`` launches the next drafts right behind the
step; ``collect`` waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dspark.kernels.graphs import Capture
from dspark.kernels.kv_store import store_kv
from dspark.sampling import AcceptanceRule
from dspark.types import (
    BlockTables,
    Continuations,
    DeviceDrafts,
    DeviceLaws,
    DraftedChains,
    DraftLaw,
    DraftTree,
    DraftTurn,
    FedStep,
    SignalRows,
)
from dspark.workers.drafter.draft_buffers import DraftRow, spare_blocks
from dspark.workers.drafter.draft_graphs import GREEDY_WIDTH, Blocks, DraftGraphs, Outcome
from dspark.workers.drafter.dspark_blocks import DSparkBlocks
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.eagle3_blocks import Eagle3Blocks, EntryFeed
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.feature_store import FeatureStore
from dspark.workers.drafter.fused import fuse_context
from dspark.workers.drafter.local import NARROW_WIDTH, ModuleDrafter, State, drafted_tree
from dspark.workers.drafter.paged_context import DraftPools
from dspark.workers.drafter.tree_graphs import TreeGraphs, TreeOutcome

UNREAD_TREES = 2  # launches; the next one waits for them


class ContextFeed:
    """Writes the drafter's context of a target's step where the step writes its own KV."""

    def __init__(self, module: DSparkModule, pools: DraftPools) -> None:
        self._module, self._pools = module, pools
        self._fused = fuse_context(module)

    def __call__(self, taps: Tensor, ids: Tensor, positions: Tensor, step: FedStep) -> None:
        features = self._module.project(taps)
        if self._fused is not None:
            self._fused.store(features, self._module.rotary(positions, features.dtype), self._pools, step.slots)
            return
        for layer, (k, v) in enumerate(self._module.context_kv(features, positions)):
            store_kv(k, v, *self._pools.layer(layer), step.slots)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """The context of slots goes to other slots, as the target's KV does."""
        self._pools.move(sources, targets)


@dataclass(frozen=True, slots=True)
class _Chains:
    """Chains under way, and the laws of their tokens [R, γ, w]."""

    request_ids: list[str]
    outcome: Outcome
    ids: Tensor
    probs: Tensor

    def drafts(self, states: Sequence[State | None]) -> Iterator[DraftTree]:
        """The drafts of requests that are as they were when they were launched; waits for them."""
        ids, probs = self.ids, self.probs
        if any(state is not None and not state.sampling.is_exact for state in states):
            ids, probs = ids.clone(), probs.clone()  # the graph's own tensors hold the laws only until it runs again
        chains = self.outcome.read(len(states))
        anchors = zip(chains.positions.tolist(), chains.anchors.tolist(), strict=True)
        signals = SignalRows(chains.confidence, chains.margin)
        drafted = zip(chains.tokens.tolist(), chains.confidence.tolist(), chains.margin.tolist(), strict=True)
        for row, (state, anchor, (tokens, confidence, margin)) in enumerate(zip(states, anchors, drafted, strict=True)):
            if state is not None and (state.base_len - 1, state.anchor) == anchor:
                law = None if state.sampling.is_exact else DraftLaw(ids[row], probs[row])
                yield DraftTree.chain(self.request_ids[row], state.base_len, tokens, confidence, law, margin, signals, row)


@dataclass(frozen=True, slots=True)
class _Trees:
    """Trees under way, of at most ``num_nodes`` nodes."""

    request_ids: list[str]
    outcome: TreeOutcome
    num_nodes: list[int]

    def drafts(self, states: Sequence[State | None]) -> Iterator[DraftTree]:
        """As of ``_Chains``."""
        trees, anchors = self.outcome.read(self.num_nodes)
        for request_id, state, tree, anchor in zip(self.request_ids, states, trees, anchors.tolist(), strict=True):
            if state is not None and [state.anchor, state.base_len - 1] == anchor:
                yield drafted_tree(request_id, state, tree)


class GraphDrafter(ModuleDrafter[DSparkModule | Eagle3Module]):
    """Drafts on a GPU for at most ``max_rows`` requests of ``max_model_len`` tokens; call ``prepare`` before the first."""

    def __init__(self, module: DSparkModule | Eagle3Module, tables: BlockTables, law_width: int, max_rows: int, max_model_len: int) -> None:
        super().__init__(module, tables, law_width, num_spare_blocks=max_rows * spare_blocks(module.config, tables.block_size))
        self.law_width = min(law_width, module.config.draft_vocab_size)
        blocks, max_blocks = self._blocks(module, max_rows), -(-max_model_len // tables.block_size)
        self._graphs = DraftGraphs(blocks, tables.num_blocks, max_rows, max_blocks, (GREEDY_WIDTH, self.law_width))
        self._trees: TreeGraphs | None = None  # an EAGLE-3 module drafts chains, whatever is asked for
        if isinstance(blocks, DSparkBlocks):
            self._trees = TreeGraphs(blocks, tables.num_blocks, max_rows, max_blocks, min(self.law_width, NARROW_WIDTH))
        self._launched: list[_Chains | _Trees] = []
        self._continued: set[str] = set()  # requests whose next block was launched behind the step that is under way
        self._ready: dict[str, DraftTree] = {}

    def _blocks(self, module: DSparkModule | Eagle3Module, max_rows: int) -> Blocks:
        """What drafts, and with it what takes the context."""
        self._features: FeatureStore | None = None
        self.feed: ContextFeed | EntryFeed
        if isinstance(module, DSparkModule):
            self.feed = ContextFeed(module, self.pools)
            return DSparkBlocks(module, self.pools, max_rows)
        self._features = FeatureStore(self._tables, module.config.hidden_size, self._dtype, self._device)
        self.feed = EntryFeed(module, self.pools, self._features)
        return Eagle3Blocks(module, self.pools, self._features, max_rows)

    def block_pools(self) -> dict[str, Tensor]:
        kept = {} if self._features is None else {"features": self._features.by_block()}
        return super().block_pools() | kept

    def prepare(self, capture: Capture, step_tokens: tuple[Tensor, Tensor], laws: DeviceLaws | None) -> None:
        """Capture the graphs. ``step_tokens``: the target's tokens that a step of it leaves, and which drafts equal them.

        ``laws``: where to leave drafts that are sampled; the width of its laws must be ``law_width`` of this drafter.
        """
        self._graphs.prepare(capture, step_tokens, laws)
        if self._trees is not None:
            self._trees.prepare(capture)

    def continue_step(self, rows: Continuations) -> DeviceDrafts:
        """Launch the next blocks right behind the step, whose verdict they take from the device."""
        self._settle()
        names = list(rows.request_ids)
        found, outcome = self._graphs.continue_step(rows, [self._tables.table(name) for name in names])
        self._launched.append(_Chains(names, outcome, found.draft.ids, found.draft.probs))
        self._continued = set(names)
        return found.on_device

    def continued(self) -> DraftedChains:
        """The blocks that were launched behind the step; nothing else may be under way."""
        (blocks,), self._launched = self._launched, []
        assert isinstance(blocks, _Chains)
        self._continued = set()
        return blocks.outcome.read(len(blocks.request_ids))

    def follow(self, request_ids: Sequence[str], base_lens: Sequence[int], anchors: Sequence[int]) -> None:
        """Bring anchors up to what the host knows now."""
        states = self._states
        for request_id, base_len, anchor in zip(request_ids, base_lens, anchors, strict=True):
            state = states[request_id]
            state.base_len, state.anchor = base_len, anchor

    def propose(self, turns: Sequence[DraftTurn]) -> None:
        """Note what became known, and launch the drafts of all requests that may draft and do not yet."""
        if not self._continued:
            self._settle()
        for turn in turns:
            self._advance(turn)
        begun, self._continued = self._continued, set()
        self._launch([t.request_id for t in turns if t.request_id not in begun and self._num_wanted(t.request_id, 1)])

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """The drafts that were launched; what was not, now."""
        self._settle()
        counts = {name: count for name, limit in want.items() if (count := self._num_wanted(name, limit))}
        self._launch([name for name in counts if not self._is_ready(name)])
        self._settle()
        return {name: self._ready.pop(name).first(count) for name, count in counts.items() if name in self._ready}

    def close(self, request_ids: Sequence[str]) -> None:
        super().close(request_ids)
        for request_id in request_ids:
            self._ready.pop(request_id, None)

    def _is_tree(self, state: State) -> bool:
        return state.max_nodes > 0 and self._trees is not None

    def _num_wanted(self, request_id: str, limit: int) -> int:
        count, state = super()._num_wanted(request_id, limit), self._states.get(request_id)
        return count if state is None or self._is_tree(state) else min(count, state.max_draft, self.block_size)

    def _is_ready(self, request_id: str) -> bool:
        tree, state = self._ready.get(request_id), self._states[request_id]
        return tree is not None and tree.base_len == state.base_len

    def _launch(self, request_ids: list[str]) -> None:
        """Launch what each of them drafts, which are known."""
        chains = [name for name in request_ids if not self._is_tree(self._states[name])]
        if chains:
            found, outcome = self._graphs.launch([self._row(name) for name in chains])
            self._launched.append(_Chains(chains, outcome, found.draft.ids, found.draft.probs))
        trees = [name for name in request_ids if self._is_tree(self._states[name])]
        if not trees or self._trees is None:
            return
        if chains:
            self._settle()  # their laws lie where the graphs of trees work
        for begin in range(0, len(trees), self._trees.max_rows):
            part = trees[begin : begin + self._trees.max_rows]
            states = [self._states[name] for name in part]
            nodes = [state.max_nodes for state in states]
            keeps_laws = any(not state.sampling.is_exact for state in states)
            if len(self._launched) >= UNREAD_TREES:
                self._settle()
            grown = self._trees.launch([self._row(name) for name in part], max(nodes), keeps_laws)
            self._launched.append(_Trees(part, grown, nodes))

    def _row(self, request_id: str) -> DraftRow:
        return draft_row(self._states[request_id], self._tables.table(request_id), self.block_size)

    def _settle(self) -> None:
        """Take in what was launched, waiting for it; drafts behind another anchor than the request's are dropped."""
        launched, self._launched = self._launched, []
        for drafts in launched:
            states = [self._states.get(request_id) for request_id in drafts.request_ids]
            self._ready |= {tree.request_id: tree for tree in drafts.drafts(states)}


def draft_row(state: State, table: Sequence[int], block_size: int) -> DraftRow:
    """What a graph needs to know of a request; ``block_size`` is γ."""
    return DraftRow(
        anchor=state.anchor,
        position=state.base_len - 1,
        seed=state.noise_seed,
        temperature=state.sampling.temperature,
        is_coupled=state.sampling.rule is AcceptanceRule.COUPLED,
        table=table,
        levels=min(state.max_draft, block_size),
    )
