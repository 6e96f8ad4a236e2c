"""A DSpark module grafted onto a target on the same GPU: it takes its context inside the target's own forward, and drafts from graphs.

The target's step hands over taps, positions and slots of all its tokens, drafted ones included (``Feed``): what was rejected is written
again by the step that computes those positions, as the target's own KV is. ``propose`` launches the next blocks right behind the
step; ``collect`` waits for them. Trees are drafted as on a CPU, from the same pools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dspark.kernels.graphs import Capture
from dspark.kernels.kv_store import store_kv
from dspark.sampling import AcceptanceRule
from dspark.types import BlockTables, Continuations, DeviceDrafts, DeviceLaws, DraftedChains, DraftLaw, DraftTree, DraftTurn, SignalRows
from dspark.workers.drafter.draft_graphs import (
    GREEDY_WIDTH,
    DraftGraphs,
    DraftRow,
    GraphDraft,
    Outcome,
    num_places,
    spare_blocks,
)
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.fused import fuse_context
from dspark.workers.drafter.local import LocalDrafter, State
from dspark.workers.drafter.paged_context import DraftPools


class ContextFeed:
    """Writes the drafter's context of a target's step where the step writes its own KV."""

    def __init__(self, module: DSparkModule, pools: DraftPools) -> None:
        self._module, self._pools = module, pools
        self._fused = fuse_context(module)

    def __call__(self, taps: Tensor, positions: Tensor, slots: Tensor) -> None:
        features = self._module.project(taps)
        if self._fused is not None:
            self._fused.store(features, self._module.rotary(positions, features.dtype), self._pools, slots)
            return
        for layer, (k, v) in enumerate(self._module.context_kv(features, positions)):
            store_kv(k, v, *self._pools.layer(layer), slots)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """The context of slots goes to other slots, as the target's KV does."""
        for layer in range(self._pools.config.num_layers):
            for pool in self._pools.layer(layer):
                pool.index_copy_(0, targets, pool.index_select(0, sources))


@dataclass(frozen=True, slots=True)
class _Launched:
    """Blocks under way."""

    request_ids: list[str]
    found: GraphDraft
    outcome: Outcome


class GraphDrafter(LocalDrafter):
    """``LocalDrafter`` on a GPU for at most ``max_rows`` requests of ``max_model_len`` tokens; call ``prepare`` before the first."""

    def __init__(self, module: DSparkModule, tables: BlockTables, law_width: int, max_rows: int, max_model_len: int) -> None:
        spare = spare_blocks(num_places(module), tables.block_size)
        super().__init__(module, tables, law_width, head_top_k=0, num_spare_blocks=max_rows * spare)
        self.feed = ContextFeed(module, self.pools)
        width = min(law_width, module.config.draft_vocab_size)
        blocks = -(-max_model_len // tables.block_size)
        self.law_width = width
        self._graphs = DraftGraphs(module, self.pools, tables.num_blocks, max_rows, blocks, (GREEDY_WIDTH, width))
        self._launched: list[_Launched] = []
        self._continued: set[str] = set()  # requests whose next block was launched behind the step that is under way
        self._ready: dict[str, DraftTree] = {}

    def prepare(self, capture: Capture, step_tokens: tuple[Tensor, Tensor], laws: DeviceLaws | None) -> None:
        """Capture the graphs. ``step_tokens``: the target's tokens that a step of it leaves, and which drafts equal them.

        ``laws``: where to leave drafts that are sampled; the width of its laws must be ``law_width`` of this drafter.
        """
        self._graphs.prepare(capture, step_tokens, laws)

    def continue_step(self, rows: Continuations) -> DeviceDrafts:
        """Launch the next blocks right behind the step, whose verdict they take from the device."""
        self._settle()
        names = list(rows.request_ids)
        found, outcome = self._graphs.continue_step(rows, [self._tables.table(name) for name in names])
        self._launched.append(_Launched(names, found, outcome))
        self._continued = set(names)
        return found.on_device

    def continued(self) -> DraftedChains:
        """The blocks that were launched behind the step; nothing else may be under way."""
        (blocks,), self._launched = self._launched, []
        self._continued = set()
        return blocks.outcome.read(len(blocks.request_ids))

    def follow(self, request_ids: Sequence[str], base_lens: Sequence[int], anchors: Sequence[int]) -> None:
        """Bring anchors up to what the host knows now."""
        states = self._states
        for request_id, base_len, anchor in zip(request_ids, base_lens, anchors, strict=True):
            state = states[request_id]
            state.base_len, state.anchor = base_len, anchor

    def propose(self, turns: Sequence[DraftTurn]) -> None:
        """Note what became known, and launch the blocks of all requests that may draft and do not yet."""
        if not self._continued:
            self._settle()
        for turn in turns:
            self._advance(turn)
        begun, self._continued = self._continued, set()
        self._launch([t.request_id for t in turns if t.request_id not in begun and self._num_wanted(t.request_id, 1) and not t.max_nodes])

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """The drafts that were launched; what was not, now."""
        self._settle()
        chains = {name: self._num_wanted(name, limit) for name, limit in want.items() if not self._is_tree(name)}
        self._launch([name for name, count in chains.items() if count and not self._is_ready(name)])
        self._settle()
        found = {name: self._ready.pop(name).first(count) for name, count in chains.items() if count and name in self._ready}
        return found | super().collect({name: limit for name, limit in want.items() if self._is_tree(name)}, wait_s)

    def close(self, request_ids: Sequence[str]) -> None:
        super().close(request_ids)
        for request_id in request_ids:
            self._ready.pop(request_id, None)

    def _is_tree(self, request_id: str) -> bool:
        state = self._states.get(request_id)
        return state is not None and state.max_nodes > 0

    def _is_ready(self, request_id: str) -> bool:
        tree = self._ready.get(request_id)
        return tree is not None and tree.base_len == self._states[request_id].base_len

    def _launch(self, request_ids: list[str]) -> None:
        if not request_ids:
            return
        states = [self._states[request_id] for request_id in request_ids]
        rows = [draft_row(state, self._tables.table(name)) for name, state in zip(request_ids, states, strict=True)]
        self._launched.append(_Launched(request_ids, *self._graphs.launch(rows)))

    def _settle(self) -> None:
        """Take in what was launched, waiting for it; blocks behind another anchor than the request's are dropped."""
        launched, self._launched = self._launched, []
        for blocks in launched:
            states = [self._states.get(request_id) for request_id in blocks.request_ids]
            draft = blocks.found.draft
            ids, probs = draft.ids, draft.probs
            if any(state is not None and not state.sampling.is_exact for state in states):
                ids, probs = ids.clone(), probs.clone()  # the graph's own tensors hold the laws only until it runs again
            chains = blocks.outcome.read(len(states))
            anchors = zip(chains.positions.tolist(), chains.anchors.tolist(), strict=True)
            signals = SignalRows(chains.confidence, chains.margin)
            drafted = zip(chains.tokens.tolist(), chains.confidence.tolist(), chains.margin.tolist(), strict=True)
            for row, (state, anchor, (tokens, confidence, margin)) in enumerate(zip(states, anchors, drafted, strict=True)):
                if state is None or (state.base_len - 1, state.anchor) != anchor:
                    continue
                request_id = blocks.request_ids[row]
                law = None if state.sampling.is_exact else DraftLaw(ids[row], probs[row])
                self._ready[request_id] = DraftTree.chain(request_id, state.base_len, tokens, confidence, law, margin, signals, row)


def draft_row(state: State, table: Sequence[int]) -> DraftRow:
    """What a graph needs to know of a request."""
    return DraftRow(
        anchor=state.anchor,
        position=state.base_len - 1,
        seed=state.noise_seed,
        temperature=state.sampling.temperature,
        is_coupled=state.sampling.rule is AcceptanceRule.COUPLED,
        table=table,
    )
