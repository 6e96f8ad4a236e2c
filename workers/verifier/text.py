"""Tokens to text, incrementally and exactly, and stop strings in it.

The promise: whatever the rounds in which tokens arrive, the concatenated deltas equal
``tokenizer.decode(all tokens, skip_special_tokens=..., clean_up_tokenization_spaces=False)``, and a stop string ends
the text at the same token. So the result depends on the tokens only, never on how drafting grouped them.

Two ways to text. Byte-level vocabularies (most of today's) map every token to bytes, which go through an incremental
UTF-8 decoder. All others are decoded in a window: one settled token of context, then the tokens that are not settled.
A token that stands for one byte (``<0xE2>``) settles only when a token of another kind follows it, because decoders
of that family turn a whole run of bytes into replacement characters if any part of it is invalid.

Stop strings: the one that is complete first wins; of those completed by the same character the longest. The token
that completed it is kept, as vLLM does, even if its text goes on behind the stop string.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from dspark.sampling import SamplingParams
from dspark.types import Finish, StepOutcome

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one request, token by token.

    ``stop_hit`` is the stop string that ended the text; ``num_tokens_kept`` counts the pushed tokens up to the one
    that completed it (all pushed tokens while there is none). Tokens pushed later are ignored. A stop string that is
    complete before ``min_tokens`` tokens exist is ordinary text. Without a tokenizer the text is always empty.
    """

    def __init__(self, tokenizer: Any, sampling: SamplingParams) -> None:
        self.stop_hit: str | None = None
        self.num_tokens_kept = 0
        self._sampling = sampling
        self._stops = sampling.stop
        self._prefixes = frozenset(stop[:length] for stop in sampling.stop for length in range(1, len(stop)))
        self._longest_prefix = max((len(prefix) for prefix in self._prefixes), default=0)
        self._held = ""  # certain text that could still turn out to begin a stop string
        self._detokeniser = _detokeniser(tokenizer, sampling.skip_special_tokens)

    def push(self, tokens: Sequence[int]) -> str:
        """Take tokens in and return the text that became final."""
        if self.stop_hit is not None:
            return ""
        if not self._stops:
            self.num_tokens_kept += len(tokens)
            return self._detokeniser.feed(tokens)
        released = []
        for token in tokens:  # one by one: a later token must not change whether an earlier one completed a stop string
            self.num_tokens_kept += 1
            self._held += self._detokeniser.feed((token,))
            released.append(self._end_at_stop() or self._release())
            if self.stop_hit is not None:
                break
        return "".join(released)

    def finish(self) -> str:
        """Return the text still held back; no more tokens will come."""
        if self.stop_hit is not None:
            return ""
        text, self._held = self._held + self._detokeniser.tail(), ""
        return text

    def take(self, outcome: StepOutcome) -> str:
        """Push a step's tokens, and finish with its last one.

        The text of an EOS or stop token that ended the request is left out, unless ``include_stop_str_in_output``.
        """
        if outcome.finish is None:
            return self.push(outcome.tokens)
        by_token = outcome.finish is Finish.STOP and not isinstance(outcome.stop_reason, str)
        if by_token and outcome.tokens and not self._sampling.include_stop_str_in_output:
            text = self.push(outcome.tokens[:-1])
            self.num_tokens_kept += self.stop_hit is None
        else:
            text = self.push(outcome.tokens)
        return text + self.finish()

    def _end_at_stop(self) -> str:
        """The last text if a stop string is complete now; sets ``stop_hit``."""
        if self.num_tokens_kept < self._sampling.min_tokens:
            return ""
        text = self._held + self._detokeniser.unsettled()
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return ""
        end, start, self.stop_hit = min(found)
        self._held = ""
        return text[: end if self._sampling.include_stop_str_in_output else start]

    def _release(self) -> str:
        """Certain text, without the end that could begin a stop string; nothing once a stop string was hit."""
        if self.stop_hit is not None:
            return ""
        text = self._held
        longest = min(len(text), self._longest_prefix)
        keep = next((n for n in range(longest, 0, -1) if text[-n:] in self._prefixes), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes one token stands for (``logprobs`` report them); they need not be whole characters."""
    return _vocabulary(tokenizer).bytes_of(token)


class _Detokeniser(Protocol):
    def feed(self, tokens: Sequence[int]) -> str:
        """Text that no later token can change."""

    def unsettled(self) -> str:
        """Whole characters of the fed tokens that a later token could still change."""

    def tail(self) -> str:
        """What is left when no token follows, incomplete characters included."""


class _Nothing:
    """For models without a tokenizer."""

    def feed(self, tokens: Sequence[int]) -> str:
        return ""

    def unsettled(self) -> str:
        return ""

    def tail(self) -> str:
        return ""


class _Bytes:
    """Byte-level vocabularies: tokens are bytes, UTF-8 is decoded as it completes."""

    def __init__(self, vocabulary: _Vocabulary, skip_special: bool) -> None:
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: Sequence[int]) -> str:
        visible = self._vocabulary.visible(tokens, self._skip_special)
        return self._decoder.decode(b"".join(map(self._vocabulary.bytes_of, visible)))

    def unsettled(self) -> str:
        return ""

    def tail(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """Every other vocabulary: decode a short window and report what it has beyond its settled start."""

    def __init__(self, vocabulary: _Vocabulary, skip_special: bool) -> None:
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        self._pending_text = ""

    def feed(self, tokens: Sequence[int]) -> str:
        visible = self._vocabulary.visible(tokens, self._skip_special)
        if not visible:
            return ""
        self._pending += visible
        window = self._context + self._pending
        text = self._decode(window)
        self._pending_text = text[len(self._context_text) :]
        is_settled = text.startswith(self._context_text) and not text.endswith(_REPLACEMENT)
        if not is_settled or self._vocabulary.is_byte(window[-1]):
            return ""
        self._settle(window, text)
        delta, self._pending_text = self._pending_text, ""
        return delta

    def unsettled(self) -> str:
        return self._pending_text.rstrip(_REPLACEMENT)

    def tail(self) -> str:
        text, self._pending_text = self._pending_text, ""
        self._pending = []
        return text

    def _settle(self, window: list[int], text: str) -> None:
        """Keep as context the shortest end of the window that has text.

        It must have text: decoders strip the first space of what they decode, and must find it before the new tokens.
        """
        self._pending = []
        self._context, self._context_text = window, text
        for length in (1, 2, 4, 8):
            end = window[-length:]
            if length < len(window) and not self._vocabulary.is_byte(end[0]) and (end_text := self._decode(end)):
                self._context, self._context_text = end, end_text
                break

    def _decode(self, tokens: list[int]) -> str:
        return self._vocabulary.decode(tokens, self._skip_special)


class _Vocabulary:
    """What a tokenizer says about single tokens, remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend
        if backend is None:
            self._special = frozenset(tokenizer.all_special_ids)
        else:  # the decoder's own rule: special is who carries the content of a special token
            contents = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
            self._special = frozenset(i for i in (backend.token_to_id(content) for content in contents) if i is not None)
        kinds = _decoder_kinds(getattr(backend, "decoder", None))
        self.is_byte_level = bool(kinds) and kinds <= {"ByteLevel", "Fuse"}
        self._spells_bytes = "ByteLevel" in kinds
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, str] = {}

    def visible(self, tokens: Sequence[int], skip_special: bool) -> list[int]:
        """The tokens a decoder sees: not the special ones, and not ids outside the vocabulary (padded heads have them)."""
        return [token for token in tokens if not (skip_special and token in self._special) and self._name(token)]

    def decode(self, tokens: list[int], skip_special: bool) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))

    def is_byte(self, token: int) -> bool:
        """True for tokens such as ``<0x0A>``."""
        return _BYTE_TOKEN.fullmatch(self._name(token)) is not None

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; none for ids outside the vocabulary, which decoders skip."""
        if token not in self._bytes:
            name = self._name(token)
            if self._spells_bytes:
                self._bytes[token] = _byte_level_bytes(name)
            elif match := _BYTE_TOKEN.fullmatch(name):
                self._bytes[token] = bytes.fromhex(match[1])
            else:
                self._bytes[token] = self._text_alone(token).encode()
        return self._bytes[token]

    def _text_alone(self, token: int) -> str:
        """The text of a token behind itself, so that a leading space survives."""
        once, twice = self.decode([token], False), self.decode([token, token], False)
        return twice[len(once) :]

    def _name(self, token: int) -> str:
        """How the vocabulary spells a token; empty for ids outside of it."""
        if token not in self._names:
            self._names[token] = self._look_up(token) or ""
        return self._names[token]

    def _look_up(self, token: int) -> str | None:
        if self._backend is not None:
            name: str | None = self._backend.id_to_token(token)
        else:
            try:
                name = self._tokenizer.convert_ids_to_tokens(token)
            except (IndexError, KeyError):  # what tokenizers without a backend do with unknown ids
                name = None
        return name


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> _Vocabulary:
    return _Vocabulary(tokenizer)


def _detokeniser(tokenizer: Any, skip_special: bool) -> _Detokeniser:
    if tokenizer is None:
        return _Nothing()
    vocabulary = _vocabulary(tokenizer)
    return _Bytes(vocabulary, skip_special) if vocabulary.is_byte_level else _Window(vocabulary, skip_special)


def _decoder_kinds(decoder: Any) -> frozenset[str]:
    """The types of decoders in a backend's decoding chain; none without a backend."""
    if decoder is None:
        return frozenset()
    state = json.loads(decoder.__getstate__())
    return frozenset(part["type"] for part in state.get("decoders", [state]))


def _byte_level_bytes(name: str) -> bytes:
    """Undo the byte-to-character map of byte-level vocabularies; a name outside of the map stands for itself."""
    table = _byte_table()
    if all(character in table for character in name):
        return bytes(table[character] for character in name)
    return name.encode()


@lru_cache(maxsize=1)
def _byte_table() -> dict[str, int]:
    """Printable Latin-1 characters stand for themselves, the other bytes, in order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
