"""Small tokenizers of every decoding family, made in memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PIECES = ["▁", "▁the", "▁a", "a", "b", "c", "ab", "abc", "bc", "é", "▁é", ".", "\n", "STOP", "ST", "OP", "\N{REPLACEMENT CHARACTER}", "😀"]


def byte_characters() -> list[str]:
    """The 256 characters of byte-level vocabularies."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def byte_level(in_chain: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3, Qwen and SmolLM2; ``in_chain`` as one of several decoders."""
    characters = byte_characters()
    pairs = [("a", "b"), ("Ġ", "a"), ("ab", "c"), ("ð", "Ł"), ("â", "Ĥ"), ("Ŀ", "Ā")]  # some join parts of characters
    vocab = {name: i for i, name in enumerate([*characters, *("".join(pair) for pair in pairs)])}
    backend = Tokenizer(models.BPE(vocab, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("@@", "")]) if in_chain else decoders.ByteLevel()
    return _wrap(backend)


def metaspace(strip: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral (``strip``) and Gemma: byte fallback, spaces written as a block character."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + PIECES
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*chain, decoders.Strip(" ", 1, 0)] if strip else chain)
    return _wrap(backend)


def unigram() -> PreTrainedTokenizerFast:
    """As T5 and XLNet: the Metaspace decoder."""
    backend = Tokenizer(models.Unigram([(name, -1.0) for name in PIECES], 0))
    backend.decoder = decoders.Metaspace()
    return _wrap(backend)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT."""
    names = ["[UNK]", "the", "##re", "a", "##b", ".", "ST", "##OP", "é"]
    backend = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return _wrap(backend)


class Stripping:
    """As tokenizers written in Python: no backend, strips both ends of what it decodes, fails on unknown ids."""

    all_special_ids = (0,)
    names = ("<s>", "▁", "▁the", "a", "b", "<0x0A>", "STOP")

    def __len__(self) -> int:
        return len(self.names)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.names[token]

    def decode(self, tokens: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        visible = [token for token in tokens if token < len(self.names) and not (skip_special_tokens and token == 0)]
        return "".join(self.names[token] for token in visible).replace("▁", " ").replace("<0x0A>", "\n").strip()


@lru_cache(maxsize=1)
def families() -> dict[str, Any]:
    """Every family by name, made once."""
    return {
        "byte_level": byte_level(),
        "byte_level_in_chain": byte_level(in_chain=True),
        "metaspace_strip": metaspace(),
        "metaspace": metaspace(strip=False),
        "unigram": unigram(),
        "word_piece": word_piece(),
        "stripping": Stripping(),
    }
