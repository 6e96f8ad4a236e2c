"""TextStream: deltas add up to decode-all, stop strings do not depend on how tokens are grouped."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.toy_tokenizers import families
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.sampling import SamplingParams
from dspark.types import Finish, StepOutcome
from dspark.workers.verifier.text import TextStream, token_bytes

FAMILIES = sorted(families())


def decode_all(tokenizer: Any, tokens: Sequence[int], skip: bool = True) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def run(tokenizer: Any, rounds: Sequence[Sequence[int]], sampling: SamplingParams) -> tuple[str, TextStream]:
    stream = TextStream(tokenizer, sampling)
    return "".join(stream.push(tokens) for tokens in rounds) + stream.finish(), stream


def split(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    places = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    return [tokens[start:end] for start, end in itertools.pairwise(places)]


def expected_stop(tokenizer: Any, tokens: list[int], sampling: SamplingParams) -> tuple[str, int, str | None]:
    """By the definition: decode every prefix of the tokens; the first that completes a stop string ends the text."""
    for kept in range(max(1, sampling.min_tokens), len(tokens) + 1):
        text = decode_all(tokenizer, tokens[:kept], sampling.skip_special_tokens)
        before = len(decode_all(tokenizer, tokens[: sampling.min_tokens - 1], sampling.skip_special_tokens)) if sampling.min_tokens else 0
        ends = []
        for stop in sampling.stop:
            start = text.find(stop, max(0, before - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if ends:
            end, start, stop = min(ends)
            return text[: end if sampling.include_stop_str_in_output else start], kept, stop
    return decode_all(tokenizer, tokens, sampling.skip_special_tokens), len(tokens), None


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_decode_all(family: str, data: st.DataObject) -> None:
    tokenizer = families()[family]
    ids = st.integers(0, len(tokenizer) + 2)  # two ids outside the vocabulary: padded heads can yield them
    tokens = data.draw(st.lists(ids, max_size=24))
    skip = data.draw(st.booleans())
    rounds = split(tokens, data.draw(st.lists(st.integers(0, 24), max_size=6)))
    text, stream = run(tokenizer, rounds, SamplingParams(skip_special_tokens=skip))
    assert text == decode_all(tokenizer, tokens, skip)
    assert stream.num_tokens_kept == len(tokens)


@pytest.mark.parametrize("family", ["byte_level", "byte_level_in_chain", "metaspace_strip", "metaspace", "unigram"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stop_strings_by_definition_and_for_any_grouping(family: str, data: st.DataObject) -> None:
    tokenizer = families()[family]
    pool = [i for i in range(len(tokenizer)) if token_bytes(tokenizer, i).strip(b"abc.STOP\n ") == b""]
    tokens = data.draw(st.lists(st.sampled_from(pool), max_size=20))
    sampling = SamplingParams(
        stop=tuple(data.draw(st.lists(st.text("abcSTOP \n.", min_size=1, max_size=4), min_size=1, max_size=3))),
        include_stop_str_in_output=data.draw(st.booleans()),
    )
    want = expected_stop(tokenizer, tokens, sampling)
    for cuts in ([], list(range(20)), data.draw(st.lists(st.integers(0, 20), max_size=4))):
        text, stream = run(tokenizer, split(tokens, cuts), sampling)
        assert (text, stream.num_tokens_kept, stream.stop_hit) == want


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "ab", "Ġa"]), max_size=12), st.integers(0, 12), st.lists(st.integers(0, 12), max_size=4))
def test_min_tokens_keeps_early_stop_strings_as_text(names: list[str], min_tokens: int, cuts: list[int]) -> None:
    tokenizer = families()["byte_level"]
    tokens = [tokenizer.convert_tokens_to_ids(name) for name in names]
    sampling = SamplingParams(stop=("ab", "a a"), min_tokens=min_tokens, max_tokens=64)
    text, stream = run(tokenizer, split(tokens, cuts), sampling)
    assert (text, stream.num_tokens_kept, stream.stop_hit) == expected_stop(tokenizer, tokens, sampling)


def byte_ids(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.convert_tokens_to_ids("<0x00>") is not None:
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    return [next(i for i in range(256) if token_bytes(tokenizer, i) == bytes([byte])) for byte in text.encode()]


@pytest.mark.parametrize("family", ["byte_level", "byte_level_in_chain"])
def test_characters_appear_when_their_last_byte_arrives(family: str) -> None:
    tokenizer = families()[family]
    stream = TextStream(tokenizer, SamplingParams())
    deltas = [stream.push([token]) for token in byte_ids(tokenizer, "é😀x")]
    assert deltas == ["", "é", "", "", "", "😀", "x"]


def test_bytes_of_a_fallback_run_wait_for_the_token_behind_it() -> None:
    """Because one invalid byte turns the whole run into replacement characters."""
    tokenizer = families()["metaspace"]
    smile = byte_ids(tokenizer, "😀")
    valid = TextStream(tokenizer, SamplingParams())
    assert [valid.push([token]) for token in [*smile, tokenizer.convert_tokens_to_ids("a")]] == ["", "", "", "", "😀a"]
    broken = TextStream(tokenizer, SamplingParams())
    assert broken.push(smile) == ""
    assert broken.push([tokenizer.convert_tokens_to_ids("<0xFF>"), tokenizer.convert_tokens_to_ids("a")]) == "�����a"


def test_a_stop_string_ends_an_open_run_of_bytes_at_once() -> None:
    tokenizer = families()["metaspace"]
    newline, bad = (tokenizer.convert_tokens_to_ids(name) for name in ("<0x0A>", "<0xFF>"))
    for rounds in ([[newline, bad]], [[newline], [bad]]):
        text, stream = run(tokenizer, rounds, SamplingParams(stop=("\n",)))
        assert (text, stream.stop_hit, stream.num_tokens_kept) == ("", "\n", 1)


def test_text_that_could_begin_a_stop_string_is_held_back() -> None:
    tokenizer = families()["metaspace"]
    stream = TextStream(tokenizer, SamplingParams(stop=("STOP",)))
    ids = [tokenizer.convert_tokens_to_ids(name) for name in ("a", "ST", "b", "ST", "OP", "a")]
    assert [stream.push([token]) for token in ids] == ["a", "", "STb", "", "", ""]
    assert (stream.stop_hit, stream.num_tokens_kept, stream.finish()) == ("STOP", 5, "")


def test_held_text_is_flushed_at_the_end_once() -> None:
    tokenizer = families()["metaspace"]
    stream = TextStream(tokenizer, SamplingParams(stop=("STOP",)))
    assert stream.push([tokenizer.convert_tokens_to_ids("ST")]) == ""
    assert stream.finish() == "ST"
    assert stream.finish() == ""


@pytest.mark.parametrize(
    ("stops", "text"),
    [(("bc", "abcd"), "xa"), (("abcd", "bcd"), "x"), (("d", "cd"), "xab")],
    ids=["complete first wins", "longest of the same end", "longest of the same end, other order"],
)
def test_which_of_several_stop_strings_wins(stops: tuple[str, ...], text: str) -> None:
    tokenizer = families()["byte_level"]
    tokens = byte_ids(tokenizer, "xabcde")
    for rounds in ([tokens], [[token] for token in tokens]):
        assert run(tokenizer, rounds, SamplingParams(stop=stops))[0] == text


def outcome(tokens: Sequence[int], finish: Finish | None = None, stop_reason: str | int | None = None) -> StepOutcome:
    return StepOutcome("r", 0, tuple(tokens), 0, finish=finish, stop_reason=stop_reason)


@pytest.mark.parametrize(
    ("finish", "reason", "include", "text"),
    [
        (Finish.STOP, 97, False, "x"),
        (Finish.STOP, None, False, "x"),
        (Finish.STOP, 97, True, "xa"),
        (Finish.LENGTH, None, False, "xa"),
        (Finish.STOP, "zz", False, "xa"),
    ],
    ids=["stop token", "eos", "included", "length", "stop string found by the engine"],
)
def test_take_leaves_out_the_stop_token(finish: Finish, reason: str | int | None, include: bool, text: str) -> None:
    tokenizer = families()["byte_level"]
    stream = TextStream(tokenizer, SamplingParams(include_stop_str_in_output=include))
    assert stream.take(outcome(byte_ids(tokenizer, "xa"), finish, reason)) == text
    assert stream.num_tokens_kept == 2


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, SamplingParams())
    assert stream.push([1, 2]) + stream.finish() == ""
    assert stream.num_tokens_kept == 2


@pytest.mark.parametrize("family", ["byte_level", "metaspace_strip"])
def test_cost_of_a_push_does_not_grow(family: str) -> None:
    """Counts decoded tokens instead of measuring time."""
    tokenizer = families()[family]
    space = tokenizer.convert_tokens_to_ids("▁") if family == "metaspace_strip" else 5
    seen: list[int] = []

    class Counting:
        backend_tokenizer = tokenizer.backend_tokenizer

        def decode(self, tokens: list[int], **options: Any) -> Any:
            seen.append(len(tokens))
            return tokenizer.decode(tokens, **options)

    stream = TextStream(Counting(), SamplingParams())
    text = "".join(stream.push([space]) for _ in range(500)) + stream.finish()
    assert text == decode_all(tokenizer, [space] * 500)
    assert max(seen, default=0) <= 10


def test_token_bytes_joins_to_the_text() -> None:
    for family in ("byte_level", "metaspace"):
        tokenizer = families()[family]
        tokens = byte_ids(tokenizer, "é😀")
        assert b"".join(token_bytes(tokenizer, token) for token in tokens).decode() == "é😀"
    metaspace = families()["metaspace_strip"]
    assert token_bytes(metaspace, metaspace.convert_tokens_to_ids("▁the")) == b" the"
