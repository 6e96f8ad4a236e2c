"""The block pool against random use, and what the prefix cache may share."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.workers.blocks import BlockPool, chain_hash, root_hash


def hashes(tokens: list[int], size: int, salt: str = "") -> list[bytes]:
    found, parent = [], root_hash(salt)
    for i in range(len(tokens) // size):
        parent = chain_hash(parent, tokens[i * size : (i + 1) * size])
        found.append(parent)
    return found


def test_prefix_hits_share_blocks_and_survive_their_owner() -> None:
    pool = BlockPool(8, 4)
    tokens = list(range(10))
    assert pool.open("a", hashes(tokens, 4)) == 0
    assert pool.grow("a", 10)
    for i, digest in enumerate(hashes(tokens, 4)):
        pool.register("a", i, digest)
    first = list(pool.table("a"))
    assert pool.open("b", hashes(tokens, 4)) == 2
    assert list(pool.table("b")) == first[:2]
    pool.release("a")
    pool.check()
    assert pool.num_free == 6
    pool.release("b")
    assert pool.num_free == 8
    assert pool.open("c", hashes(tokens, 4)) == 2
    pool.check()


def test_salt_and_prefix_separate_blocks() -> None:
    tokens = list(range(8))
    assert not set(hashes(tokens, 4)) & set(hashes(tokens, 4, salt="tenant"))
    assert hashes([9, 1, 2, 3, *tokens[4:]], 4)[1] != hashes(tokens, 4)[1], "the second block's hash covers the first"


def test_grow_is_all_or_nothing_and_evicts_the_oldest() -> None:
    pool = BlockPool(4, 4)
    for name, start in (("a", 0), ("b", 100)):
        tokens = list(range(start, start + 4))
        pool.open(name, [])
        assert pool.grow(name, 4)
        pool.register(name, 0, hashes(tokens, 4)[0])
    pool.release("a")
    pool.release("b")
    pool.open("c", [])
    assert not pool.grow("c", 17)
    assert list(pool.table("c")) == []
    assert pool.grow("c", 12), "two clean blocks and the least recently used cached one"
    assert pool.count_hits(hashes(list(range(4)), 4)) == 0
    assert pool.count_hits(hashes(list(range(100, 104)), 4)) == 1
    pool.check()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 30), st.integers(0, 2)), max_size=60))
def test_invariants_hold_under_random_use(actions: list[tuple[int, int, int, int]]) -> None:
    pool = BlockPool(9, 4)
    known: dict[str, list[int]] = {}
    for action, who, count, family in actions:
        name = str(who)
        if name not in known:
            known[name] = [family * 1000 + i for i in range(count)]
            pool.open(name, hashes(known[name], 4))
        elif action == 0:
            pool.release(name)
            del known[name]
        elif action == 1:
            pool.shrink(name, count)
        elif action == 2 and count >= 28:
            pool.clear_cache()
        elif pool.grow(name, len(known[name])):
            for i, digest in enumerate(hashes(known[name], 4)):
                pool.register(name, i, digest)
        pool.check()
