"""Nouns of ``dspark.drafting`` to and from protobuf messages; everything received is checked before it becomes a noun.

A ``*_from_wire`` function returns valid nouns or raises ``WireError``: the session it came on ends, and nothing reaches an
engine or a drafter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from dspark.drafting import DraftBatch, DraftLayout, Held, TurnBatch
from dspark.errors import BadRequest
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import MAX_TREE_NODES, DraftLaw, DraftTree, DraftTurn
from dspark.workers.wire import drafting_pb2 as pb
from dspark.workers.wire.codec import MAX_SALT_CHARS, WireError, check_id
from dspark.workers.wire.tensors import tensor_from_wire, tensor_to_wire

DRAFT_PROTOCOL: Final = 1
MAX_MESSAGE_BYTES: Final = 64 * 2**20  # features of one step, with what is sent again: RemoteDrafter bounds them far below
MAX_TURNS: Final = 4096
MAX_CLOSED: Final = 65536
MAX_LEN: Final = 2**24  # tokens of one request
SUM_TOLERANCE: Final = 1e-3  # of a draft law's probabilities


def layout_to_wire(layout: DraftLayout) -> pb.Layout:
    """The message of a layout."""
    return pb.Layout(
        target=layout.target,
        drafter=layout.drafter,
        dtype=layout.dtype,
        feature_width=layout.feature_width,
        block_size=layout.block_size,
        vocab_size=layout.vocab_size,
    )


def layout_from_wire(message: pb.Layout) -> DraftLayout:
    """What the other end says of itself; to be compared, never to be allocated by."""
    sizes = (message.feature_width, message.block_size, message.vocab_size)
    return DraftLayout(message.target[:64], message.drafter[:64], message.dtype[:64], *sizes)


# --- turns ---


def turns_to_wire(batch: TurnBatch) -> pb.Turns:
    """The message of a batch; waits for its features."""
    batch.wait_ready()
    return pb.Turns(seq=batch.seq, turns=[_turn_to_wire(turn) for turn in batch.turns])


def _turn_to_wire(turn: DraftTurn) -> pb.Turn:
    return pb.Turn(
        id=turn.request_id,
        base_len=turn.base_len,
        tokens=_ints(turn.tokens),
        feature_start=turn.feature_start,
        features=None if turn.features is None else tensor_to_wire(turn.features),
        max_draft=turn.max_draft,
        max_nodes=turn.max_nodes,
        temperature=turn.sampling.temperature,
        rule=turn.sampling.rule,
        noise_seed=turn.noise_seed,
        cache_salt=turn.cache_salt,
    )


def turns_from_wire(message: pb.Turns, layout: DraftLayout) -> TurnBatch:
    """A checked batch of turns whose tensors fit the layout."""
    if len(message.turns) > MAX_TURNS:
        raise WireError(f"{len(message.turns)} turns in one batch; at most {MAX_TURNS}")
    return TurnBatch(message.seq, tuple(_turn_from_wire(turn, layout) for turn in message.turns))


def _turn_from_wire(message: pb.Turn, layout: DraftLayout) -> DraftTurn:
    check_id(message.id)
    if not 0 < message.base_len <= MAX_LEN or message.max_nodes > MAX_TREE_NODES or len(message.cache_salt) > MAX_SALT_CHARS:
        raise WireError(f"turn of {message.id}: base_len {message.base_len}, max_nodes {message.max_nodes} or its salt is out of range")
    tokens = _tokens(message.tokens, "tokens", layout.vocab_size)
    if len(tokens) > message.base_len:
        raise WireError(f"turn of {message.id}: {len(tokens)} tokens, but base_len is {message.base_len}")
    features = None
    if message.HasField("features"):
        features = tensor_from_wire(message.features, "features", layout.dtype, (None, layout.feature_width))
        if message.feature_start + len(features) >= message.base_len:
            raise WireError(f"turn of {message.id}: features reach beyond the position before the anchor")
    return DraftTurn(
        request_id=message.id,
        base_len=message.base_len,
        tokens=tokens,
        feature_start=message.feature_start,
        features=features,
        max_draft=min(message.max_draft, layout.block_size),
        sampling=_sampling(message),
        noise_seed=message.noise_seed,
        max_nodes=message.max_nodes,
        cache_salt=message.cache_salt,
    )


def _sampling(message: pb.Turn) -> SamplingParams:
    """What drafting needs to know of a request's sampling."""
    try:
        return SamplingParams(temperature=message.temperature, acceptance=AcceptanceRule(message.rule))
    except (BadRequest, ValueError) as error:
        raise WireError(f"turn of {message.id}: {error}") from error


# --- drafts ---


def drafts_to_wire(batch: DraftBatch) -> pb.Drafts:
    """The message of an answer."""
    held = [pb.Held(id=item.request_id, known=item.known, have=item.have, is_full=item.is_full) for item in batch.held]
    return pb.Drafts(seq=batch.seq, trees=[_tree_to_wire(tree) for tree in batch.trees], held=held, seconds=batch.seconds)


def _tree_to_wire(tree: DraftTree) -> pb.Tree:
    return pb.Tree(
        id=tree.request_id,
        base_len=tree.base_len,
        tokens=_ints(tree.tokens),
        parents=_ints(tree.parents),
        confidence=_floats(tree.confidence),
        margin=_floats(tree.margin) if tree.margin else None,
        law_ids=None if tree.law is None else tensor_to_wire(tree.law.ids.to(torch.int32)),
        law_probs=None if tree.law is None else tensor_to_wire(tree.law.probs),
    )


def drafts_from_wire(message: pb.Drafts, layout: DraftLayout) -> DraftBatch:
    """A checked answer: every tree is one, and every law is a law from which its token can have been drawn."""
    if len(message.trees) > MAX_TURNS or len(message.held) > MAX_TURNS:
        raise WireError(f"{len(message.trees)} trees and {len(message.held)} held requests in one answer; at most {MAX_TURNS}")
    if not math.isfinite(message.seconds) or message.seconds < 0:
        raise WireError("seconds is no duration")
    trees = tuple(_tree_from_wire(tree, layout.vocab_size) for tree in message.trees)
    return DraftBatch(message.seq, trees, tuple(_held_from_wire(held) for held in message.held), message.seconds)


def _tree_from_wire(message: pb.Tree, vocab_size: int) -> DraftTree:
    check_id(message.id)
    tokens = _tokens(message.tokens, "drafted tokens", vocab_size)
    count = len(tokens)
    if not 0 < count <= MAX_TREE_NODES:
        raise WireError(f"tree of {message.id}: {count} nodes; from 1 to {MAX_TREE_NODES} are allowed")
    parents = tensor_from_wire(message.parents, "parents", "int32", (count,)).tolist()
    if any(not -1 <= parent < node for node, parent in enumerate(parents)):
        raise WireError(f"tree of {message.id}: a parent does not come before its child")
    confidence = tensor_from_wire(message.confidence, "confidence", "float32", (count,)).tolist()
    if any(not 0 <= value <= 1 for value in confidence):
        raise WireError(f"tree of {message.id}: a confidence is no probability")
    margin = tensor_from_wire(message.margin, "margin", "float32", (count,)).tolist() if message.HasField("margin") else ()
    law = _law(message, tokens, vocab_size)
    return DraftTree(message.id, message.base_len, tokens, tuple(parents), tuple(confidence), law, tuple(margin))


def _law(message: pb.Tree, tokens: Sequence[int], vocab_size: int) -> DraftLaw | None:
    if message.HasField("law_ids") != message.HasField("law_probs"):
        raise WireError(f"tree of {message.id}: half a draft law")
    if not message.HasField("law_ids"):
        return None
    ids = tensor_from_wire(message.law_ids, "law_ids", "int32", (len(tokens), None))
    probs = tensor_from_wire(message.law_probs, "law_probs", "float32", tuple(ids.shape))
    numbers, weights = ids.numpy(), probs.numpy()
    if not weights.size or numbers.min() < 0 or numbers.max() >= vocab_size or weights.min() < 0:
        raise WireError(f"tree of {message.id}: an id or a probability of the draft law is out of range")
    drawn = ((numbers == [[token] for token in tokens]) & (weights > 0)).any(axis=1)
    if abs(weights.sum(axis=1) - 1.0).max() > SUM_TOLERANCE or not drawn.all():
        raise WireError(f"tree of {message.id}: its tokens cannot have been drawn from its law")
    return DraftLaw(ids.to(torch.int64), probs)


def _held_from_wire(message: pb.Held) -> Held:
    check_id(message.id)
    if message.known > MAX_LEN or message.have > message.known:
        raise WireError(f"held of {message.id}: context of {message.have} positions for {message.known} tokens")
    return Held(message.id, message.known, message.have, message.is_full)


# --- ids ---


def ids_from_wire(message: pb.Close) -> tuple[str, ...]:
    """Checked ids of requests that ended."""
    if len(message.ids) > MAX_CLOSED:
        raise WireError(f"{len(message.ids)} ids in one close; at most {MAX_CLOSED}")
    for request_id in message.ids:
        check_id(request_id)
    return tuple(message.ids)


def _tokens(message: pb.Tensor, name: str, vocab_size: int) -> tuple[int, ...]:
    tokens = tensor_from_wire(message, name, "int32", (None,)).tolist()
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise WireError(f"{name}: an id is outside 0 to {vocab_size - 1}")
    return tuple(tokens)


def _ints(values: Sequence[int]) -> pb.Tensor:
    return tensor_to_wire(torch.tensor(values, dtype=torch.int32))


def _floats(values: Sequence[float]) -> pb.Tensor:
    return tensor_to_wire(torch.tensor(values, dtype=torch.float32))
