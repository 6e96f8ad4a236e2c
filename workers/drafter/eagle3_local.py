"""An EAGLE-3 module grafted onto its target.

An entry needs the token of its position and the feature of the position before. So the drafter remembers each request's tokens,
and under every block's id the feature of the last position that the block holds: a prefix hit, which brings whole blocks and no
features, then goes on as if nothing had been missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark.kernels.draft_draw import draw, log_odds, truncate_law
from dspark.types import BlockTables, DraftTree, DraftTurn
from dspark.workers.drafter.block_draw import BlockDraft, joined, target_ids
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.local import GraftedDrafter, State
from dspark.workers.drafter.paged_chain import PagedChain


@dataclass(slots=True)
class _Text:
    """A request's known tokens, and its last position whose feature came."""

    tokens: list[int]
    last_position: int = -1


@dataclass(slots=True)
class _Entries:
    """Entries to be written, of several turns in a row. ``firsts`` and ``lasts`` are rows: a turn's first, a block's last one."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    blocks_before: list[int] = field(default_factory=list)
    lasts: list[int] = field(default_factory=list)
    last_blocks: list[int] = field(default_factory=list)


class Eagle3Drafter(GraftedDrafter[Eagle3Module]):
    """Drafts token by token with one layer."""

    def __init__(self, module: Eagle3Module, tables: BlockTables, law_width: int = 64) -> None:
        super().__init__(module, tables, law_width)
        self._texts: dict[str, _Text] = {}
        # The row behind those of the blocks stays zero: the feature before a text's first position, whose entry nobody sees.
        shape = (tables.num_blocks + 1, module.config.hidden_size)
        self._last_features = torch.zeros(shape, dtype=self._dtype, device=self._device)

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """Draft up to ``want[id]`` tokens for every request that has a turn and a feature before its anchor."""
        return super().collect({name: count for name, count in want.items() if self._can_draft(name)}, wait_s)

    def block_pools(self) -> dict[str, Tensor]:
        return super().block_pools() | {"last features": self._last_features[:-1]}

    def close(self, request_ids: Sequence[str]) -> None:
        super().close(request_ids)
        for request_id in request_ids:
            self._texts.pop(request_id, None)

    def _can_draft(self, request_id: str) -> bool:
        """The first token of a text has nothing before it."""
        state = self._states.get(request_id)
        return state is not None and state.base_len > 1

    def _advance(self, turn: DraftTurn) -> None:
        super()._advance(turn)
        if turn.request_id not in self._states:
            self._texts.pop(turn.request_id, None)
            return
        text = self._texts.setdefault(turn.request_id, _Text([]))
        if len(turn.tokens) == turn.base_len:
            text.tokens = list(turn.tokens)
        elif len(text.tokens) < turn.base_len:
            text.tokens.extend(turn.tokens)

    def _store(self, fed: Sequence[tuple[DraftTurn, int]]) -> None:
        """Write the entries whose features came: of a turn's positions s .. s + n - 1, with the features of s - 1 .. s + n - 2."""
        features = torch.cat([turn.features[:count] for turn, count in fed]).to(self._device, self._dtype)
        size, rows = self._tables.block_size, _Entries()
        for turn, count in fed:
            start, stop, first = turn.feature_start, turn.feature_start + count, len(rows.tokens)
            text, table = self._texts[turn.request_id], self._tables.table(turn.request_id)
            rows.firsts.append(first)
            rows.blocks_before.append(self._block_before(turn.request_id, start))
            rows.tokens += text.tokens[start:stop]
            rows.positions += range(start, stop)
            rows.slots += [table[p // size] * size + p % size for p in range(start, stop)]
            ends = [p for p in range(start, stop) if p + 1 == stop or (p + 1) % size == 0]
            rows.lasts += [first + p - start for p in ends]
            rows.last_blocks += [table[p // size] for p in ends]
            text.last_position = stop - 1
        before = features.roll(1, 0)
        before[self._tensor(rows.firsts)] = self._last_features[self._tensor(rows.blocks_before)]
        k, v = self.module.context_kv(self._tensor(rows.tokens), before, self._tensor(rows.positions))
        self.pools.write(0, self._tensor(rows.slots), k, v)
        self._last_features[self._tensor(rows.last_blocks)] = features[self._tensor(rows.lasts)]

    def _block_before(self, request_id: str, position: int) -> int:
        """The row of the last features that holds that of ``position - 1``."""
        if position == 0:
            return self._tables.num_blocks
        is_known = self._texts[request_id].last_position == position - 1 or position % self._tables.block_size == 0
        assert is_known, "features are missing in the middle of a block"
        return self._tables.table(request_id)[(position - 1) // self._tables.block_size]

    def _draft(self, request_ids: Sequence[str], states: Sequence[State], counts: Sequence[int]) -> list[DraftTree]:
        """Chains of at most ``block_size`` tokens, whether a tree was asked for or not."""
        counts = [min(count, state.max_draft, self.block_size) for count, state in zip(counts, states, strict=True)]
        return self._as_chains(request_ids, states, counts, self._chains(request_ids, states, max(counts)))

    def _chains(self, request_ids: Sequence[str], states: Sequence[State], num_steps: int) -> BlockDraft:
        module, rows, width = self.module, self._draw_rows(states), self._width(states)
        lengths = [state.base_len - 1 for state in states]
        context = PagedChain(self.pools, [self._tables.table(request_id) for request_id in request_ids], lengths, num_steps)
        blocks_before = [self._block_before(name, length) for name, length in zip(request_ids, lengths, strict=True)]
        features = self._last_features[self._tensor(blocks_before)]
        positions, previous = self._tensor(lengths), self._anchors(states)
        tokens, laws, margins = [], [], []
        for k in range(num_steps):
            features = module.step(previous, features, positions + k, context)
            logits = module.base_logits(module.hidden(features)).to(torch.float32)
            margins.append(log_odds(logits))
            local, probs = truncate_law(logits, rows.temperature, width)
            ids = target_ids(module, local)
            previous = draw(ids, probs, rows.seeds, rows.base_lens + k, rows.base_lens, rows.coupled)
            tokens.append(previous)
            laws.append((ids, probs))
        return joined(tokens, laws, margins)
