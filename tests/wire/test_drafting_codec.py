"""Turns and drafts survive the wire bit for bit; whatever was tampered with is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from dspark.drafting import DraftBatch, DraftLayout, Held, TurnBatch
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import DraftLaw, DraftTree, DraftTurn
from dspark.workers.wire import drafting_codec as codec
from dspark.workers.wire import drafting_pb2 as pb
from dspark.workers.wire.codec import WireError
from dspark.workers.wire.tensors import DTYPES, tensor_from_wire, tensor_to_wire

LAYOUT = DraftLayout("t", "d", "float32", 6, 4, 32)
FEATURES = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
TURN = DraftTurn("r", 12, (3, 1, 31), 6, FEATURES, 4, SamplingParams(temperature=0.7, acceptance=AcceptanceRule.RATIO), -(2**63), 9, "salt")
LAW = DraftLaw(torch.tensor([[4, 9, 0], [5, 31, 0]]), torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]))
TREE = DraftTree("r", 12, (9, 5), (-1, -1), (0.25, 1.0), LAW, (0.5, 3.0))


def turn_message() -> pb.Turns:
    return codec.turns_to_wire(TurnBatch(7, (TURN,)))


def drafts_message() -> pb.Drafts:
    return codec.drafts_to_wire(DraftBatch(7, (TREE,), (Held("s", 5, 4), Held("u", 0, 0, True)), 0.25))


def test_turns_survive() -> None:
    batch = codec.turns_from_wire(pb.Turns.FromString(turn_message().SerializeToString()), LAYOUT)
    (turn,) = batch.turns
    assert batch.seq == 7
    assert dataclasses.replace(turn, features=None) == dataclasses.replace(TURN, features=None)
    assert torch.equal(turn.features, FEATURES)
    bare = dataclasses.replace(TURN, tokens=(), features=None, sampling=SamplingParams(temperature=0.0, seed=3))
    (turn,) = codec.turns_from_wire(codec.turns_to_wire(TurnBatch(1, (bare,))), LAYOUT).turns
    assert (turn.tokens, turn.features, turn.sampling.rule, turn.sampling.is_greedy) == ((), None, AcceptanceRule.COUPLED, True)


def test_features_are_waited_for() -> None:
    features = torch.zeros(5, 6)
    batch = TurnBatch(1, (dataclasses.replace(TURN, features=features),), lambda: features.fill_(2.0))
    (turn,) = codec.turns_from_wire(codec.turns_to_wire(batch), LAYOUT).turns
    assert torch.equal(turn.features, torch.full((5, 6), 2.0))


def test_drafts_survive() -> None:
    batch = codec.drafts_from_wire(pb.Drafts.FromString(drafts_message().SerializeToString()), LAYOUT)
    (tree,) = batch.trees
    assert (batch.seq, batch.seconds, batch.held) == (7, 0.25, (Held("s", 5, 4), Held("u", 0, 0, True)))
    assert dataclasses.replace(tree, law=None) == dataclasses.replace(TREE, law=None)
    assert tree.law is not None
    assert torch.equal(tree.law.ids, LAW.ids)
    assert torch.equal(tree.law.probs, LAW.probs)
    plain = dataclasses.replace(TREE, law=None, margin=())
    assert codec.drafts_from_wire(codec.drafts_to_wire(DraftBatch(1, (plain,))), LAYOUT).trees == (plain,)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(0, 4), (3,), (2, 5), (1, 1, 7)])
def test_tensors_survive(dtype: str, shape: tuple[int, ...]) -> None:
    whole = torch.randint(-1000, 1000, (2 * shape[0] + 1, *shape[1:]), generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    part = whole[1 : shape[0] + 1]
    assert torch.equal(tensor_from_wire(tensor_to_wire(part), "x", dtype, shape), part)


def spoilt(field: str, value: Any) -> Callable[[], None]:
    """Decode a message in which one field of a tensor or of its turn, tree or held was set to another value."""

    def decode() -> None:
        where, *names = field.split(".")
        turns, drafts = turn_message(), drafts_message()
        message: Any = {"turn": turns.turns[0], "tree": drafts.trees[0], "held": drafts.held[0], "drafts": drafts}[where]
        for name in names[:-1]:
            message = getattr(message, name)
        target = getattr(message, names[-1])
        if isinstance(value, pb.Tensor):
            target.CopyFrom(value)
        elif isinstance(value, list):
            del target[:]
            target.extend(value)
        else:
            setattr(message, names[-1], value)
        codec.turns_from_wire(turns, LAYOUT)
        codec.drafts_from_wire(drafts, LAYOUT)

    return decode


def ints(*values: int) -> pb.Tensor:
    return tensor_to_wire(torch.tensor(values, dtype=torch.int32))


BAD = {
    "turn.id": ("", "request id"),
    "turn.base_len": (2, "tokens, but base_len"),
    "turn.max_nodes": (65, "out of range"),
    "turn.cache_salt": ("x" * 257, "out of range"),
    "turn.temperature": (float("nan"), "temperature"),
    "turn.rule": ("best", "best"),
    "turn.tokens": (ints(32), "tokens: an id is outside 0 to 31"),
    "turn.feature_start": (7, "beyond the position"),
    "turn.features": (tensor_to_wire(torch.zeros(5, 7)), r"features has shape \[5, 7\]"),
    "turn.features.dtype": ("float64", "features is 'float64'"),
    "turn.features.shape": ([4, 6], "features of shape"),
    "turn.features.data": (b"\0" * 120, "features has a wrong checksum"),
    "turn.features.crc32": (1, "features has a wrong checksum"),
    "tree.id": ("a\n", "request id"),
    "tree.tokens": (ints(9, -1), "drafted tokens"),
    "tree.parents": (ints(-1, 1), "parent"),
    "tree.confidence": (tensor_to_wire(torch.tensor([0.5, 1.5])), "confidence"),
    "tree.margin": (tensor_to_wire(torch.tensor([0.5])), "margin"),
    "tree.law_ids": (tensor_to_wire(torch.tensor([[4, 8, 0], [5, 31, 0]], dtype=torch.int32)), "cannot have been drawn"),
    "tree.law_probs": (tensor_to_wire(LAW.probs * 1.01), "cannot have been drawn"),
    "tree.law_probs.shape": ([3, 2], "law_probs has shape"),
    "held.have": (6, "context of 6 positions for 5 tokens"),
    "drafts.seconds": (float("inf"), "seconds"),
}


@pytest.mark.parametrize("field", list(BAD))
def test_what_was_tampered_with_is_refused_by_name(field: str) -> None:
    value, message = BAD[field]
    with pytest.raises(WireError, match=message):
        spoilt(field, value)()


def test_features_that_are_not_finite_are_refused() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        layout = dataclasses.replace(LAYOUT, dtype=dtype)
        for bad in (float("inf"), float("nan")):
            features = FEATURES.clone().to(DTYPES[dtype])
            codec.turns_from_wire(codec.turns_to_wire(TurnBatch(1, (dataclasses.replace(TURN, features=features),))), layout)
            features[3, 2] = bad
            message = codec.turns_to_wire(TurnBatch(1, (dataclasses.replace(TURN, features=features),)))
            with pytest.raises(WireError, match="not finite"):
                codec.turns_from_wire(message, layout)


def test_half_a_law_and_empty_trees_are_refused() -> None:
    message = drafts_message()
    message.trees[0].ClearField("law_probs")
    with pytest.raises(WireError, match="half"):
        codec.drafts_from_wire(message, LAYOUT)
    empty = DraftBatch(1, (DraftTree("r", 3, (), (), ()),))
    with pytest.raises(WireError, match="0 nodes"):
        codec.drafts_from_wire(codec.drafts_to_wire(empty), LAYOUT)


@given(st.integers(0, 10**6), st.integers(0, 7), st.booleans())
def test_a_flipped_bit_never_changes_what_is_drafted_with_or_accepted_by(place: int, bit: int, is_turn: bool) -> None:
    """It is refused, or it is in a number that only makes a draft stale or another request's."""
    data = bytearray((turn_message() if is_turn else drafts_message()).SerializeToString())
    data[place % len(data)] ^= 1 << bit
    try:
        if is_turn:
            turns = codec.turns_from_wire(pb.Turns.FromString(bytes(data)), LAYOUT).turns
            assert all(turn.features is None or torch.equal(turn.features, FEATURES) for turn in turns)
            assert all(turn.tokens in (TURN.tokens, ()) for turn in turns)
            return
        for tree in codec.drafts_from_wire(pb.Drafts.FromString(bytes(data)), LAYOUT).trees:
            assert tree.tokens == TREE.tokens
            assert tree.parents == TREE.parents
            assert tree.law is None or torch.equal(tree.law.probs, LAW.probs)
    except (WireError, DecodeError):
        pass


def test_layouts_name_what_differs() -> None:
    assert codec.layout_from_wire(codec.layout_to_wire(LAYOUT)) == LAYOUT
    assert LAYOUT.mismatch(LAYOUT) is None
    other = dataclasses.replace(LAYOUT, drafter="e", dtype="bfloat16")
    assert LAYOUT.mismatch(other) == "drafter is 'd' here and 'e' there; dtype is 'float32' here and 'bfloat16' there"
