"""Fused layers of few tokens, whose norms and gates are part of the products: the same function as the layers of many tokens."""

from __future__ import annotations

import pytest
import torch
from helpers.engines import tiny_target

from dspark.kernels.paged_attention import AttentionRow
from dspark.kernels.ragged_attention import RaggedBatch
from dspark.workers.verifier.attention import KVStore, RaggedStep
from dspark.workers.verifier.fused import FusedLayer, fuse


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_few_rows_compute_what_many_do(family: str) -> None:
    target = tiny_target(family)
    assert fuse(target)
    layer = target.decoder_layers()[1]
    assert isinstance(layer, FusedLayer)
    assert layer.is_whole
    torch.manual_seed(0)
    hidden = torch.randn(5, target.hidden_size)
    positions = torch.arange(3, 8)
    rotary = target.model.model.rotary_emb(hidden.unsqueeze(0), positions.unsqueeze(0))  # type: ignore[union-attr]
    outputs, stores = [], []
    for few in (False, True):
        store = KVStore(target.layers, 2, 16, torch.empty(0))
        step = RaggedStep(store, RaggedBatch.plan([AttentionRow(0, 5, 8, [1])], 16, torch.device("cpu")), positions + 16)
        with torch.inference_mode():
            out = layer.few_rows(hidden, rotary, step) if few else layer(hidden.unsqueeze(0), position_embeddings=rotary, step=step)[0]
        outputs.append(out)
        stores.append(store)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stores[0].keys[1], stores[1].keys[1])
    assert bool(stores[0].keys[1].any())
