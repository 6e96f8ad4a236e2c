"""The index of what went where."""

from __future__ import annotations

from collections.abc import Sequence

from dspark.router.prefixes import CHUNK_TOKENS, MAX_CHUNKS, PrefixIndex, chunk_keys, tokens_held

BOTH = ["a", "b"]


def hits(index: PrefixIndex, keys: Sequence[bytes], replica_ids: Sequence[str]) -> dict[str, int]:
    holders = index.holders(keys)
    return {replica_id: held for replica_id in replica_ids if (held := tokens_held(holders, replica_id))}


def test_prefixes_are_found_where_they_went() -> None:
    prompt = list(range(CHUNK_TOKENS * 3 + 5))
    keys = chunk_keys(prompt)
    assert len(keys) == 3
    index = PrefixIndex()
    index.add(keys[:2], "a")
    index.add(keys, "b")
    assert hits(index, keys, BOTH) == {"a": 2 * CHUNK_TOKENS, "b": 3 * CHUNK_TOKENS}
    assert hits(index, keys, ["b", "c"]) == {"b": 3 * CHUNK_TOKENS}
    assert [list(holders) for holders in index.holders(keys)] == [BOTH, BOTH, ["b"]]
    assert hits(index, chunk_keys(prompt, salt="tenant"), BOTH) == {}
    assert index.holders(chunk_keys(prompt, salt="tenant")) == []
    assert hits(index, chunk_keys([9, *prompt[1:]]), BOTH) == {}
    changed = chunk_keys([*prompt[:CHUNK_TOKENS], 0, 0, *prompt[CHUNK_TOKENS + 2 :]])
    assert hits(index, changed, BOTH) == {"a": CHUNK_TOKENS, "b": CHUNK_TOKENS}
    index.forget("b")
    assert hits(index, keys, BOTH) == {"a": 2 * CHUNK_TOKENS}
    assert len(index) == 2


def test_any_prefix_length_is_found() -> None:
    keys = chunk_keys(list(range(CHUNK_TOKENS * 7)))
    index = PrefixIndex()
    names = [f"r{n}" for n in range(8)]
    for n, name in enumerate(names):
        index.add(keys[:n], name)
    assert hits(index, keys, names) == {name: n * CHUNK_TOKENS for n, name in enumerate(names) if n}


def test_the_index_is_bounded_and_forgets_ends_first() -> None:
    index = PrefixIndex(capacity=4)
    first = chunk_keys(list(range(CHUNK_TOKENS * 4)))
    index.add(first, "a")
    index.add(chunk_keys([7] * CHUNK_TOKENS * 2), "a")
    assert len(index) == 4
    assert hits(index, first, BOTH) == {"a": 2 * CHUNK_TOKENS}
    assert len(chunk_keys([0] * CHUNK_TOKENS * (MAX_CHUNKS + 9))) == MAX_CHUNKS
    assert chunk_keys([0] * (CHUNK_TOKENS - 1)) == []
