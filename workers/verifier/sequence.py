"""One request inside the engine: what is known, what has KV, and what it may still produce."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dspark.asked import record_of
from dspark.sampling import AcceptanceRule
from dspark.types import DraftTree, Mode, Request, Speculation, TokenLogprob
from dspark.workers.blocks import extend_hashes
from dspark.workers.verifier.draft_policy import RESTED, Rest
from dspark.workers.verifier.edits import LogitEdits
from dspark.workers.verifier.text import TextStream

ROUND_RATE = 0.1  # of the running mean of tokens a round


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of a request. ``tokens`` are all known tokens; positions ``< num_computed`` have KV.

    A request that prefills, decodes, resumes after preemption or verifies drafts is always the same case: its computed
    tokens catch up with its known tokens, and if they do, the step yields new ones.
    """

    request: Request
    speculation: Speculation
    max_len: int  # known tokens at which it must end
    tokens: list[int]
    num_prompt: int  # the tokens before this index are the prompt; the rest is output
    num_computed: int = 0
    num_reserved: int = 0  # positions that a step launched ahead has blocks for
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    admitted: bool = False  # it has run before (a later admission is a resume)
    draft_depth: int = 0  # how many tokens deep the drafter was asked to draft after the last step
    drafts_wanted: int = 0  # how many drafted tokens in all: more than the depth for a tree
    draft: DraftTree | None = None
    text: TextStream | None = None  # only for requests with stop strings
    num_taught: int = 0  # known tokens that the drafter has been told
    rest: Rest = RESTED  # from drafting, when its drafts are never admitted
    arrived_s: float = 0.0  # on the engine's clock
    first_s: float | None = None  # when its first token was committed here
    num_after_first: int = 0  # tokens committed since
    tokens_per_round: float = 1.0  # running mean
    limit_s: float = math.inf  # seconds a token that keep its latency budget, as of this step
    stop_ids: tuple[int, ...] = ()  # tokens that end it
    stop_set: frozenset[int] = frozenset()  # the same
    rule: AcceptanceRule = AcceptanceRule.RATIO
    is_sampled: bool = False
    asked: bytes = b""  # what it asks of sampling, for the device
    edits: LogitEdits | None = None  # and what it does to its logits
    left_out: int = 0  # steps in a row that it sat out for others' budgets
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    _hashes: list[bytes] = field(default_factory=list)
    _output: list[int] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_known(self) -> int:
        return len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Known tokens without KV; 1 while it decodes (the anchor)."""
        return len(self.tokens) - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still wanted."""
        return self.first_s is None and self.wants_prompt_logprobs

    @property
    def needs_edits(self) -> bool:
        """Whether its next token does not follow from the target's logits as they are, or is to be scored."""
        return self.edits is not None and (self.edits.lasts or self.request.sampling.min_tokens > len(self._output))

    @property
    def takes_best(self) -> bool:
        """Whether its next token is simply the best of the target's logits, which nobody asks for, its prompt's neither."""
        return not self.is_sampled and not self.needs_edits and not self.scores_prompt

    @property
    def output(self) -> list[int]:
        """Committed output tokens (not a copy: do not change it)."""
        return self._output

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None

    def append(self, tokens: tuple[int, ...], now_s: float) -> None:
        """Commit output tokens."""
        self.tokens.extend(tokens)
        self._output.extend(tokens)
        if self.first_s is None:
            self.first_s = now_s
        else:
            self.num_after_first += len(tokens)
            self.tokens_per_round += ROUND_RATE * (len(tokens) - self.tokens_per_round)

    def append_one(self, token: int) -> None:
        """``append`` of one token that is not the first."""
        self.tokens.append(token)
        self._output.append(token)
        self.num_after_first += 1
        self.tokens_per_round += ROUND_RATE * (1.0 - self.tokens_per_round)

    def max_draft(self, block_size: int) -> int:
        """How many drafted tokens could still be of use: one position is always the target's own."""
        if self.speculation.mode is Mode.OFF:
            return 0
        limit = block_size if self.speculation.draft_len is None else min(block_size, self.speculation.draft_len)
        return max(0, min(limit, self.max_len - self.num_known - 1))

    def max_nodes(self, depth: int, max_model_len: int, auto_nodes: int) -> int:
        """How many nodes a draft tree of at most ``depth`` levels may have; 0 where a chain is wanted.

        ``auto_nodes`` are for adaptive requests that ask for no shape and whose text is fixed by logits and noise.

        While it is verified every node takes a position of its own, and no request has more than ``max_model_len``.
        """
        nodes = self.speculation.tree_nodes
        if self.speculation == Speculation() and self.request.sampling.is_exact:
            nodes = auto_nodes
        return min(nodes, max_model_len - self.num_known) if depth else 0

    def hashes(self, block_size: int, num_blocks: int) -> list[bytes]:
        """Chained hashes of the first ``num_blocks`` full blocks of known tokens."""
        extend_hashes(self._hashes, self.tokens, num_blocks, block_size, self.request.cache_salt)
        return self._hashes[:num_blocks]

    @staticmethod
    def of(request: Request, speculation: Speculation, max_model_len: int) -> Sequence:
        """The state of a new request; tokens behind ``num_prompt_tokens`` (a replay) count as its output."""
        prompt = request.num_prompt_tokens
        limit = max_model_len
        if request.sampling.max_tokens is not None:
            limit = min(limit, prompt + request.sampling.max_tokens)
        tokens = list(request.prompt_token_ids)
        sampling = request.sampling
        return Sequence(
            request,
            speculation,
            limit,
            tokens,
            prompt,
            is_sampled=not sampling.is_greedy,
            asked=record_of(sampling, request.noise_seed),
            edits=LogitEdits.of(request.id, sampling, tokens, prompt),
            rule=sampling.rule,
            _output=tokens[prompt:],
        )
