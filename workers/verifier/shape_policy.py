"""Chain or tree: which shape of draft brings more tokens a second at few streams, found out by measuring both.

A tree of a few nodes is accepted further than a chain, and costs more to draft and to verify. At one stream those nodes are nearly
free; with many streams they are not, and the planner trims trees to chains anyway. Where the two cross hangs on target, drafter,
machine and text, so each number of streams has a shape that it uses and the other one that it tries now and then. The choice is made
before a draft from steps that are over: it can bias no text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark.workers.verifier.speed import Speed

AUTO_NODES = 8  # of the trees that are tried
MOST_ROWS = 4  # with more streams drafts are chains
TREE_ROWS = 1  # streams up to which trees are the first guess
TRY_EVERY, TRY_FOR = 96, 8  # steps from one try of the other shape to the next, and its length
MOST_EVERY = 8 * TRY_EVERY
MIN_STEPS = 48.0  # of both shapes before one can replace the other
BETTER = 1.03


@dataclass(slots=True)
class _Choice:
    """What one number of streams uses, and how both shapes fared there."""

    is_tree: bool
    tree: Speed = field(default_factory=Speed)
    chain: Speed = field(default_factory=Speed)
    every: int = TRY_EVERY
    step: int = 0  # since the last try

    def next_is_tree(self) -> bool:
        """Whether the next draft is a tree; a shape that was clearly slower is tried more and more rarely."""
        self.step += 1
        tries = self.step > self.every - TRY_FOR
        if self.step == self.every:
            used, other = self._shapes
            is_clear = min(used.steps, other.steps) >= MIN_STEPS and used.tokens_per_s > BETTER * other.tokens_per_s
            self.step, self.every = 0, min(2 * self.every, MOST_EVERY) if is_clear else TRY_EVERY
        return self.is_tree != tries

    def settle(self) -> None:
        """Change to the other shape if it is clearly faster."""
        used, other = self._shapes
        if min(used.steps, other.steps) >= MIN_STEPS and other.tokens_per_s > BETTER * used.tokens_per_s:
            self.is_tree = not self.is_tree
            self.step, self.every = 0, TRY_EVERY

    @property
    def _shapes(self) -> tuple[Speed, Speed]:
        """The shape that is used, and the other one."""
        return (self.tree, self.chain) if self.is_tree else (self.chain, self.tree)


class ShapePolicy:
    """How many nodes the next drafts of adaptive requests have; 0: chains."""

    def __init__(self, can_branch: bool) -> None:
        """``can_branch``: the drafter makes trees."""
        self._choices = {rows: _Choice(rows <= TREE_ROWS) for rows in range(1, MOST_ROWS + 1)} if can_branch else {}

    def nodes(self, num_rows: int) -> int:
        """Nodes of a draft for the next step of so many streams; ask once a step."""
        choice = self._choices.get(num_rows)
        return AUTO_NODES if choice is not None and choice.next_is_tree() else 0

    def observe(self, num_rows: int, nodes: int, num_tokens: int, seconds: float) -> None:
        """A decode step of ``num_rows`` streams whose drafts had ``nodes`` (0: chains) brought ``num_tokens`` in ``seconds``."""
        choice = self._choices.get(num_rows)
        if choice is not None:
            (choice.tree if nodes else choice.chain).add(num_tokens, seconds)
            choice.settle()
