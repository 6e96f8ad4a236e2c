"""An EAGLE-3 module grafted onto its target.

An entry needs the token of its position and the feature of the position before. So the drafter remembers each request's tokens
and last feature, and for every block the feature of its last position: a prefix hit, which brings whole blocks and no features,
then goes on as if nothing had been missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.kernels.draft_draw import draw, log_odds, truncate_law
from dspark.types import BlockTables, DraftTree, DraftTurn
from dspark.workers.drafter.block_draw import BlockDraft, target_ids
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.local import GraftedDrafter, State
from dspark.workers.drafter.paged_chain import PagedChain
from dspark.workers.drafter.paged_context import block_slots


@dataclass(slots=True)
class _Text:
    """A request's known tokens, and the feature of its last position that has one."""

    tokens: list[int]
    last_position: int = -1
    last_feature: Tensor | None = None


class Eagle3Drafter(GraftedDrafter[Eagle3Module]):
    """Drafts token by token with one layer."""

    def __init__(self, module: Eagle3Module, tables: BlockTables, law_width: int = 64) -> None:
        super().__init__(module, tables, law_width)
        self._texts: dict[str, _Text] = {}
        shape = (tables.num_blocks, module.config.hidden_size)
        self._block_ends = torch.zeros(shape, dtype=self._dtype, device=self._device)

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """Draft up to ``want[id]`` tokens for every request that has a turn and a feature before its anchor."""
        return super().collect({name: count for name, count in want.items() if self._can_draft(name)}, wait_s)

    def block_pools(self) -> dict[str, Tensor]:
        return super().block_pools() | {"block ends": self._block_ends}

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
        size = self._tables.block_size
        before, tokens, positions, slots, ends, end_blocks = [], [], [], [], [], []
        for turn, count in fed:
            start, stop = turn.feature_start, turn.feature_start + count
            features = turn.features[:count].to(self._device, self._dtype)
            before += [self._feature_before(turn.request_id, start).unsqueeze(0), features[:-1]]
            tokens += self._texts[turn.request_id].tokens[start:stop]
            positions.append(torch.arange(start, stop))
            slots.append(block_slots(self._tables, turn.request_id, start, count))
            full = [p for p in range(start, stop) if (p + 1) % size == 0]
            ends.append(features[[p - start for p in full]])
            end_blocks += [self._tables.table(turn.request_id)[p // size] for p in full]
            text = self._texts[turn.request_id]
            text.last_position, text.last_feature = stop - 1, features[-1]
        k, v = self.module.context_kv(self._tensor(tokens), torch.cat(before), torch.cat(positions).to(self._device))
        self.pools.write(0, torch.cat(slots).to(self._device), k, v)
        self._block_ends[self._tensor(end_blocks)] = torch.cat(ends)

    def _feature_before(self, request_id: str, position: int) -> Tensor:
        """The feature [d] of ``position - 1``; zeros before the first, whose entry nobody sees."""
        text = self._texts[request_id]
        if position == 0:
            return self._block_ends.new_zeros(self._block_ends.shape[1])
        if text.last_feature is not None and text.last_position == position - 1:
            return text.last_feature
        assert position % self._tables.block_size == 0, "features are missing in the middle of a block"
        return self._block_ends[self._tables.table(request_id)[position // self._tables.block_size - 1]]

    def _draft(self, request_ids: Sequence[str], states: Sequence[State], counts: Sequence[int]) -> list[DraftTree]:
        """Chains of at most ``block_size`` tokens, whether a tree was asked for or not."""
        counts = [min(count, state.max_draft, self.block_size) for count, state in zip(counts, states, strict=True)]
        return self._as_chains(request_ids, states, counts, self._chains(request_ids, states, max(counts)))

    def _chains(self, request_ids: Sequence[str], states: Sequence[State], num_steps: int) -> BlockDraft:
        module, rows, width = self.module, self._draw_rows(states), self._width(states)
        lengths = [state.base_len - 1 for state in states]
        context = PagedChain(self.pools, [self._tables.table(request_id) for request_id in request_ids], lengths, num_steps)
        features = torch.stack([self._feature_before(name, length) for name, length in zip(request_ids, lengths, strict=True)])
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
        ids, probs = (torch.stack(part, dim=1) for part in zip(*laws, strict=True))
        margin = torch.stack(margins, dim=1)
        return BlockDraft(torch.stack(tokens, dim=1), ids, probs, torch.sigmoid(margin), margin)
