"""Tensors as one buffer and back: whatever is not as announced is refused by name. The group itself is tested by its users."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import pytest
import torch
from torch import Tensor

from dspark.errors import WorkerLost
from dspark.workers.wire.codec import WireError
from dspark.workers.wire.pair import Expected, PairGroup, TensorHead, check_heads, fold, on_thread, open_store, pack, reach_store, unpack

CPU = torch.device("cpu")
TENSORS = [torch.rand(3, 5), torch.rand(2, 7).bfloat16(), torch.rand(0, 4), torch.arange(5, dtype=torch.int32), torch.rand(1).half()]
EXPECTED = [Expected(f"t{i}", str(t.dtype).removeprefix("torch."), tuple(t.shape)) for i, t in enumerate(TENSORS)]


def spoiled(index: int, **changes: object) -> list[TensorHead]:
    heads = pack(TENSORS)[1]
    heads[index] = dataclasses.replace(heads[index], **changes)  # type: ignore[arg-type]
    return heads


def test_tensors_come_out_as_they_went_in() -> None:
    buffer, heads = pack(TENSORS)
    assert check_heads(heads, EXPECTED, 1 << 20) == len(buffer)
    for tensor, got in zip(TENSORS, unpack(buffer.clone(), heads, EXPECTED), strict=True):
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)


def test_views_go_like_other_tensors() -> None:
    view = torch.rand(6, 4).t()[1:3]
    buffer, heads = pack([view])
    assert torch.equal(unpack(buffer, heads, [Expected("v", "float32", (2, 6))])[0], view)


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        (spoiled(0, dtype="float16"), "t0 is 'float16', expected float32"),
        (spoiled(0, dtype="object"), "t0 is 'object', expected float32"),
        (spoiled(1, shape=(7, 2)), r"t1 has shape \[7, 2\], expected \[2, 7\]"),
        (spoiled(3, length=24), r"t3 of shape \[5\] has 24 bytes"),
        (pack(TENSORS)[1][:-1], "4 tensors are announced, expected 5"),
    ],
)
def test_what_is_announced_must_be_expected(heads: list[TensorHead], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        check_heads(heads, EXPECTED, 1 << 20)


def test_nobody_can_announce_more_than_the_limit() -> None:
    with pytest.raises(WireError, match="more than 64"):
        check_heads(pack(TENSORS)[1], EXPECTED, 64)


def test_a_changed_byte_is_noticed() -> None:
    buffer, heads = pack(TENSORS)
    buffer[65] ^= 1
    with pytest.raises(WireError, match="t1 has a wrong checksum"):
        unpack(buffer, heads, EXPECTED)


def test_a_value_that_is_not_finite_is_noticed() -> None:
    buffer, heads = pack([torch.tensor([1.0, float("nan")])])
    with pytest.raises(WireError, match="x holds a value that is not finite"):
        unpack(buffer, heads, [Expected("x", "float32", (2,))])


@pytest.mark.parametrize("length", [16, 4096, 4112, 12288])
def test_fold_notices_changes_and_swaps(length: int) -> None:
    data = torch.randint(0, 256, (length,), dtype=torch.uint8)
    expected = int(fold(data))
    words = data.view(torch.int32)

    def changed(index: int, to: Tensor) -> int:
        other = words.clone()
        other[index] = to
        return int(fold(other.view(torch.uint8)))

    assert int(fold(data.clone())) == expected
    last = len(words) - 1
    assert changed(last, words[last] ^ 1) != expected
    assert changed(0, words[0] + 1) != expected
    swapped = words.clone()
    swapped[[0, last]] = words[[last, 0]]
    assert int(fold(swapped.view(torch.uint8))) != expected


@pytest.mark.parametrize("address", ["", "here", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999", ":80"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(WireError):
        reach_store(address)


def both_ends(timeout_s: float) -> tuple[PairGroup, PairGroup]:
    """Two ends in this process."""
    store, address = open_store("127.0.0.1")
    ends: dict[int, PairGroup] = {}

    def join(rank: int) -> None:
        ends[rank] = PairGroup(store if rank == 0 else reach_store(address), rank, "127.0.0.1", CPU, timeout_s)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return ends[0], ends[1]


def test_bytes_go_both_ways() -> None:
    ends = both_ends(5.0)
    for giver, taker in (ends, ends[::-1]):
        sent, got = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8), torch.zeros(1 << 20, dtype=torch.uint8)
        thread = threading.Thread(target=giver.send, args=(sent,))
        thread.start()
        taker.receive(got)
        thread.join(5)
        assert torch.equal(sent, got)


def test_an_end_that_leaves_or_is_silent_is_lost() -> None:
    one, other = both_ends(0.3)
    with pytest.raises(WorkerLost, match="gone or stuck"):
        one.receive(torch.zeros(16, dtype=torch.uint8))
    with pytest.raises(WorkerLost):
        other.send(torch.zeros(16, dtype=torch.uint8))
    one.close()
    with pytest.raises(WorkerLost, match="was closed"):
        one.send(torch.zeros(16, dtype=torch.uint8))


def test_what_nobody_waits_for_is_discarded() -> None:
    go, discarded = threading.Event(), list[int]()

    def work() -> int:
        go.wait(5)
        return 7

    async def test() -> None:
        waiting = asyncio.ensure_future(on_thread(work, discarded.append))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.sleep(0)
        go.set()
        while not discarded:
            await asyncio.sleep(0.001)
        assert await on_thread(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            await on_thread(lambda: 1 // 0)

    asyncio.run(asyncio.wait_for(test(), 5))
    assert discarded == [7]
