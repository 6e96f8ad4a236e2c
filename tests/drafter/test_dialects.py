"""Checkpoint dialects: folders with tiny random weights load into the module they describe, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.draft_modules import Tables, tiny_eagle3, tiny_head, tiny_module
from safetensors.torch import save_file
from torch import Tensor

from dspark.errors import ConfigError
from dspark.workers.drafter.block_draw import BlockDraft, DrawRows, draw_block
from dspark.workers.drafter.dialects import load_drafter
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.layers import rope_frequencies
from dspark.workers.drafter.module_config import HeadType, LayerMask, LayerStyle
from dspark.workers.drafter.paged_context import DraftPools, PagedContext
from dspark.workers.drafter.saving import save_drafter
from dspark.workers.drafter.target_head import TargetHead

CPU = torch.device("cpu")
Config = dict[str, Any]


def layer_config() -> Config:
    return {
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
    }


def heads_config() -> Config:
    return {"markov_rank": 6, "markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True}


def deepspec() -> Config:
    own = {"architectures": ["Qwen3DSparkModel"], "block_size": 4, "mask_token_id": 29, "target_layer_ids": [0, 2], "num_target_layers": 3}
    return layer_config() | heads_config() | own


def speculators() -> Config:
    layers = layer_config() | {"layer_types": ["full_attention"] * 2}
    own = {"speculators_model_type": "dspark", "architectures": ["DSparkSpeculator"], "block_size": 4, "mask_token_id": 29}
    return own | heads_config() | {"aux_hidden_state_layer_ids": [1, 3], "transformer_layer_config": layers, "sample_from_anchor": True}


def specforge() -> Config:
    nested = {"projector_type": "dspark", "mask_token_id": 29, "target_layer_ids": [0, 2]} | heads_config()
    return layer_config() | {"architectures": ["DSparkDraftModel"], "block_size": 4, "dflash_config": nested}


def write(folder: Path, config: Config, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def load(folder: Path, head: TargetHead | None = None, dtype: torch.dtype = torch.float32) -> DSparkModule:
    return load_drafter(folder, head or tiny_head(), dtype, CPU)


def draft(module: DSparkModule, temperature: float = 0.7) -> BlockDraft:
    tables = Tables()
    pools = DraftPools(module.config, tables.num_blocks, tables.block_size, module.fc.weight.dtype, CPU)
    taps = torch.randn(9, module.fc.weight.shape[1], generator=torch.Generator().manual_seed(4))
    for layer, (k, v) in enumerate(module.context_kv(module.project(taps), torch.arange(9))):
        pools.write(layer, torch.arange(9), k, v)
    anchors, lengths = torch.tensor([3]), torch.tensor([9])
    hidden = module.block_hidden(anchors, lengths, PagedContext(pools, [[0, 1, 2]], [9]))
    rows = DrawRows(torch.tensor([temperature]), torch.tensor([5]), lengths + 1, torch.tensor([False]))
    return draw_block(module, hidden, anchors, rows, 32, None)


def same_drafts(one: DSparkModule, other: DSparkModule) -> None:
    a, b = draft(one), draft(other)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.probs, b.probs)
    assert (a.confidence is None) == (b.confidence is None)
    if a.confidence is not None and b.confidence is not None:
        torch.testing.assert_close(a.confidence, b.confidence)


@pytest.mark.parametrize("make", [deepspec, speculators, specforge])
@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
def test_dialects_load_the_same_module(tmp_path: Path, make: Callable[[], Config], head_type: str) -> None:
    module = tiny_module(head_type=HeadType(head_type))
    config = make()
    config.get("dflash_config", config)["markov_head_type"] = head_type
    loaded = load(write(tmp_path, config, module.state_dict()))
    assert loaded.config.target_layer_ids == (0, 2)
    assert loaded.config.block_size == 4
    same_drafts(loaded, module)


def test_shared_ends_may_be_in_the_file_and_are_not_used(tmp_path: Path) -> None:
    module, head = tiny_module(), tiny_head()
    ends = {"embed_tokens.weight": head.embed + 1, "lm_head.weight": head.lm_head + 1}
    same_drafts(load(write(tmp_path, deepspec(), module.state_dict() | ends)), module)


def test_shards_follow_the_index(tmp_path: Path) -> None:
    module = tiny_module()
    write(tmp_path, deepspec(), {})
    (tmp_path / "model.safetensors").unlink()
    names = sorted(module.state_dict())
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: module.state_dict()[n].clone() for n in names if files[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    same_drafts(load(tmp_path), module)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"part-1\.safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ConfigError, match="elsewhere"):
        load(tmp_path)


@pytest.mark.parametrize(("said", "proposed", "expected"), [(False, 9, False), (None, 3, False), (None, 4, True), (True, 3, True)])
def test_speculators_anchor_conventions(tmp_path: Path, said: bool | None, proposed: int, expected: bool) -> None:
    """Four inputs either way: four drafts when the anchor's slot predicts, three when it does not."""
    config = speculators() | {"sample_from_anchor": said, "speculators_config": {"proposal_methods": [{"speculative_tokens": proposed}]}}
    module = tiny_module(sample_from_anchor=expected, block_size=4 if expected else 3)
    loaded = load(write(tmp_path, config, module.state_dict()))
    assert (loaded.config.num_slots, loaded.config.block_size) == (4, 4 if expected else 3)
    same_drafts(loaded, module)


def test_an_unclear_anchor_convention_is_refused(tmp_path: Path) -> None:
    config = speculators()
    del config["sample_from_anchor"]
    with pytest.raises(ConfigError, match="sample_from_anchor"):
        load(write(tmp_path, config, tiny_module().state_dict()))


@pytest.mark.parametrize("has_own_head", [True, False])
def test_reduced_draft_vocabulary(tmp_path: Path, has_own_head: bool) -> None:
    ids = torch.tensor([1, 2, 5, 9, 10, 11, 20, 31])
    module, head = tiny_module(draft_vocab_size=8), tiny_head()
    own = torch.randn(8, 16) if has_own_head else None
    extra = {"d2t": ids - torch.arange(8), "t2d": torch.zeros(32, dtype=torch.bool).index_fill_(0, ids, True)}
    tensors = module.state_dict() | extra | ({} if own is None else {"lm_head.weight": own})
    loaded = load(write(tmp_path, speculators() | {"draft_vocab_size": 8}, tensors))
    got = draft(loaded)
    assert set(got.ids.flatten().tolist()) == set(ids.tolist())
    module.use_draft_vocabulary(torch.arange(8), head.lm_head[ids] if own is None else own)
    by_draft_id = draft(module)  # the same laws, on draft ids: only the Markov row of the previous token tells them apart
    assert torch.equal(got.ids[0, 0], ids[by_draft_id.ids[0, 0]])
    torch.testing.assert_close(got.probs[0, 0], by_draft_id.probs[0, 0])


@pytest.mark.parametrize(
    ("d2t", "message"), [(None, "d2t"), ([0] * 7, r"\[7\]"), ([0, -1] + [0] * 6, "rising"), ([0] * 7 + [30], "rising")]
)
def test_bad_vocabulary_maps_are_refused(tmp_path: Path, d2t: list[int] | None, message: str) -> None:
    tensors = tiny_module(draft_vocab_size=8).state_dict() | ({} if d2t is None else {"d2t": torch.tensor(d2t)})
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, speculators() | {"draft_vocab_size": 8}, tensors))


def test_windows_of_each_dialect(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    weights = tiny_module().state_dict()
    sliding = {"layer_types": kinds, "sliding_window": 6, "use_sliding_window": True}
    cases: list[tuple[Config, LayerMask]] = [
        (deepspec() | sliding, LayerMask(6)),
        (specforge() | sliding, LayerMask(6, causal=True)),
        (specforge() | sliding | {"is_causal": False}, LayerMask(6)),
        (speculators() | {"transformer_layer_config": layer_config() | sliding}, LayerMask(6, from_anchor=True, causal=True)),
        (
            speculators() | {"transformer_layer_config": layer_config() | sliding, "sliding_window_non_causal": True},
            LayerMask(6, from_anchor=True),
        ),
    ]
    for i, (config, expected) in enumerate(cases):
        assert load(write(tmp_path / str(i), config, weights)).config.layer_masks == (LayerMask(), expected)


def test_gemma4(tmp_path: Path) -> None:
    module = tiny_module(style=LayerStyle.GEMMA4, activation="gelu_pytorch_tanh", keys_are_values=True)
    config = deepspec() | {
        "architectures": ["Gemma4DSparkModel"],
        "head_dim": 4,
        "global_head_dim": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    loaded = load(write(tmp_path / "a", config, module.state_dict()))
    frequencies, scale = rope_frequencies(loaded.config)
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 1e6**-0.25, 0.0, 0.0]))
    assert scale == 1.0
    config["rope_parameters"] = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    same_drafts(load(write(tmp_path / "b", config, module.state_dict())), module)
    with pytest.raises(ConfigError, match="enable_moe_block"):
        load(write(tmp_path / "c", config | {"enable_moe_block": True}, module.state_dict()))


def test_rope_scaling_old_and_new(tmp_path: Path) -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 128}
    old = deepspec() | {"rope_scaling": {"type": "yarn"} | yarn}
    new = deepspec() | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0} | yarn}
    weights = tiny_module().state_dict()
    one, other = load(write(tmp_path / "old", old, weights)), load(write(tmp_path / "new", new, weights))
    (a, scale_a), (b, scale_b) = rope_frequencies(one.config), rope_frequencies(other.config)
    assert torch.equal(a, b)
    assert scale_a == scale_b > 1.0
    assert not torch.allclose(a, rope_frequencies(tiny_module().config)[0])
    with pytest.raises(ConfigError, match="dynamic"):
        load(write(tmp_path / "dyn", deepspec() | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, weights))


def test_plain_dflash_of_speculators(tmp_path: Path) -> None:
    module = tiny_module(
        head_type=HeadType.NONE, markov_rank=0, has_confidence=False, confidence_with_markov=False, sample_from_anchor=False, block_size=3
    )
    config = {k: v for k, v in speculators().items() if k not in heads_config()}
    loaded = load(write(tmp_path, config | {"speculators_model_type": "dflash", "sample_from_anchor": False}, module.state_dict()))
    same_drafts(loaded, module)


def test_disabled_confidence_head_is_not_loaded(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, deepspec() | {"enable_confidence_head": False}, tiny_module().state_dict()))
    assert loaded.confidence_head is None
    assert not loaded.signals.has_head


@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn", "none"])
def test_saved_drafters_load_again(tmp_path: Path, head_type: str) -> None:
    has_head = head_type != "none"
    module = tiny_module(
        head_type=HeadType(head_type),
        markov_rank=6 if has_head else 0,
        confidence_with_markov=has_head,
        layer_masks=(LayerMask(), LayerMask(7)),
        rope={"rope_type": "yarn", "rope_theta": 5000.0, "factor": 2.0, "original_max_position_embeddings": 64},
    )
    save_drafter(tmp_path / "drafter", module)
    loaded = load(tmp_path / "drafter")
    assert loaded.config == module.config
    same_drafts(loaded, module)
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["dflash_config"] == {"target_layer_ids": [0, 2], "mask_token_id": 29}


def test_what_deepspec_cannot_express_is_not_saved(tmp_path: Path) -> None:
    for module in (
        tiny_module(sample_from_anchor=False),  # with a sequential head, which DFlash has not
        tiny_module(layer_masks=(LayerMask(causal=True), LayerMask())),
        tiny_module(style=LayerStyle.GEMMA4, layer_masks=(LayerMask(4), LayerMask())),
        tiny_eagle3(qk_norm=True),
    ):
        with pytest.raises(ConfigError, match="cannot express"):
            save_drafter(tmp_path, module)


def test_saved_gemma4_drafters_load_again(tmp_path: Path) -> None:
    rope = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    module = tiny_module(style=LayerStyle.GEMMA4, activation="gelu_pytorch_tanh", keys_are_values=True, rope=rope)
    save_drafter(tmp_path / "drafter", module)
    loaded = load(tmp_path / "drafter")
    assert loaded.config == module.config
    same_drafts(loaded, module)
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert config["architectures"] == ["Gemma4DSparkModel"]


HEADLESS = {"head_type": HeadType.NONE, "markov_rank": 0, "has_confidence": False, "confidence_with_markov": False}


@pytest.mark.parametrize("window", [None, 7])
def test_saved_dflash_drafters_load_again(tmp_path: Path, window: int | None) -> None:
    module = tiny_module(**HEADLESS, sample_from_anchor=False, layer_masks=(LayerMask(), LayerMask(window)))
    save_drafter(tmp_path / "drafter", module)
    loaded = load(tmp_path / "drafter")
    assert loaded.config == module.config
    same_drafts(loaded, module)
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["block_size"] == 5, "the anchor and four masks"
    assert "markov_rank" not in config


def test_dflash_as_it_is_released(tmp_path: Path) -> None:
    """Flat layer keys, block size with the anchor, the rest under dflash_config; or all of it there."""
    module = tiny_module(**HEADLESS, sample_from_anchor=False)
    nested = {"mask_token_id": 29, "target_layer_ids": [0, 2]}
    old = layer_config() | {"architectures": ["DFlashDraftModel"], "block_size": 5, "num_target_layers": 3, "dflash_config": nested}
    new = layer_config() | {"architectures": ["DFlashDraftModel"], "dflash_config": nested | {"block_size": 5, "num_target_layers": 3}}
    for name, config in (("old", old), ("new", new)):
        loaded = load(write(tmp_path / name, config, module.state_dict()))
        assert loaded.config.block_size == 4
        same_drafts(loaded, module)
    causal = load(write(tmp_path / "causal", old | {"dflash_config": nested | {"causal": True}}, module.state_dict()))
    assert causal.config.layer_masks == (LayerMask(causal=True),) * 2
    with pytest.raises(ConfigError, match="domino"):
        load(write(tmp_path / "other", old | {"dflash_config": nested | {"projector_type": "domino"}}, module.state_dict()))


def test_bf16_weights_keep_fp32_frequencies(tmp_path: Path) -> None:
    module = load(write(tmp_path, deepspec(), tiny_module().state_dict()), dtype=torch.bfloat16)
    assert module.fc.weight.dtype == torch.bfloat16
    exact = load(tmp_path)
    positions = torch.tensor([4095])
    for got, expected in zip(module.rotary(positions, torch.float32), exact.rotary(positions, torch.float32), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("changes", "head", "message"),
    [
        ({"hidden_size": 24}, tiny_head(), "hidden_size is 24, the target's is 16"),
        ({}, tiny_head(hidden_size=24), "hidden_size is 16, the target's is 24"),
        ({}, tiny_head(vocab_size=40), "vocab_size is 32, the target's is 40"),
        ({}, tiny_head(num_layers=5), "num_target_layers is 3, the target's is 5"),
        ({"target_layer_ids": [0, 3]}, tiny_head(), r"layers \[0, 3\], but the target has 3"),
        ({"target_layer_ids": [0, 1, 2]}, tiny_head(), r"fc\.weight is \[16, 32\].* \[16, 48\]"),
        ({"mask_token_id": 32}, tiny_head(), "mask_token_id 32"),
        ({"num_hidden_layers": 3}, tiny_head(), r"lacks the weights layers\.2"),
        ({"num_hidden_layers": 1}, tiny_head(), r"does not call for: layers\.1"),
        ({"markov_head_type": "lstm"}, tiny_head(), "lstm"),
        ({"markov_rank": 0}, tiny_head(), "confidence_head_with_markov"),
        ({"block_size": 0}, tiny_head(), "block_size"),
        ({"mask_token_id": None}, tiny_head(), "mask_token_id"),
        ({"layer_types": ["full_attention", "linear_attention"]}, tiny_head(), "linear_attention"),
        ({"rope_theta": None}, tiny_head(), "rope_theta"),
        ({"architectures": ["LlamaForCausalLM"]}, tiny_head(), "LlamaForCausalLM"),
        ({"architectures": None}, tiny_head(), "None is no drafter"),
        ({"dflash_config": [1]}, tiny_head(), "dflash_config must be an object"),
        ({"dspark_block_size": 5}, tiny_head(), "DeepSeek-V4"),
        ({"speculators_model_type": "peagle"}, tiny_head(), "peagle"),
    ],
)
def test_refusals_name_both_sides(tmp_path: Path, changes: Config, head: TargetHead, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, deepspec() | changes, tiny_module().state_dict()), head)


def test_bundled_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mtp\."):
        load(write(tmp_path, deepspec(), {"mtp.0.weight": torch.zeros(2)}))


def test_foreign_ends_are_refused(tmp_path: Path) -> None:
    tensors = tiny_module().state_dict() | {"lm_head.weight": torch.zeros(40, 16)}
    with pytest.raises(ConfigError, match=r"lm_head\.weight is \[40, 16\], the target needs \[32, 16\]"):
        load(write(tmp_path, deepspec(), tensors))


def test_specforge_variants_are_refused(tmp_path: Path) -> None:
    for key, value in (("projector_type", "domino"), ("attention_mode", "mla")):
        config = specforge()
        config["dflash_config"][key] = value
        with pytest.raises(ConfigError, match=str(value)):
            load(write(tmp_path, config, tiny_module().state_dict()))


def test_folders_that_hold_no_drafter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        load(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="JSON object"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(deepspec()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"no weights.*pytorch_model\.bin is not read"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
