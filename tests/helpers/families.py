"""Tiny random models of the families that are served, and of some that are refused."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCAB = 160
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 6, "head_dim": 16}
ALTERNATE = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4}
GROUPS = {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
GEMMA4 = {"global_head_dim": 32, "layer_types": ALTERNATE, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}

SERVED: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**BASE)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**BASE, head_dim=16)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**BASE, **EXPERTS, head_dim=16, num_experts=8, norm_topk_prob=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**BASE, sliding_window=6)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**BASE, **WINDOW, query_pre_attn_scalar=16)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**BASE, **WINDOW, layer_types=ALTERNATE, query_pre_attn_scalar=16)),
    "gemma4": lambda: tf.Gemma4ForCausalLM(
        tf.Gemma4TextConfig(
            **BASE,
            **WINDOW,
            **(GEMMA4 | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}),
            vocab_size_per_layer_input=VOCAB,
        )
    ),
    "gemma4_moe": lambda: tf.Gemma4ForCausalLM(
        tf.Gemma4TextConfig(
            **BASE,
            **WINDOW,
            **GEMMA4,
            enable_moe_block=True,
            num_experts=8,
            top_k_experts=2,
            moe_intermediate_size=32,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
        )
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**BASE, **WINDOW, num_local_experts=8, num_experts_per_tok=2, layer_types=ALTERNATE)
    ),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**(BASE | MLA | EXPERTS | GROUPS))),
}

REFUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_next": lambda: tf.Qwen3NextForCausalLM(
        tf.Qwen3NextConfig(
            **BASE,
            **EXPERTS,
            head_dim=16,
            num_experts=8,
            shared_expert_intermediate_size=32,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=["linear_attention", "full_attention"] * 2,
        )
    ),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)),
    "deepseek_v32": lambda: tf.DeepseekV32ForCausalLM(
        tf.DeepseekV32Config(**(BASE | MLA | EXPERTS | GROUPS), index_n_heads=2, index_head_dim=16, index_topk=8)
    ),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **BASE,
            intermediate_size_mlp=96,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=8,
            no_rope_layers=[1, 1, 1, 0],
        )
    ),
}


def make(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny fp32 model whose random weights give logits of a standard deviation near 1."""
    torch.manual_seed(seed)
    model = (SERVED | REFUSED)[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            elif "sinks" in key:
                parameter.normal_(0, 1.0)
    return model
