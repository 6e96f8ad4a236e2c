"""Tiny random DSpark modules and block tables for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark.sampling import SamplingParams
from dspark.types import DraftTurn
from dspark.workers.build import target_head
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.module_config import HeadType, LayerMask, ModuleConfig
from dspark.workers.drafter.target_head import TargetHead
from dspark.workers.verifier.targets import Target

TINY = ModuleConfig(
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layer_masks=(LayerMask(), LayerMask()),
    target_layer_ids=(0, 2),
    block_size=4,
    mask_token_id=29,
    vocab_size=32,
    draft_vocab_size=32,
    markov_rank=6,
)


EAGLE3 = {
    "layer_masks": (LayerMask(causal=True),),
    "mask_token_id": 0,
    "head_type": HeadType.NONE,
    "markov_rank": 0,
    "has_confidence": False,
    "confidence_with_markov": False,
    "qk_norm": False,
    "is_autoregressive": True,
}


def tiny_config(**changes: Any) -> ModuleConfig:
    return dataclasses.replace(TINY, **changes)


def tiny_head(hidden_size: int = 16, vocab_size: int = 32, num_layers: int = 3, seed: int = 7) -> TargetHead:
    generator = torch.Generator().manual_seed(seed)
    embed, lm_head = (torch.randn(vocab_size, hidden_size, generator=generator) for _ in range(2))
    return TargetHead(embed, lm_head, hidden_size, vocab_size, num_layers, "llama")


def tiny_module(seed: int = 0, **changes: Any) -> DSparkModule:
    """A module with weights large enough that every part of the equations matters."""
    module = DSparkModule(tiny_config(**changes), tiny_head())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            scale = 0.5 if tensor.dim() == 1 else 1.2 / tensor.shape[-1] ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (tensor.dim() == 1))
    return module.requires_grad_(False).eval()


def tiny_eagle3(seed: int = 0, **changes: Any) -> Eagle3Module:
    """An EAGLE-3 module with weights large enough that every part of the equations matters."""
    module = Eagle3Module(tiny_config(**(EAGLE3 | changes)), tiny_head())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            scale = 0.5 if tensor.dim() == 1 else 1.2 / tensor.shape[-1] ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (tensor.dim() == 1))
    return module.requires_grad_(False).eval()


def weights64(module: DSparkModule | Eagle3Module) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in module.state_dict().items()}


class Tables:
    """Block tables of requests, as the target's pool would hold them."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.blocks: dict[str, list[int]] = {}

    def table(self, request_id: str) -> Sequence[int]:
        return self.blocks[request_id]


def make_turn(
    request_id: str,
    base_len: int,
    tokens: Sequence[int],
    features: Tensor | None,
    feature_start: int = 0,
    max_draft: int = 4,
    sampling: SamplingParams | None = None,
    noise_seed: int = 5,
    max_nodes: int = 0,
) -> DraftTurn:
    greedy = SamplingParams(temperature=0.0)
    return DraftTurn(request_id, base_len, tuple(tokens), feature_start, features, max_draft, sampling or greedy, noise_seed, max_nodes)


def random_module(target: Target, seed: int = 0, **changes: Any) -> DSparkModule | Eagle3Module:
    """A random drafter for a tiny target of ``helpers.families``."""
    shape = {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": target.vocab_size,
        "target_layer_ids": (-1, 1, 3),
    }
    config = tiny_config(**(shape | changes))
    module = Eagle3Module(config, target_head(target)) if config.is_autoregressive else DSparkModule(config, target_head(target))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + (tensor.dim() == 1))
    return module.requires_grad_(False).eval()
