"""Judge draft trees: walk from the anchor down, at each node to the child that stands. Exactly the target's law.

* greedy and **coupled**: the token of a node's row is the argmax of its processed logits (plus keyed noise when sampling), as
  for chains. The child that equals it stands; without one it is the token of the target's own.
* **ratio**: the children are tried in the order of the list. Child x, whose law is ``draft`` (given the siblings before it: of
  candidates drawn without replacement, the law without them), stands with probability min(1, left(x) / draft(x)), where
  ``left`` is the target's law at first and becomes normalise(max(0, left - draft)) with every child that falls. If none
  stands, what is left gives the token of the target's own. (Speculative sampling with several candidates: Miao et al. 2024;
  without replacement: Jeon et al. 2024, Yang et al. 2024.)

A walk ends at a node without verified children, trimmed or not, with a token of the full law of its row.

Only rows on the path matter. On CPU a pass therefore takes one row of each walk; on an accelerator, where a pass costs more
than its rows, one pass takes all rows of all walks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dspark.kernels.keyed_random import ACCEPT, uniform
from dspark.kernels.top import first_argmax
from dspark.sampling import AcceptanceRule
from dspark.types import DraftLaw
from dspark.workers.verifier.laws import Block, TargetLaws, edit, target_laws
from dspark.workers.verifier.ratio import DraftRows, accept_probability, shrink
from dspark.workers.verifier.tree import children, depths
from dspark.workers.verifier.verdict import JudgeItem, Verdict

ANCHOR = -1


@dataclass(slots=True)
class Walk:
    """How far an item is decided: the nodes of ``path`` stand; ``own`` is the token after them, once known."""

    item: JudgeItem
    parents: tuple[int, ...]
    children: list[list[int]]  # of the anchor, then of each node
    depths: list[int]
    path: list[int] = field(default_factory=list)
    own: int | None = None

    @staticmethod
    def of(item: JudgeItem) -> Walk:
        parents = item.draft.parents if item.draft is not None else ()
        return Walk(item, parents, children(parents), depths(parents))

    @property
    def node(self) -> int:
        """Where the walk is."""
        return self.path[-1] if self.path else ANCHOR

    def verdict(self) -> Verdict:
        """The verdict of a walk that came to its end."""
        assert self.own is not None
        tokens = (*(self.item.drafted[node] for node in self.path), self.own)
        return Verdict(tokens, len(self.path), path=tuple(self.path))

    @property
    def law(self) -> DraftLaw | None:
        return self.item.draft.law if self.item.draft is not None else None

    def step(self, stands: Callable[[int], bool]) -> bool:
        """Go on to the first child that stands; whether there was one."""
        child = next((child for child in self.children[self.node + 1] if stands(child)), None)
        if child is not None:
            self.path.append(child)
        return child is not None

    def match(self, tokens: Mapping[int, int]) -> None:
        """Greedy and coupled: go on while a child equals the token of the node's row, as far as rows were looked at."""
        while self.own is None and self.node in tokens:
            token = tokens[self.node]
            if not self.step(lambda child, token=token: self.item.drafted[child] == token):  # type: ignore[misc]
                self.own = token


@dataclass(frozen=True, slots=True)
class _Look:
    """Rows of one walk that are processed together: of ``nodes`` in order, all of the tree or the one where the walk is."""

    walk: Walk
    nodes: Sequence[int]

    @property
    def rows(self) -> list[int]:
        return [self.walk.item.first_row + node + 1 for node in self.nodes]

    @property
    def positions(self) -> list[int]:
        """The position that each row predicts."""
        return [self.walk.item.base_len + (self.walk.depths[node] + 1 if node >= 0 else 0) for node in self.nodes]

    @property
    def block(self) -> Block:
        item = self.walk.item
        if len(self.nodes) == len(item.drafted) + 1:
            return Block(item.sampling, item.prompt, item.output, item.drafted, item.stop_ids, self.walk.parents)
        output = [*item.output, *(item.drafted[node] for node in self.walk.path)]
        return Block(item.sampling, item.prompt, output, (), item.stop_ids)


def judge_trees(logits: Tensor, items: Sequence[JudgeItem], max_rows: int) -> list[Walk]:
    """Walk every item's tree to its end over logits [N, V]; at most ``max_rows`` rows a pass on CPU. The logits are not changed."""
    walks = [Walk.of(item) for item in items]
    whole = [_all_rows(walk) for walk in walks]
    is_plain = [look.walk.item.sampling.is_greedy and not look.block.needs_edit for look in whole]
    plain = [look for look, chosen in zip(whole, is_plain, strict=True) if chosen]
    if plain:
        _match_all(plain, first_argmax(_gather(logits, plain)).tolist())
    pending = [walk for walk in walks if walk.own is None]
    while pending:
        if takes_all_rows(logits):
            looks = [_all_rows(walk) for walk in pending]
        else:
            looks = [_Look(walk, (walk.node,)) for walk in pending[:max_rows]]
        _look(_gather(logits, looks).to(torch.float32), looks)
        pending = [walk for walk in pending if walk.own is None]
    return walks


def takes_all_rows(logits: Tensor) -> bool:
    """Whether a pass takes all rows of a tree, on the path or not."""
    return logits.is_cuda


def _all_rows(walk: Walk) -> _Look:
    return _Look(walk, range(ANCHOR, len(walk.item.drafted)))


def _gather(logits: Tensor, looks: Sequence[_Look]) -> Tensor:
    """A copy of the rows of the looks."""
    rows = [row for look in looks for row in look.rows]
    return logits.index_select(0, torch.tensor(rows, dtype=torch.int64, device=logits.device))


def _match_all(looks: Sequence[_Look], tokens: Sequence[int]) -> None:
    found = iter(tokens)
    for look in looks:
        look.walk.match({node: next(found) for node in look.nodes})


def _look(rows: Tensor, looks: Sequence[_Look]) -> None:
    """Process the rows [n, V] fp32 of the looks, in place, and let each walk go on as far as they tell."""
    starts = list(accumulate((len(look.nodes) for look in looks), initial=0))
    for look, start in zip(looks, starts, strict=False):
        block = look.block
        if block.needs_edit:
            edit(rows[start : start + len(look.nodes)], block)
    for kind, decide in ((_is_greedy, _decide_greedy), (_is_coupled, _decide_coupled), (_is_ratio, _decide_ratio)):
        chosen = [i for i, look in enumerate(looks) if kind(look)]
        if chosen:
            at = torch.tensor([row for i in chosen for row in range(starts[i], starts[i + 1])], device=rows.device)
            decide(rows if len(at) == len(rows) else rows[at], [looks[i] for i in chosen])


def _is_greedy(look: _Look) -> bool:
    return look.walk.item.sampling.is_greedy


def _is_coupled(look: _Look) -> bool:
    return not _is_greedy(look) and look.walk.item.sampling.rule is AcceptanceRule.COUPLED


def _is_ratio(look: _Look) -> bool:
    return not _is_greedy(look) and look.walk.item.sampling.rule is AcceptanceRule.RATIO


def _decide_greedy(rows: Tensor, looks: Sequence[_Look]) -> None:
    _match_all(looks, first_argmax(rows).tolist())


def _decide_coupled(rows: Tensor, looks: Sequence[_Look]) -> None:
    laws = _laws(rows, looks)
    _match_all(looks, laws.draw(laws.probs, range(len(rows)), *_keys(looks, rows.device)).tolist())


def _laws(rows: Tensor, looks: Sequence[_Look]) -> TargetLaws:
    return target_laws(rows, [look.walk.item.sampling for look in looks for _ in look.nodes])


def _keys(looks: Sequence[_Look], device: torch.device) -> tuple[Tensor, Tensor]:
    """(seeds, positions) [n] of the rows of the looks."""
    seeds = torch.tensor([look.walk.item.noise_seed for look in looks for _ in look.nodes], dtype=torch.int64, device=device)
    return seeds, torch.tensor([position for look in looks for position in look.positions], dtype=torch.int64, device=device)


def _decide_ratio(rows: Tensor, looks: Sequence[_Look]) -> None:
    """Try the children of every row, move the walks, and draw the own token of those that end here."""
    laws = _laws(rows, looks)
    seeds, positions = _keys(looks, rows.device)
    left = laws.probs.clone()
    stands = _try_children(left, looks, seeds, positions)
    ends: list[tuple[Walk, int]] = []
    start = 0
    for look, standing in zip(looks, stands, strict=True):
        places = {node: start + i for i, node in enumerate(look.nodes)}
        while look.walk.node in places and look.walk.step(standing.__getitem__):
            pass
        if look.walk.node in places:
            ends.append((look.walk, places[look.walk.node]))
        start += len(look.nodes)
    if ends:
        at = torch.tensor([row for _, row in ends], device=rows.device)
        tokens: list[int] = laws.draw(left[at], [row for _, row in ends], seeds[at], positions[at]).tolist()
        for (walk, _), token in zip(ends, tokens, strict=True):
            walk.own = token


def _try_children(left: Tensor, looks: Sequence[_Look], seeds: Tensor, positions: Tensor) -> list[list[bool]]:
    """Whether each node of each look's tree stands when it is its turn; False where its parent was not looked at.

    ``left`` [n, V] are the laws of the rows on entry, and what the children that fell leave of them on return. On CPU
    nothing is tried behind a child that stands.
    """
    drafts = DraftRows.gather(
        [token for look in looks for token in look.walk.item.drafted],
        [(len(look.walk.parents), look.walk.law) for look in looks],
        left.device,
    )
    firsts = list(accumulate((len(look.walk.parents) for look in looks), initial=0))
    queues = [
        [first + child for child in look.walk.children[node + 1]] for first, look in zip(firsts, looks, strict=False) for node in look.nodes
    ]
    stands = torch.zeros(firsts[-1], dtype=torch.bool, device=left.device)
    total = left.sum(-1, dtype=torch.float64)
    turn = 0
    while waiting := [row for row, queue in enumerate(queues) if turn < len(queue)]:
        at = torch.tensor(waiting, device=left.device)
        tried = torch.tensor([queues[row][turn] for row in waiting], device=left.device)
        target = left[at, drafts.tokens[tried]].to(torch.float64) / total[at]
        stands[tried] = uniform(seeds[at], positions[at], ACCEPT, turn) < accept_probability(target, drafts.token_probs[tried].double())
        if not left.is_cuda:
            for row, is_done in zip(waiting, stands[tried].tolist(), strict=True):
                queues[row] = [] if is_done else queues[row]
            at, tried = at[~stands[tried]], tried[~stands[tried]]
        left[at], total[at] = shrink(left[at], total[at], drafts.ids[tried], drafts.probs[tried])
        turn += 1
    flags: list[bool] = stands.tolist()
    return [flags[first:last] for first, last in pairwise(firsts)]
