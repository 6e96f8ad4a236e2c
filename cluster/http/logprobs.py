"""Log-probabilities in the shapes of the two OpenAI APIs, and vLLM's ``prompt_logprobs``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from dspark.types import TokenLogprob
from dspark.workers.verifier.text import token_bytes

LOWEST: Final = -9999.0  # JSON has no minus infinity


class TokenTexts:
    """What single tokens look like, remembered: alternatives repeat all the time."""

    def __init__(self, tokenizer: Any) -> None:
        self._bytes = lru_cache(maxsize=65536)(lambda token: b"" if tokenizer is None else token_bytes(tokenizer, token))

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; they need not be whole characters."""
        return self._bytes(token)

    def text_of(self, token: int) -> str:
        """The token as text, with replacement characters for incomplete ones."""
        return self._bytes(token).decode("utf-8", "replace")


def chat_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text_of(token), "logprob": max(logprob, LOWEST), "bytes": list(texts.bytes_of(token))}

    return {"content": [entry(e.token_id, e.logprob) | {"top_logprobs": [entry(*top) for top in e.top]} for e in entries]}


def completion_logprobs(entries: Sequence[TokenLogprob | None], tokens: Sequence[int], texts: TokenTexts, offset: int) -> dict[str, Any]:
    """The ``logprobs`` object of a text completion choice whose text starts at character ``offset``.

    ``entries[i]`` belongs to ``tokens[i]``; None where nothing was predicted (the first prompt token).
    """
    names = [texts.text_of(token) for token in tokens]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    return {
        "tokens": names,
        "token_logprobs": [None if e is None else max(e.logprob, LOWEST) for e in entries],
        "top_logprobs": [None if e is None else {texts.text_of(token): max(p, LOWEST) for token, p in e.top} for e in entries],
        "text_offset": offsets,
    }


def prompt_logprobs(entries: Sequence[TokenLogprob | None], texts: TokenTexts) -> list[dict[str, Any] | None]:
    """Per prompt token: the alternatives and the token itself by id, as vLLM gives them."""
    return [None if entry is None else _by_id(entry, texts) for entry in entries]


def _by_id(entry: TokenLogprob, texts: TokenTexts) -> dict[str, Any]:
    ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top, start=1) if token != entry.token_id]
    ranked.append((entry.token_id, entry.logprob, entry.rank))
    return {str(token): {"logprob": max(p, LOWEST), "rank": rank, "decoded_token": texts.text_of(token)} for token, p, rank in ranked}
