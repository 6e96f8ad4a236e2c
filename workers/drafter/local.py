"""A drafter module grafted onto its target: same process, same device, same block tables.

The drafter keeps keys and values of the context under the target's block ids, so whatever the target's pool keeps (a
shared prefix, a preempted request's cached blocks) the drafter keeps as well, and nothing has to be computed again.
``propose`` feeds it, ``collect`` runs the block for the requests whose drafts are really wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dspark.kernels.buckets import pad_rows
from dspark.kernels.device import use_device
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import BlockTables, DraftLaw, DraftTree, DraftTurn, SignalRows
from dspark.workers.drafter.block_draw import BlockDraft, DrawRows, draw_block
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.grafted import GraftedModule
from dspark.workers.drafter.paged_context import DraftPools, PagedContext, block_slots, unplanned_attention
from dspark.workers.drafter.tree_draw import TreeDraft, TreeRows, grow_trees, trees_of

CPU_HEAD_TOP_K = 512
NARROW_WIDTH = 64  # for trees, which look at many laws
Module = TypeVar("Module", bound=GraftedModule)


@dataclass(slots=True)
class State:
    """One live request: its anchor sits at ``base_len - 1``. ``max_nodes`` over 0 asks for trees of at most ``max_draft`` levels."""

    base_len: int
    anchor: int
    sampling: SamplingParams
    noise_seed: int
    max_draft: int
    max_nodes: int


class ModuleDrafter(Generic[Module]):
    """What a drafter knows of the requests of one verifier, and the pools of its ``module``.

    ``law_width`` ids support the law shipped under the ratio rule. The pools have ``num_spare_blocks`` beyond the target's.
    """

    def __init__(self, module: Module, tables: BlockTables, law_width: int, num_spare_blocks: int = 0) -> None:
        self.module = module
        self.block_size = module.config.block_size
        self.taps = module.config.target_layer_ids
        self.signals = module.signals
        self._tables = tables
        self._law_width = law_width
        self._device, self._dtype = module.fc.weight.device, module.fc.weight.dtype
        self._states: dict[str, State] = {}
        self.pools = DraftPools(module.config, tables.num_blocks + num_spare_blocks, tables.block_size, self._dtype, self._device)

    @torch.no_grad()
    def project(self, taps: Any) -> Tensor:
        """Context features [n, d] of concatenated taps [n, len(taps) * d]."""
        return self.module.project(taps)

    def block_pools(self) -> dict[str, Tensor]:
        """What is kept under the target's block ids, by name: [num_blocks, ...]."""
        return self.pools.by_block()

    def close(self, request_ids: Sequence[str]) -> None:
        """Forget requests that ended; their blocks belong to the target's pool."""
        for request_id in request_ids:
            self._states.pop(request_id, None)

    def _advance(self, turn: DraftTurn) -> None:
        """Bring the request's anchor up to ``turn``; a request whose tokens are missing drafts nothing until they come.

        A turn that comes twice changes nothing the second time.
        """
        state = self._states.get(turn.request_id)
        known = 0 if state is None or len(turn.tokens) == turn.base_len else state.base_len
        if state is not None and turn.tokens and state.base_len == turn.base_len and state.anchor == turn.tokens[-1]:
            return
        if known + len(turn.tokens) != turn.base_len or turn.base_len == 0:
            self._states.pop(turn.request_id, None)
            return
        anchor = turn.tokens[-1] if turn.tokens or state is None else state.anchor
        self._states[turn.request_id] = State(turn.base_len, anchor, turn.sampling, turn.noise_seed, turn.max_draft, turn.max_nodes)

    def _num_wanted(self, request_id: str, limit: int) -> int:
        state = self._states.get(request_id)
        if state is None or not state.max_draft:
            return 0
        return min(limit, state.max_nodes or min(state.max_draft, self.block_size))


class GraftedDrafter(ModuleDrafter[Module], ABC):
    """Drafts with ``module`` for the requests of one verifier; what is kept of the context and how it drafts is a subclass's.

    Features must come for every position whose KV the target computes; positions that came with cached blocks are in the pools already.
    """

    @torch.no_grad()
    def propose(self, turns: Sequence[DraftTurn]) -> None:
        """Store the context of all turns, in one pass a layer, and note what each request may draft next."""
        use_device(self._device)
        for turn in turns:
            self._advance(turn)
        fed = [(turn, count) for turn in turns if (count := num_usable(turn)) > 0]
        if fed:
            self._store(fed)

    @abstractmethod
    def _store(self, fed: Sequence[tuple[DraftTurn, int]]) -> None:
        """Keep the context of each turn's first so many features."""

    @torch.no_grad()
    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """Draft up to ``want[id]`` tokens for every request that has a turn, as a chain or a tree; computed here and now."""
        counts = {request_id: self._num_wanted(request_id, limit) for request_id, limit in want.items()}
        chosen = [request_id for request_id, count in counts.items() if count > 0]
        if not chosen:
            return {}
        states = [self._states[request_id] for request_id in chosen]
        with unplanned_attention(self._device):
            trees = self._draft(chosen, states, [counts[request_id] for request_id in chosen])
        return {tree.request_id: tree for tree in trees}

    @abstractmethod
    def _draft(self, request_ids: Sequence[str], states: Sequence[State], counts: Sequence[int]) -> list[DraftTree]:
        """Draft at most ``counts`` nodes for every request."""

    def _as_chains(self, request_ids: Sequence[str], states: Sequence[State], counts: Sequence[int], draft: BlockDraft) -> list[DraftTree]:
        """The first ``counts`` tokens of every row of a draft."""
        signals = SignalRows(draft.confidence.double().cpu().numpy(), draft.margin.double().cpu().numpy())
        tokens, confidence, margin = draft.tokens.tolist(), signals.confidence.tolist(), signals.margin.tolist()
        chains = []
        for row, (request_id, state, count) in enumerate(zip(request_ids, states, counts, strict=True)):
            law = None if state.sampling.is_exact else DraftLaw(draft.ids[row, :count], draft.probs[row, :count])
            numbers = (tokens[row][:count], confidence[row][:count], law, margin[row][:count])
            chains.append(DraftTree.chain(request_id, state.base_len, *numbers, signals, row))
        return chains

    def _width(self, states: Sequence[State]) -> int:
        """Ids that support each law; greedy requests need no more than the first one."""
        return 1 if all(state.sampling.is_greedy for state in states) else self._law_width

    def _draw_rows(self, states: Sequence[State]) -> DrawRows:
        return DrawRows(
            temperature=torch.tensor([state.sampling.temperature for state in states], dtype=torch.float32, device=self._device),
            seeds=self._tensor([state.noise_seed for state in states]),
            base_lens=self._tensor([state.base_len for state in states]),
            coupled=torch.tensor([state.sampling.rule is AcceptanceRule.COUPLED for state in states], device=self._device),
        )

    def _anchors(self, states: Sequence[State]) -> Tensor:
        return self._tensor([state.anchor for state in states])

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


class LocalDrafter(GraftedDrafter[DSparkModule]):
    """Drafts blocks: DSpark and DFlash.

    ``head_top_k`` limits the sequential head to that many base logits (0: all; None: 512 on CPU, all elsewhere).
    """

    def __init__(
        self,
        module: DSparkModule,
        tables: BlockTables,
        law_width: int = 64,
        head_top_k: int | None = None,
        num_spare_blocks: int = 0,
    ) -> None:
        super().__init__(module, tables, law_width, num_spare_blocks)
        self._head_top_k = _resolve_top_k(head_top_k, self._device)

    def _store(self, fed: Sequence[tuple[DraftTurn, int]]) -> None:
        features, slots, positions = self._context_rows(fed)
        count = sum(count for _, count in fed)
        for layer, (k, v) in enumerate(self.module.context_kv(features, positions)):
            self.pools.write(layer, slots[:count], k[:count], v[:count])

    def _context_rows(self, fed: Sequence[tuple[DraftTurn, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Features [n, d], slots [n] and positions [n] of all turns on the device; padding rows have the slot -1."""
        features = pad_rows(torch.cat([turn.features[:count] for turn, count in fed]).to(self._device, self._dtype))
        slots = torch.full((len(features),), -1, dtype=torch.int64)
        positions = torch.zeros(len(features), dtype=torch.int64)
        begin = 0
        for turn, count in fed:
            part = slice(begin, begin + count)
            slots[part] = block_slots(self._tables, turn.request_id, turn.feature_start, count)
            positions[part] = torch.arange(turn.feature_start, turn.feature_start + count)
            begin += count
        return features, slots.to(self._device), positions.to(self._device)

    def _draft(self, request_ids: Sequence[str], states: Sequence[State], counts: Sequence[int]) -> list[DraftTree]:
        """Chains and trees from one pass of the blocks."""
        hidden = self._hidden(request_ids, states)
        trees: list[DraftTree] = []
        for draft, rows in (
            (self._chains, [i for i, state in enumerate(states) if not state.max_nodes]),
            (self._trees, [i for i, state in enumerate(states) if state.max_nodes]),
        ):
            if rows:
                part = hidden if len(rows) == len(request_ids) else hidden[torch.tensor(rows, device=self._device)]
                limits = [counts[i] for i in rows]
                trees += draft([request_ids[i] for i in rows], [states[i] for i in rows], limits, part)
        return trees

    def _hidden(self, request_ids: Sequence[str], states: Sequence[State]) -> Tensor:
        """h_1 .. h_γ [R, γ, d] of every request's block."""
        lengths = [state.base_len - 1 for state in states]
        context = PagedContext(self.pools, [self._tables.table(request_id) for request_id in request_ids], lengths)
        return self.module.block_hidden(self._anchors(states), self._tensor(lengths), context)

    def _chains(self, request_ids: Sequence[str], states: Sequence[State], counts: Sequence[int], hidden: Tensor) -> list[DraftTree]:
        """Draft ``counts`` tokens in a row."""
        draft = draw_block(
            self.module, hidden[:, : max(counts)], self._anchors(states), self._draw_rows(states), self._width(states), self._head_top_k
        )
        return self._as_chains(request_ids, states, counts, draft)

    def _trees(self, request_ids: Sequence[str], states: Sequence[State], counts: Sequence[int], hidden: Tensor) -> list[DraftTree]:
        """Draft trees of at most ``counts`` nodes."""
        levels = [min(state.max_draft, self.block_size) for state in states]
        rows = TreeRows(self._draw_rows(states), self._tensor(levels), max(counts), max(levels))
        grown = grow_trees(self.module, hidden, self._anchors(states), rows, min(self._law_width, NARROW_WIDTH), self._head_top_k)
        trees = trees_of(grown.numbers.cpu().numpy(), grown.ids, grown.probs, counts)
        return [drafted_tree(request_id, state, tree) for request_id, state, tree in zip(request_ids, states, trees, strict=True)]


def drafted_tree(request_id: str, state: State, tree: TreeDraft) -> DraftTree:
    """A request's tree as it is handed over."""
    return DraftTree(
        request_id=request_id,
        base_len=state.base_len,
        tokens=tree.tokens,
        parents=tree.parents,
        confidence=tree.confidence,
        law=None if state.sampling.is_exact else DraftLaw(tree.ids, tree.probs),
        margin=tree.margin,
    )


def num_usable(turn: DraftTurn) -> int:
    """Features of committed positions before the anchor; what was computed for rejected drafts is of no use."""
    if turn.features is None:
        return 0
    return min(int(turn.features.shape[0]), turn.base_len - 1 - turn.feature_start)


def _resolve_top_k(head_top_k: int | None, device: torch.device) -> int | None:
    """How many base logits the sequential head works on; None: all."""
    if head_top_k is None:
        return CPU_HEAD_TOP_K if device.type == "cpu" else None
    if head_top_k < 0:
        raise ValueError(f"head_top_k must be at least 0, not {head_top_k}")
    return head_top_k or None
