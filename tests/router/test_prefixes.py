"""The index of what went where."""

from __future__ import annotations

from dspark.router.prefixes import CHUNK_TOKENS, MAX_CHUNKS, PrefixIndex, chunk_keys

BOTH = ["a", "b"]


def test_prefixes_are_found_where_they_went() -> None:
    prompt = list(range(CHUNK_TOKENS * 3 + 5))
    keys = chunk_keys(prompt)
    assert len(keys) == 3
    index = PrefixIndex()
    index.add(keys[:2], "a")
    index.add(keys, "b")
    assert index.hits(keys, BOTH) == {"a": 2 * CHUNK_TOKENS, "b": 3 * CHUNK_TOKENS}
    assert index.hits(keys, ["b", "c"]) == {"b": 3 * CHUNK_TOKENS}
    assert list(index.longest(keys)) == ["b"]
    assert list(index.longest(keys[:1])) == BOTH
    assert index.hits(chunk_keys(prompt, salt="tenant"), BOTH) == {}
    assert list(index.longest(chunk_keys(prompt, salt="tenant"))) == []
    assert index.hits(chunk_keys([9, *prompt[1:]]), BOTH) == {}
    changed = chunk_keys([*prompt[:CHUNK_TOKENS], 0, 0, *prompt[CHUNK_TOKENS + 2 :]])
    assert index.hits(changed, BOTH) == {"a": CHUNK_TOKENS, "b": CHUNK_TOKENS}
    index.forget("b")
    assert index.hits(keys, BOTH) == {"a": 2 * CHUNK_TOKENS}
    assert len(index) == 2


def test_a_gap_ends_a_hit() -> None:
    keys = chunk_keys(list(range(CHUNK_TOKENS * 3)))
    index = PrefixIndex()
    index.add(keys, "a")
    index.add([keys[0], keys[2]], "b")
    assert index.hits(keys, BOTH) == {"a": 3 * CHUNK_TOKENS, "b": CHUNK_TOKENS}


def test_the_index_is_bounded_and_forgets_ends_first() -> None:
    index = PrefixIndex(capacity=4)
    first = chunk_keys(list(range(CHUNK_TOKENS * 4)))
    index.add(first, "a")
    index.add(chunk_keys([7] * CHUNK_TOKENS * 2), "a")
    assert len(index) == 4
    assert index.hits(first, BOTH) == {"a": 2 * CHUNK_TOKENS}
    assert len(chunk_keys([0] * CHUNK_TOKENS * (MAX_CHUNKS + 9))) == MAX_CHUNKS
    assert chunk_keys([0] * (CHUNK_TOKENS - 1)) == []
