"""A tiny random model in a folder, and an LLM around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.toy_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from dspark import LLM

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, a byte-level tokenizer, a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,  # padded heads have ids without a token
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[LLM]:
    """Drafts n-grams; fp32, so that tokens do not depend on the batch."""
    with LLM(str(tiny_folder), drafter="ngram", dtype="float32", kv_tokens=2048, profile=False, max_num_seqs=8) as llm:
        yield llm
