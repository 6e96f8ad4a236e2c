"""The nouns that travel between rooms: frozen, without torch.

``base_len`` counts a request's known tokens (prompt + committed output). It is the version of a draft:
a tree made for another ``base_len`` is stale, and stale means dropped.

Positions: token ``i`` of a request sits at position ``i``. With ``base_len`` known tokens the **anchor** is the token
at position ``base_len - 1``; it has no KV yet. The first drafted token belongs to position ``base_len``.
Target features exist for every position that has KV, so for positions ``< base_len - 1`` when a request decodes.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

from dspark.sampling import SamplingParams

MAX_TREE_NODES = 62  # with the anchor as many tokens as a node's ancestors have bits
DEFAULT_TREE_NODES = 16


class Finish(StrEnum):
    """Why a request ended. The values are OpenAI's ``finish_reason`` where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Mode(StrEnum):
    """How many drafted tokens are verified."""

    OFF = "off"
    STATIC = "static"
    ADAPTIVE = "adaptive"
    SHADOW = "shadow"  # verifies all, commits what adaptive would have: shows what trimming costs


@dataclass(frozen=True, slots=True)
class Speculation:
    """A speculation mode; ``draft_len`` is k of ``static:k``, and the longest branch otherwise (None: the drafter's).

    ``tree_nodes`` is how many nodes a draft tree may have; 0 asks for chains. Only adaptive verification takes trees.
    """

    mode: Mode = Mode.ADAPTIVE
    draft_len: int | None = None
    tree_nodes: int = 0

    @staticmethod
    def parse(text: str) -> Speculation:
        """Read ``off`` (or ``plain``), ``static:K``, ``adaptive[:K]``, ``shadow[:K]`` or ``tree[:NODES[:K]]``; ValueError otherwise."""
        name, _, length = text.partition(":")
        nodes = 0
        if name == "tree":
            first, _, length = length.partition(":")
            name, nodes = Mode.ADAPTIVE, int(first) if first else DEFAULT_TREE_NODES
            if not 0 < nodes <= MAX_TREE_NODES:
                raise ValueError(f"speculation {text!r}: a tree has from 1 to {MAX_TREE_NODES} nodes")
        mode = Mode.OFF if name == "plain" else Mode(name)
        if mode is Mode.OFF and length:
            raise ValueError(f"speculation {text!r}: off takes no length")
        if mode is Mode.STATIC and not length:
            raise ValueError(f"speculation {text!r}: static needs a length, for example static:3")
        if length and not 0 < int(length) <= 64:
            raise ValueError(f"speculation {text!r}: the length must be from 1 to 64")
        return Speculation(mode, int(length) if length else None, nodes)

    def __str__(self) -> str:
        name = f"tree:{self.tree_nodes}" if self.tree_nodes else str(self.mode)
        return f"{name}:{self.draft_len}" if self.draft_len else name


@dataclass(frozen=True, slots=True)
class LatencyBudget:
    """What the caller was promised: milliseconds to the first token and per token after it."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True, slots=True)
class KVSource:
    """A verifier that another one may fetch KV from, and the secret that opens it."""

    replica_id: str
    address: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate (n = 1; ``SamplingParams.child`` makes the others).

    ``noise_seed`` keys all random numbers of the request: the user's seed if there is one, otherwise drawn here,
    once, so that a replay on another replica draws the same numbers.
    ``prompt_token_ids`` may end with tokens already generated (a replay): ``num_prompt_tokens`` then says where the
    prompt ends; 0 means that all of them are prompt.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    latency_budget: LatencyBudget = field(default_factory=LatencyBudget)
    speculation: Speculation | None = None
    priority: int = 0
    cache_salt: str = ""
    noise_seed: int = field(default_factory=lambda: secrets.randbits(63))
    num_prompt_tokens: int = 0
    service_class: str = ""  # the class that its latency budget comes from, for metrics; empty: none
    kv_source: KVSource | None = None  # a verifier that holds KV of its tokens

    def __post_init__(self) -> None:
        if self.sampling.seed is not None:
            object.__setattr__(self, "noise_seed", self.sampling.seed)
        if self.num_prompt_tokens == 0:
            object.__setattr__(self, "num_prompt_tokens", len(self.prompt_token_ids))


@dataclass(frozen=True, slots=True)
class DraftTurn:
    """What a drafter learns about one request after a step.

    ``tokens`` are the tokens that became known since the request's last turn (the first turn carries them all; a turn
    of a prefill chunk carries none if none became known). ``features`` are the projected context features
    [num_features, d] of positions ``feature_start ..`` that got KV in this step (None when the drafter has no taps).
    ``max_draft`` is how many tokens deep the verifier may verify next; 0 means feed only, draft nothing. With
    ``max_nodes`` over 0 the draft may be a tree of that many nodes. ``num_computed`` positions have KV for good.
    """

    request_id: str
    base_len: int
    tokens: tuple[int, ...]
    feature_start: int
    features: Any
    max_draft: int
    sampling: SamplingParams
    noise_seed: int
    max_nodes: int = 0
    cache_salt: str = ""  # requests with different salts share no context
    num_computed: int = 0


@dataclass(frozen=True, slots=True)
class DraftLaw:
    """The law each drafted token was drawn from, as its support: ``ids`` [n, k] int64, ``probs`` [n, k] fp32 summing to 1.

    Unused places of a row hold probability 0 (and any id).
    """

    ids: Any
    probs: Any


@lru_cache
def chain_parents(count: int) -> tuple[int, ...]:
    """The parents of a chain of so many nodes."""
    return tuple(range(-1, count - 1))


@dataclass(frozen=True, slots=True, eq=False)
class SignalRows:
    """What a drafter says of R chains that it drafted together: ``confidence`` and ``margin`` [R, γ], float64 on the host."""

    confidence: Any
    margin: Any


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Drafted tokens of one request, parents before children; a chain has parents -1, 0, 1, …

    ``confidence[i]`` estimates P(node i accepted | its parent accepted) and never looks at token i itself.
    ``law`` None means that every token was chosen deterministically (a one-hot law).
    ``margin[i]`` is how sure the law of node i is of itself, by any measure that grows with it and does not look at token i
    (DSpark modules: log-odds of the best token at temperature 1); of a later sibling it is a logit of acceptance. Empty when the
    drafter has none. A chain that was drafted beside others may name the ``row`` of ``rows`` that begins with the same numbers.
    """

    request_id: str
    base_len: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    confidence: tuple[float, ...]
    law: DraftLaw | None = None
    margin: tuple[float, ...] = ()
    rows: SignalRows | None = field(default=None, compare=False, repr=False)
    row: int = field(default=0, compare=False, repr=False)

    @staticmethod
    def chain(
        request_id: str,
        base_len: int,
        tokens: Sequence[int],
        confidence: Sequence[float],
        law: DraftLaw | None = None,
        margin: Sequence[float] = (),
        rows: SignalRows | None = None,
        row: int = 0,
    ) -> DraftTree:
        """A tree without branches."""
        parents = chain_parents(len(tokens))
        return DraftTree(request_id, base_len, tuple(tokens), parents, tuple(confidence), law, tuple(margin), rows, row)

    def first(self, count: int) -> DraftTree:
        """The first ``count`` nodes, with their laws."""
        if count >= len(self.tokens):
            return self
        law = None if self.law is None else DraftLaw(self.law.ids[:count], self.law.probs[:count])
        return DraftTree(
            self.request_id,
            self.base_len,
            self.tokens[:count],
            self.parents[:count],
            self.confidence[:count],
            law,
            self.margin[:count],
            self.rows,
            self.row,
        )

    @property
    def is_chain(self) -> bool:
        return self.parents == chain_parents(len(self.parents))


@dataclass(frozen=True, slots=True)
class DraftSignals:
    """How to read what a drafter's trees say of their own chances.

    ``has_head``: ``confidence`` comes from a trained head. ``margin_slope`` and ``margin_intercept`` turn a margin into the logit
    of its acceptance, one number a position (the last one also for deeper ones): where an estimator starts from.
    """

    has_head: bool = False
    margin_slope: tuple[float, ...] = (1.0,)
    margin_intercept: tuple[float, ...] = (0.0,)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One request's share of a step: ``num_known`` known tokens from position ``start``, then ``num_draft`` drafted ones.

    The row yields tokens if and only if it computes the anchor (``samples``); drafts follow an anchor only. At most
    ``num_commit`` of them may be committed: in shadow mode as many as adaptive verification would have taken.
    """

    request_id: str
    start: int
    num_known: int
    num_draft: int
    samples: bool
    num_commit: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_known + self.num_draft


@dataclass(frozen=True, slots=True)
class VerifyPlan:
    """What one forward computes: the rows in order, padded to ``token_bucket`` tokens."""

    rows: tuple[PlanRow, ...]
    token_bucket: int

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class KVSpan:
    """A request's KV: physical block ids in order, and how many positions hold committed KV."""

    block_ids: tuple[int, ...]
    committed: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token under the target's raw law, its rank (1 = most likely), and the best alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class StepOutcome(NamedTuple):
    """What one verifier step decided for one request. A tuple: hundreds are made a step, in a third of a frozen dataclass's time."""

    request_id: str
    base_len: int  # known tokens after this step
    tokens: tuple[int, ...]  # accepted draft tokens, then one of the target's own
    accepted: int  # len(tokens) - 1, unless the request was cut
    drafted: int = 0  # draft tokens verified in this step
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    error: str | None = None


class SpeculationState(StrEnum):
    """What became of the speculation that an engine was asked for."""

    OFF = "off"  # nobody asked for it
    ACTIVE = "active"
    PAUSED = "paused"  # measured not to pay at the present load
    INACTIVE = "inactive"  # asked for, but no drafts come


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What a router may know about a verifier replica. ``age_s`` is how old the view is.

    ``queued_tokens`` are known tokens without KV, of waiting and running requests. ``waiting`` has (priority, requests,
    tokens) of the waiting ones, most urgent first. ``step_costs`` are (tokens, seconds) of a verify step, ``draft_costs``
    (requests, seconds) of a draft round; both empty when they were not measured. ``prefill_token_s`` is what a prompt token adds
    to a step (0: as much as any other), ``context_row_s`` what the context of a running request does. ``drafted_per_round``
    counts verified drafted tokens, ``tokens_per_round`` committed ones. ``speculation_limit`` is the share of the longest
    draft that may be verified.
    """

    id: str
    address: str
    queued: int
    running: int
    max_running: int
    queued_tokens: int
    free_blocks: int
    num_blocks: int
    draining: bool = False
    tokens_per_round: float = 1.0
    step_costs: tuple[tuple[int, float], ...] = ()
    prefix_digest: frozenset[int] = frozenset()
    budgets_met: float = 1.0
    age_s: float = 0.0
    prefill_token_s: float = 0.0
    context_row_s: float = 0.0
    draft_costs: tuple[tuple[int, float], ...] = ()
    drafted_per_round: float = 0.0
    max_step_tokens: int = 512
    waiting: tuple[tuple[int, int, int], ...] = ()
    speculation: SpeculationState = SpeculationState.OFF
    speculation_limit: float = 1.0


class Drafter(Protocol):
    """Where drafts come from. A lost draft is an empty tree, never an exception.

    ``block_size``: most tokens drafted a round (γ). ``taps``: target layer ids whose outputs it wants
    (id L is the output of layer L, -1 the embeddings); empty for drafters that read tokens only.
    ``signals``: how its confidences and margins are to be read.
    """

    block_size: int
    taps: tuple[int, ...]
    signals: DraftSignals

    def project(self, taps: Any) -> Any:
        """Context features [n, d] of concatenated taps [n, len(taps) * d_target]; runs on the verifier."""

    def propose(self, turns: Sequence[DraftTurn]) -> None:
        """Take in what was committed and start drafting for every turn with ``max_draft`` > 0."""

    def collect(self, want: Mapping[str, int], wait_s: float) -> dict[str, DraftTree]:
        """Drafts of at most ``want[id]`` tokens that are ready within ``wait_s``; absent means none."""

    def close(self, request_ids: Sequence[str]) -> None:
        """Forget requests that ended. Preempted requests are not closed."""


@runtime_checkable
class MeasuredDrafter(Protocol):
    """A drafter that has something to tell beyond its drafts."""

    def stats(self) -> dict[str, float]:
        """Counters and gauges by name."""


@runtime_checkable
class DraftsAhead(Protocol):
    """A drafter that drafts elsewhere while the engine does something else."""

    def round_seconds(self, num_requests: int) -> float:
        """How long it takes lately from ``propose`` until the drafts of that many requests are there."""

    def end(self) -> None:
        """End its connections, for good."""


@dataclass(frozen=True, slots=True)
class Continuations:
    """R rows of a step that is under way: ``num_drafts`` [R] were verified behind ``base_lens`` [R] known tokens.

    ``first_rows`` [R]: where the step leaves the target's own token after the anchor; those after each draft follow. All int64.
    ``asked``: what the requests ask of sampling, joined (``dspark/asked.py``); None: all are greedy.
    """

    request_ids: Sequence[str]
    base_lens: Any
    num_drafts: Any
    first_rows: Any
    asked: bytes | None = None


@dataclass(frozen=True, slots=True)
class DeviceDrafts:
    """What a drafter leaves on the device behind a step: R rows or more, in the order asked for.

    ``anchors`` [R]: the step's own tokens. ``tokens`` [R, γ] the drafts behind them. ``places``, ``slots`` [R, γ + 1]: positions of
    anchor and drafts, and where their KV goes.
    """

    anchors: Any
    tokens: Any
    places: Any
    slots: Any


@dataclass(frozen=True, slots=True)
class DeviceLaws:
    """Where a drafter on the device leaves drafts that are sampled: ``tokens`` [R, γ] from ``ids``, ``probs`` [R, γ, W]."""

    tokens: Any
    ids: Any
    probs: Any


@dataclass(frozen=True, slots=True)
class DraftedChains:
    """Drafts of R requests side by side on the host: tokens, confidence, margin [R, γ] behind ``anchors`` [R] at ``positions`` [R]."""

    tokens: Any
    confidence: Any
    margin: Any
    anchors: Any
    positions: Any


@runtime_checkable
class ContinuesSteps(Protocol):
    """A drafter on the target's own device, which finds out there what a step accepted, and drafts on before the host knows."""

    def continue_step(self, rows: Continuations) -> DeviceDrafts:
        """Draft for the rows of the step that was launched last; the next ``propose`` may turn out to want other drafts."""

    def continued(self) -> DraftedChains:
        """What the last ``continue_step`` drafted, in its order, in place of a ``propose`` and a ``collect``; waits for it."""

    def follow(self, request_ids: Sequence[str], base_lens: Sequence[int], anchors: Sequence[int]) -> None:
        """Requests whose drafts were taken that way have so many known tokens now, the last of them ``anchors``."""


class FedStep(Protocol):
    """A step of the target as a drafter sees it that takes its context inside the step."""

    @property
    def slots(self) -> Any:
        """[T]: where each token's KV goes; -1 is padding."""

    def slots_before(self, positions: Any) -> Any:
        """[T]: where KV of the position before each token at ``positions`` [T] lies; -1: there is none. Not for trees."""


class BlockTables(Protocol):
    """Read access to the block tables, for drafters that keep their KV under the target's block ids."""

    num_blocks: int
    block_size: int

    def table(self, request_id: str) -> Sequence[int]:
        """Physical block ids of a running request, in order."""
