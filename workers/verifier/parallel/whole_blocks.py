"""Blocks of KV as one rank would hold them: put together on the leader from the shares of all ranks, and cut into those again.

A share has this rank's KV heads, in the order of the model; where there are more ranks than heads, several hold the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dspark.workers.verifier.attention import KVStore
from dspark.workers.verifier.parallel.group import RankGroup
from dspark.workers.verifier.parallel.layout import Layout

HEADS = 2  # their axis in blocks [n, block_size, heads, dim]


@torch.inference_mode()
def collect(group: RankGroup, store: KVStore, blocks: Sequence[int], heads: Mapping[str, int]) -> dict[str, Tensor]:
    """On the leader the blocks of every pool by name: [n, block_size, heads, dim] with all ``heads``; elsewhere nothing."""
    index = torch.tensor(blocks, dtype=torch.int64, device=store.device)
    found = {}
    for name, pool in sorted(store.by_block().items()):
        shares = group.gather(pool.index_select(0, index))
        if shares:
            found[name] = joined(shares, group.layout, heads[name])
    return found


@torch.inference_mode()
def spread(group: RankGroup, store: KVStore, blocks: Sequence[int], whole: Mapping[str, Tensor]) -> None:
    """Write the leader's ``whole`` blocks, as ``collect`` makes them, into every rank's pools; elsewhere ``whole`` is empty."""
    index = torch.tensor(blocks, dtype=torch.int64, device=store.device)
    for name, pool in sorted(store.by_block().items()):
        like = pool.new_empty(len(blocks), *pool.shape[1:])
        cuts = cut(whole[name].to(pool.device), group.layout, pool.shape[HEADS]) if whole else []
        pool.index_copy_(0, index, group.scatter(cuts, like))


def joined(shares: Sequence[Tensor], layout: Layout, heads: int) -> Tensor:
    """All heads from the shares of all ranks."""
    if shares[0].shape[HEADS] == heads:  # attention that is whole on every rank
        return shares[0]
    apart = shares if heads >= layout.size else [shares[head * layout.size // heads] for head in range(heads)]
    return torch.cat(list(apart), dim=HEADS)


def cut(whole: Tensor, layout: Layout, share: int) -> list[Tensor]:
    """Each rank's share of all heads; ``share`` heads each."""
    heads = whole.shape[HEADS]
    if share == heads:
        return [whole.contiguous()] * layout.size
    ranks = (Layout(rank, layout.tensor, layout.expert).kv_share(heads) for rank in range(layout.size))
    return [whole.narrow(HEADS, own.start, len(own)).contiguous() for own in ranks]
