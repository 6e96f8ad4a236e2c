"""From h_1 .. h_γ to draft trees: the nodes likeliest to be accepted, best first (ours; a chain is DSpark section 3.1).

::

    hidden      [R, γ, d]      block positions; a node at depth k is a candidate of position k
    level k     [R, B, J]      J candidates after each of B nodes of the level before (B = 1, the anchor, at the first)
    law         [R, B, w]      the law after a node: base logits of its position plus the Markov bias of its own path

The candidates after a node come in one order. Greedy: the likeliest first. Sampling: by probability / exponential noise, which
is an order of draws without replacement; with the noise of the target's own token (coupled) or with noise of its own for
every node (ratio).

A node's survival is that of its parent times P(it is accepted | its parent is), which never rises from one candidate to the
next. So the n nodes of largest survival are a tree, their order lists parents and earlier candidates first, and its first
m nodes are the best tree of m. Under the ratio rule a survival looks at the nodes above and at the candidates before, never
at its own token: whatever stops the list early knows only nodes that came before (docs/adr, and tests/test_lossless_trees.py).

Levels are computed whole, for as many nodes as could still have a child among the n: a node at depth k with n - k
better ones beside it cannot. With fixed shapes, which a graph needs, that is all that limits them; a tree of n nodes then begins with
the tree of m that other requests of the batch want.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.draft_draw import child_salt, log_odds, race_order, truncate_law
from dspark.workers.drafter.block_draw import DrawRows, base_law, target_ids
from dspark.workers.drafter.dspark_module import DSparkModule

# P(candidate j is accepted | those before it fell) = c * SECOND * (2 / j)^FADE for candidates drawn without replacement, and
# the noise that a coupled target shares with the draft law. Measured on answers of SmolLM2-135M-Instruct with its drafter.
SECOND_DRAW = 0.4
FADE = 1.25
COUPLED_FLATTENING = 1.5
MIN_CHANCE = 1e-5  # below it a candidate's margin falls no further


@dataclass(frozen=True, slots=True)
class TreeRows:
    """What trees are wanted: per request the draw and most levels [R] int64; of them all most nodes and most levels.

    ``is_fixed``: shapes hang on these numbers alone, and nothing waits for the device.
    """

    draw: DrawRows
    levels: Tensor
    num_nodes: int
    num_levels: int
    is_fixed: bool = False


@dataclass(frozen=True, slots=True)
class TreeDraft:
    """One request's tree, best node first; ``ids``, ``probs`` [n, w]: the law of each node, given its earlier siblings.

    ``margin`` of a first candidate is that of a chain's token, of a later one the logit of its confidence.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    confidence: tuple[float, ...]
    margin: tuple[float, ...]
    ids: Tensor
    probs: Tensor


@dataclass(frozen=True, slots=True)
class GrownTrees:
    """The best nodes of R trees, in order. ``numbers`` [R, 4 * n + 1] fp64: tokens, parents, confidence, margin, and how many there are.

    ``ids``, ``probs`` [R, n, w]: the law of each node, given its earlier siblings.
    """

    numbers: Tensor
    ids: Tensor
    probs: Tensor


@dataclass(frozen=True, slots=True)
class _Level:
    """The candidates [R, B, J] of one level, and the laws [R, B, w] they come from; ``columns`` are their places in the laws.

    ``survival`` is negative where there is no candidate. ``parents`` [R, B] are places among all candidates, level by level.
    """

    parents: Tensor
    ids: Tensor
    probs: Tensor
    columns: Tensor
    tokens: Tensor
    confidence: Tensor
    margin: Tensor
    survival: Tensor


@dataclass(frozen=True, slots=True)
class _Nodes:
    """The nodes [R, B] that a level grows from: tokens, the head's state before them [R, B, r], survival, place, salt."""

    tokens: Tensor
    state: Tensor | None
    survival: Tensor
    places: Tensor
    salts: Tensor


def grow_trees(module: DSparkModule, hidden: Tensor, anchors: Tensor, rows: TreeRows, width: int, head_top_k: int | None) -> GrownTrees:
    """Build a tree a request from laws truncated to ``width`` ids: hidden [R, γ, d], anchors [R]."""
    return _Builder(module, hidden, rows, width, head_top_k).build(anchors)


def trees_of(numbers: NDArray[np.float64], ids: Tensor, probs: Tensor, num_nodes: Sequence[int]) -> list[TreeDraft]:
    """The trees of the first rows of ``GrownTrees``, of at most so many nodes each; ``numbers`` is on the host."""
    size = numbers.shape[1] // 4
    whole = numbers[:, : 2 * size].astype(np.int64)
    trees = []
    for row, limit in enumerate(num_nodes):
        count = min(int(numbers[row, -1]), limit)
        tokens, parents = (tuple(whole[row, begin : begin + count].tolist()) for begin in (0, size))
        confidence, margin = (tuple(numbers[row, begin : begin + count].tolist()) for begin in (2 * size, 3 * size))
        trees.append(TreeDraft(tokens, parents, confidence, margin, ids[row, :count], probs[row, :count]))
    return trees


class _Builder:
    """Grows the levels of all trees at once."""

    def __init__(self, module: DSparkModule, hidden: Tensor, rows: TreeRows, width: int, head_top_k: int | None) -> None:
        self.module = module
        self.hidden = hidden[:, : rows.num_levels]
        self.rows = rows
        self.num_nodes = rows.num_nodes
        self.width = width
        self.base, self.candidates = base_law(module, self.hidden, head_top_k)
        self.depth_limit = rows.levels.view(-1, 1, 1)
        draw = rows.draw
        self.is_greedy = (draw.temperature == 0).view(-1, 1, 1)
        self.is_exact = self.is_greedy | draw.coupled.view(-1, 1, 1)
        self.is_fixed = rows.is_fixed or hidden.is_cuda  # to ask a GPU would take longer than to draw
        self.draws = self.is_fixed or not bool(self.is_greedy.all())
        self.heat = torch.where(draw.temperature == 0, 1.0, draw.temperature)
        self.levels: list[_Level] = []

    def build(self, anchors: Tensor) -> GrownTrees:
        num_rows, device = anchors.shape[0], anchors.device
        head = self.module.markov_head
        nodes = _Nodes(
            tokens=anchors.view(num_rows, 1),
            state=None if head is None else head.start(num_rows).view(num_rows, 1, -1),
            survival=torch.ones(num_rows, 1, device=device),
            places=torch.full((num_rows, 1), -1, device=device),
            salts=self.rows.draw.base_lens.view(num_rows, 1),
        )
        for depth in range(self.hidden.shape[1]):
            state = self._grow(depth, nodes)
            if depth + 1 == self.hidden.shape[1]:
                break
            nodes = self._next_nodes(depth, nodes, state)
            if not nodes.tokens.shape[1]:
                break
        return self._grown()

    def _grow(self, depth: int, nodes: _Nodes) -> Tensor | None:
        """Add the level of position ``depth`` after ``nodes``; returns the head's state behind them [R, B, r]."""
        num_rows, num_parents = nodes.tokens.shape
        logits = self.base[:, depth].to(torch.float32).unsqueeze(1).expand(-1, num_parents, -1)
        chosen = None if self.candidates is None else self.candidates[:, depth]
        state, head = nodes.state, self.module.markov_head
        if head is not None and state is not None:
            hidden = self.hidden[:, depth].unsqueeze(1).expand(-1, num_parents, -1).flatten(0, 1)
            after, latent = head.step(state.flatten(0, 1), head.markov_w1(nodes.tokens.flatten()), hidden)
            state = after.view(num_rows, num_parents, -1)
            logits = logits + head.branch_bias(latent.view(num_rows, num_parents, -1), chosen)
        local, probs = truncate_law(logits.flatten(0, 1), self.heat.repeat_interleave(num_parents), self.width)
        local, probs = local.view(num_rows, num_parents, -1), probs.view(num_rows, num_parents, -1)
        if chosen is not None:
            local = chosen.unsqueeze(1).expand(-1, num_parents, -1).gather(2, local)
        ids = target_ids(self.module, local)
        draw = self.rows.draw
        keys = probs
        if self.draws:
            raced = race_order(ids, probs, draw.seeds, draw.base_lens + depth, draw.coupled, nodes.salts)
            keys = torch.where(self.is_greedy, probs, raced)
        values, columns = keys.topk(min(self.num_nodes, keys.shape[-1]), dim=-1)
        margin = log_odds(logits)
        chance = self._chances(self._confidence(depth, nodes.tokens, margin), keys, values)
        margin = torch.cat([margin.unsqueeze(-1), torch.logit(chance[..., 1:], eps=MIN_CHANCE)], dim=-1)
        survival = torch.where((values > 0) & (depth < self.depth_limit), nodes.survival.unsqueeze(-1) * chance, -1.0)
        self.levels.append(_Level(nodes.places, ids, probs, columns, ids.gather(2, columns), chance, margin, survival))
        return state

    def _next_nodes(self, depth: int, parents: _Nodes, state: Tensor | None) -> _Nodes:
        """The candidates of the last level that may have children.

        Where shapes may differ only as many as some request needs: a child of what is not among the best ``num_nodes`` so far is not
        either.
        """
        level = self.levels[-1]
        survival, best = level.survival.flatten(1).sort(dim=1, descending=True, stable=True)
        count = min(self.num_nodes - depth - 1, best.shape[1])
        if not self.is_fixed:
            so_far = torch.cat([one.survival.flatten(1) for one in self.levels], dim=1)
            least = so_far.topk(min(self.num_nodes, so_far.shape[1]), dim=1).values[:, -1:]
            count = min(count, int(((survival >= least) & (survival > 0)).sum(1).max()))
        best, num_candidates = best[:, :count], level.tokens.shape[2]
        owner = best // num_candidates
        return _Nodes(
            tokens=level.tokens.flatten(1).gather(1, best),
            state=None if state is None else _pick(state, owner),
            survival=survival[:, :count].clamp(min=0.0),
            places=best + sum(one.tokens[0].numel() for one in self.levels[:-1]),
            salts=child_salt(parents.salts.gather(1, owner), best % num_candidates),
        )

    def _chances(self, sure: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """P(candidate accepted | its parent accepted) [R, B, J] of candidates with keys ``values``, none above the one before.

        Where the target's token decides (greedy, coupled) a candidate is fixed by law and noise, so its own weight counts.
        A drawn one may not look at itself: the confidence alone says what the draws are worth.
        """
        sure = sure.unsqueeze(-1)
        power = torch.where(self.is_greedy, 1.0, 1.0 / COUPLED_FLATTENING)
        weights = values**power / (keys**power).sum(-1, keepdim=True)
        weights = torch.cat([(weights[..., :1] * sure).sqrt(), weights[..., 1:]], dim=-1)
        order = torch.arange(2, values.shape[-1] + 1, device=values.device)
        factors = torch.cat([torch.ones(1, device=values.device), SECOND_DRAW * (2.0 / order) ** FADE])
        draws = sure * factors
        before = torch.cat([torch.ones_like(sure), (1.0 - draws[..., :-1]).cumprod(-1)], dim=-1)
        return torch.where(self.is_exact, weights, draws * before).cummin(-1).values

    def _confidence(self, depth: int, tokens: Tensor, margin: Tensor) -> Tensor:
        """c of the position after nodes with tokens [R, B]; without a head the probability of the law's best token."""
        logits = self.module.branch_confidence_logits(depth, self.hidden[:, depth], tokens)
        return torch.sigmoid(margin if logits is None else logits)

    def _grown(self) -> GrownTrees:
        """The best nodes of every request, in order, with their laws."""
        levels = self.levels
        alive = torch.cat([level.survival.flatten(1) for level in levels], dim=1)
        order = alive.sort(dim=1, descending=True, stable=True).indices[:, : self.num_nodes]
        tokens, confidence, margin = (
            torch.cat([part.flatten(1) for part in parts], dim=1).gather(1, order)
            for parts in zip(*((level.tokens, level.confidence, level.margin) for level in levels), strict=True)
        )
        num_candidates = levels[0].tokens.shape[2]
        parents = torch.cat([level.parents for level in levels], dim=1).gather(1, order // num_candidates)
        places = torch.full_like(alive, -1.0).scatter(
            1, order, torch.arange(order.shape[1], device=order.device).to(alive).expand_as(order)
        )
        above = torch.where(parents < 0, -1.0, places.gather(1, parents.clamp(min=0)))
        counts = (alive > 0).sum(1, keepdim=True)
        numbers = torch.cat([part.to(torch.float64) for part in (tokens, above, confidence, margin, counts)], dim=1)
        return GrownTrees(numbers, *self._laws(order // num_candidates, order % num_candidates))

    def _laws(self, owner: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """The laws (ids, probs) [R, n, w] of candidates ``turn`` [R, n] of nodes ``owner`` (counted over all levels), each
        without the candidates before it."""
        ids, probs, columns = (
            _pick(torch.cat(parts, dim=1), owner)
            for parts in zip(*((level.ids, level.probs, level.columns) for level in self.levels), strict=True)
        )
        is_before = torch.arange(columns.shape[2], device=columns.device) < turn.unsqueeze(-1)
        probs = probs.scatter(2, columns, torch.where(is_before, 0.0, probs.gather(2, columns)))
        return ids, probs / probs.sum(-1, keepdim=True)


def _pick(rows: Tensor, places: Tensor) -> Tensor:
    """rows [R, B, x] at places [R, n]: [R, n, x]."""
    return rows.gather(1, places.unsqueeze(-1).expand(-1, -1, rows.shape[2]))
