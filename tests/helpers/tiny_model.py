"""A model folder that takes milliseconds to load: a random two-layer Llama with a byte-level tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.draft_modules import random_module
from helpers.toy_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from dspark.workers.drafter.saving import save_drafter
from dspark.workers.verifier.targets import as_target, load_model

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def save_tiny_model(folder: Path, max_len: int = 512) -> Path:
    """Write the model to ``folder``; its text is noise, the same noise every time."""
    torch.manual_seed(0)
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_len,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_drafter(model: Path, folder: Path) -> Path:
    """Write a drafter with random weights for the model in ``model``: its drafts are noise, and hardly ever accepted."""
    target = as_target(load_model(str(model), torch.float32, torch.device("cpu")), "tiny")
    save_drafter(folder, random_module(target, target_layer_ids=(0, 1)))
    return folder
