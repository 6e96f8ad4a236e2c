"""A DSpark module grafted onto its target: same process, same device, same block tables.

The drafter keeps keys and values of the context under the target's block ids, so whatever the target's pool keeps (a
shared prefix, a preempted request's cached blocks) the drafter keeps as well, and nothing has to be computed again.
``propose`` feeds it, ``collect`` runs the block for the requests whose drafts are really wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.kernels.buckets import pad_rows
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import BlockTables, DraftLaw, DraftTree, DraftTurn
from dspark.workers.drafter.block_draw import DrawRows, draw_block
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.paged_context import DraftPools, PagedContext, block_slots
from dspark.workers.drafter.tree_draw import TreeRows, draw_trees

CPU_HEAD_TOP_K = 512


@dataclass(slots=True)
class _State:
    """One live request: its anchor sits at ``base_len - 1``. ``max_nodes`` over 0 asks for trees of at most ``max_draft`` levels."""

    base_len: int
    anchor: int
    sampling: SamplingParams
    noise_seed: int
    max_draft: int
    max_nodes: int


class LocalDrafter:
    """Drafts with ``module`` for the requests of one verifier.

    ``law_width`` ids support the law shipped under the ratio rule. ``head_top_k`` limits the sequential head to that many
    base logits (0: all; None: 512 on CPU, all elsewhere). Features must come for every position whose KV
    the target computes; positions that came with cached blocks are in the pools already.
    """

    def __init__(self, module: DSparkModule, tables: BlockTables, law_width: int = 64, head_top_k: int | None = None) -> None:
        self.module = module
        self.block_size = module.config.block_size
        self.taps = module.config.target_layer_ids
        self.signals = module.signals
        self._tables = tables
        self._law_width = law_width
        self._device = module.fc.weight.device
        self._head_top_k = _resolve_top_k(head_top_k, self._device)
        self._states: dict[str, _State] = {}
        self.pools = DraftPools(module.config, tables.num_blocks, tables.block_size, module.fc.weight.dtype, self._device)

    @torch.no_grad()
    def project(self, taps: Any) -> Tensor:
        """Context features [n, d] of concatenated taps [n, len(taps) * d]."""
        return self.module.project(taps)

    @torch.no_grad()
    def propose(self, turns: Sequence[DraftTurn]) -> None:
        """Store the context of all turns, in one pass a layer, and note what each request may draft next."""
        for turn in turns:
            self._advance(turn)
        fed = [(turn, count) for turn in turns if (count := num_usable(turn)) > 0]
        if not fed:
            return
        features = pad_rows(torch.cat([turn.features[:count] for turn, count in fed]).to(self._device, self.module.fc.weight.dtype))
        slots = torch.cat([block_slots(self._tables, turn.request_id, turn.feature_start, count) for turn, count in fed]).to(self._device)
        positions = torch.zeros(len(features), dtype=torch.int64)
        positions[: len(slots)] = torch.cat([torch.arange(turn.feature_start, turn.feature_start + count) for turn, count in fed])
        for layer, (k, v) in enumerate(self.module.context_kv(features, positions.to(self._device))):
            self.pools.write(layer, slots, k[: len(slots)], v[: len(slots)])

    @torch.no_grad()
    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """Draft up to ``want[id]`` tokens for every request that has a turn, as a chain or a tree; computed here and now."""
        counts = {request_id: self._num_wanted(request_id, limit) for request_id, limit in want.items()}
        chosen = [request_id for request_id, count in counts.items() if count > 0]
        if not chosen:
            return {}
        states = [self._states[request_id] for request_id in chosen]
        hidden = self._hidden(chosen, states)
        trees: dict[str, DraftTree] = {}
        for draft, rows in (
            (self._chains, [i for i, state in enumerate(states) if not state.max_nodes]),
            (self._trees, [i for i, state in enumerate(states) if state.max_nodes]),
        ):
            if rows:
                part = hidden if len(rows) == len(chosen) else hidden[torch.tensor(rows, device=self._device)]
                limits = [counts[chosen[i]] for i in rows]
                drafts = draft([chosen[i] for i in rows], [states[i] for i in rows], limits, part)
                trees |= {tree.request_id: tree for tree in drafts}
        return trees

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
        self._states[turn.request_id] = _State(turn.base_len, anchor, turn.sampling, turn.noise_seed, turn.max_draft, turn.max_nodes)

    def _num_wanted(self, request_id: str, limit: int) -> int:
        state = self._states.get(request_id)
        if state is None or not state.max_draft:
            return 0
        return min(limit, state.max_nodes or min(state.max_draft, self.block_size))

    def _hidden(self, request_ids: Sequence[str], states: Sequence[_State]) -> Tensor:
        """h_1 .. h_γ [R, γ, d] of every request's block."""
        lengths = [state.base_len - 1 for state in states]
        context = PagedContext(self.pools, [self._tables.table(request_id) for request_id in request_ids], lengths)
        return self.module.block_hidden(self._anchors(states), self._tensor(lengths), context)

    def _chains(self, request_ids: Sequence[str], states: Sequence[_State], counts: Sequence[int], hidden: Tensor) -> list[DraftTree]:
        """Draft ``counts`` tokens in a row."""
        draft = draw_block(
            self.module, hidden[:, : max(counts)], self._anchors(states), self._draw_rows(states), self._law_width, self._head_top_k
        )
        tokens, confidence, margin = draft.tokens.tolist(), draft.confidence.tolist(), draft.margin.tolist()
        chains = []
        for row, (request_id, state, count) in enumerate(zip(request_ids, states, counts, strict=True)):
            law = None if state.sampling.is_exact else DraftLaw(draft.ids[row, :count], draft.probs[row, :count])
            chains.append(
                DraftTree.chain(request_id, state.base_len, tokens[row][:count], confidence[row][:count], law, margin[row][:count])
            )
        return chains

    def _trees(self, request_ids: Sequence[str], states: Sequence[_State], counts: Sequence[int], hidden: Tensor) -> list[DraftTree]:
        """Draft trees of at most ``counts`` nodes."""
        levels = [min(state.max_draft, self.block_size) for state in states]
        rows = TreeRows(self._draw_rows(states), counts, levels)
        drafts = draw_trees(self.module, hidden, self._anchors(states), rows, self._law_width, self._head_top_k)
        return [
            DraftTree(
                request_id=request_id,
                base_len=state.base_len,
                tokens=draft.tokens,
                parents=draft.parents,
                confidence=draft.confidence,
                law=None if state.sampling.is_exact else DraftLaw(draft.ids, draft.probs),
                margin=draft.margin,
            )
            for request_id, state, draft in zip(request_ids, states, drafts, strict=True)
        ]

    def _draw_rows(self, states: Sequence[_State]) -> DrawRows:
        return DrawRows(
            temperature=torch.tensor([state.sampling.temperature for state in states], dtype=torch.float32, device=self._device),
            seeds=self._tensor([state.noise_seed for state in states]),
            base_lens=self._tensor([state.base_len for state in states]),
            coupled=torch.tensor([state.sampling.rule is AcceptanceRule.COUPLED for state in states], device=self._device),
        )

    def _anchors(self, states: Sequence[_State]) -> Tensor:
        return self._tensor([state.anchor for state in states])

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


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
