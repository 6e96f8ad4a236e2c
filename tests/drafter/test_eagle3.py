"""EAGLE-3: the module against its equations written down naively, its checkpoints, and drafts that depend on the text alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.draft_modules import Tables, make_turn, tiny_eagle3, tiny_head, weights64
from helpers.dspark_equations import heads_of, mlp, rms, rope
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark.errors import ConfigError
from dspark.sampling import SamplingParams
from dspark.types import DraftTree
from dspark.workers.drafter.dialects import load_drafter
from dspark.workers.drafter.eagle3_local import Eagle3Drafter
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.graft import graft
from dspark.workers.drafter.saving import save_drafter

CPU = torch.device("cpu")
VOCAB = 32
GREEDY, RATIO, COUPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8), SamplingParams(temperature=0.8, seed=11)
TOKENS = [int(t) for t in torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1))]
TAPS = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))


# --- the equations -------------------------------------------------------------------------------------------------------


def naive_laws(module: Eagle3Module, base_len: int, drafted: Sequence[int], temperature: float) -> list[Tensor]:
    """Laws of the drafts, one entry, head and position at a time, in fp64, given the tokens drafted."""
    w, config = weights64(module), module.config
    embed, lm_head = tiny_head().embed.double(), module.draft_lm_head.double()
    features = [w["fc.weight"] @ tap.double() for tap in TAPS[: base_len - 1]]
    text = [*TOKENS[:base_len], *drafted]
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    laws = []
    for position in range(1, base_len + len(drafted)):
        feature = features[position - 1]
        out = entry(w, config, embed[text[position]], feature, position, keys, values)
        if position >= base_len - 1:
            features.append(out)  # fed back
            laws.append(torch.softmax(lm_head @ rms(out, w["norm.weight"], config.rms_norm_eps) / temperature, dim=0))
    return laws[: len(drafted)]


def entry(
    w: Mapping[str, Tensor],
    config: Any,
    token: Tensor,
    feature: Tensor,
    position: int,
    keys: list[list[Tensor]],
    values: list[list[Tensor]],
) -> Tensor:
    p, eps, dim = "midlayer.", config.rms_norm_eps, config.head_dim
    normed = rms(feature, w[p + "hidden_norm.weight"], eps)
    pair = torch.cat([rms(token, w[p + "input_layernorm.weight"], eps), normed])
    rotated = {name: [rope(h, position, 10000.0) for h in heads_of(w[f"{p}self_attn.{name}_proj.weight"] @ pair, dim)] for name in "qk"}
    keys.append(rotated["k"])
    values.append(heads_of(w[p + "self_attn.v_proj.weight"] @ pair, dim))
    outs = []
    for head, q in enumerate(rotated["q"]):
        g = head // (config.num_heads // config.num_kv_heads)
        weights = torch.softmax(torch.stack([q @ k[g] / math.sqrt(dim) for k in keys]), dim=0)
        outs.append(sum(weight * v[g] for weight, v in zip(weights, values, strict=True)))
    x = (normed if config.norm_before_residual else feature) + w[p + "self_attn.o_proj.weight"] @ torch.cat(outs)
    return x + mlp(rms(x, w[p + "post_attention_layernorm.weight"], eps), w, p + "mlp.", gemma=False)


@pytest.mark.parametrize("before_residual", [False, True])
@pytest.mark.parametrize("base_len", [2, 5, 22])
def test_laws_equal_the_equations(base_len: int, before_residual: bool) -> None:
    module = tiny_eagle3(norm_before_residual=before_residual)
    tree = one_shot(module, base_len, RATIO)
    assert tree.law is not None
    for k, law in enumerate(naive_laws(module, base_len, tree.tokens, RATIO.temperature)):
        got = torch.zeros(VOCAB).index_add_(0, tree.law.ids[k], tree.law.probs[k])
        torch.testing.assert_close(got.double(), law, atol=2e-5, rtol=0)


# --- context reaches the pools in many ways, the drafts stay -------------------------------------------------------------


def drafter_with(module: Eagle3Module, **blocks: Sequence[int]) -> Eagle3Drafter:
    tables = Tables()
    tables.blocks = {request_id: list(ids) for request_id, ids in blocks.items()}
    drafter = graft(module, tables, VOCAB)
    assert isinstance(drafter, Eagle3Drafter)
    return drafter


def feed(drafter: Eagle3Drafter, request_id: str, base_len: int, start: int = 0, known: int = 0, **changes: Any) -> None:
    """One turn: tokens ``known .. base_len``, features of positions ``start .. base_len - 1``."""
    features = drafter.project(TAPS[start : base_len - 1])
    drafter.propose([make_turn(request_id, base_len, TOKENS[known:base_len], features, start, **changes)])


def one_shot(module: Eagle3Module, base_len: int, sampling: SamplingParams = GREEDY) -> DraftTree:
    drafter = drafter_with(module, r=range(16))
    feed(drafter, "r", base_len, sampling=sampling)
    return drafter.collect({"r": 4}, 0.0)["r"]


def same(one: DraftTree, other: DraftTree) -> None:
    assert (one.base_len, one.tokens) == (other.base_len, other.tokens)
    assert (one.law is None) == (other.law is None)
    if one.law is not None and other.law is not None:
        assert torch.equal(one.law.ids, other.law.ids)
        torch.testing.assert_close(one.law.probs, other.law.probs)


@pytest.mark.parametrize("sampling", [GREEDY, RATIO, COUPLED])
def test_feeding_in_pieces_equals_one_shot(sampling: SamplingParams) -> None:
    module = tiny_eagle3()
    drafter = drafter_with(module, r=[63, 0, 17, 5, 40, 2])
    for start, stop in ((0, 5), (5, 6), (6, 14)):  # prefill chunks: all tokens are known at once, features come bit by bit
        tokens = TOKENS[:15] if start == 0 else []
        drafter.propose([make_turn("r", 15, tokens, drafter.project(TAPS[start:stop]), start, max_draft=0, sampling=sampling)])
        assert drafter.collect({"r": 4}, 0.0) == {}
    for before, base_len in ((15, 16), (16, 18), (18, 21)):
        feed(drafter, "r", base_len, start=before - 1, known=before, sampling=sampling)
        same(drafter.collect({"r": 4}, 0.0)["r"], one_shot(module, base_len, sampling))


@pytest.mark.parametrize("base_len", [9, 10, 14])
def test_a_prefix_hit_needs_no_features_of_the_prefix(base_len: int) -> None:
    """Two blocks of four are shared; at 9 known tokens nothing but the anchor is left to compute."""
    module = tiny_eagle3()
    drafter = drafter_with(module, first=[9, 8, 7, 6], second=[9, 8, 30, 31])
    feed(drafter, "first", 14, max_draft=0)
    drafter.close(["first"])
    feed(drafter, "second", base_len, start=8)
    same(drafter.collect({"second": 4}, 0.0)["second"], one_shot(module, base_len))


def test_a_preempted_request_goes_on() -> None:
    module = tiny_eagle3()
    drafter = drafter_with(module, r=[1, 2, 3, 4])
    feed(drafter, "r", 13)
    before = drafter.collect({"r": 4}, 0.0)["r"]
    drafter._tables.blocks.update(other=[1, 2, 3, 4], r=[10, 11, 12, 13])  # type: ignore[attr-defined]
    drafter.propose([make_turn("other", 13, TOKENS[:13], drafter.project(torch.randn(12, 32)))])
    drafter.propose([make_turn("r", 13, [], drafter.project(TAPS[:7]), 0, max_draft=0)])
    drafter.propose([make_turn("r", 13, [], drafter.project(TAPS[7:12]), 7)])
    same(drafter.collect({"r": 4}, 0.0)["r"], before)


def test_requests_of_a_batch_do_not_see_each_other() -> None:
    module = tiny_eagle3()
    drafter = drafter_with(module, a=[1, 2, 3, 4, 5, 6], b=[10], c=[20, 21, 22])
    for request_id, base_len, sampling in (("a", 22, GREEDY), ("b", 2, COUPLED), ("c", 9, RATIO)):
        feed(drafter, request_id, base_len, sampling=sampling)
    trees = drafter.collect({"a": 4, "b": 4, "c": 4}, 0.0)
    same(trees["a"], one_shot(module, 22))
    same(trees["b"], one_shot(module, 2, COUPLED))
    same(trees["c"], one_shot(module, 9, RATIO))


def test_features_of_rejected_drafts_are_forgotten() -> None:
    module = tiny_eagle3()
    drafter = drafter_with(module, r=range(16))
    features = drafter.project(torch.cat([TAPS[:11], torch.randn(4, 32)]))
    drafter.propose([make_turn("r", 12, TOKENS[:12], features)])
    same(drafter.collect({"r": 4}, 0.0)["r"], one_shot(module, 12))
    feed(drafter, "r", 14, start=11, known=12)
    same(drafter.collect({"r": 4}, 0.0)["r"], one_shot(module, 14))


def test_a_text_of_one_token_has_no_feature_to_draft_from() -> None:
    drafter = drafter_with(tiny_eagle3(), r=range(16))
    feed(drafter, "r", 1)
    assert drafter.collect({"r": 4}, 0.0) == {}
    feed(drafter, "r", 2, start=0, known=1)
    assert len(drafter.collect({"r": 4}, 0.0)["r"].tokens) == 4


def test_a_missing_turn_stops_drafting_until_the_request_starts_over() -> None:
    drafter = drafter_with(tiny_eagle3(), r=range(16))
    feed(drafter, "r", 10)
    drafter.propose([make_turn("r", 13, TOKENS[12:13], None)])
    assert drafter.collect({"r": 4}, 0.0) == {}
    feed(drafter, "r", 13)
    same(drafter.collect({"r": 4}, 0.0)["r"], one_shot(tiny_eagle3(), 13))
    drafter.close(["r"])
    assert not drafter._texts


# --- checkpoints ----------------------------------------------------------------------------------------------------------


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def load(folder: Path) -> Eagle3Module:
    module = load_drafter(folder, tiny_head(), torch.float32, CPU)
    assert isinstance(module, Eagle3Module)
    return module


def eagle(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    own = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1, "block_size": 4}
    nested = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2], "use_aux_hidden_state": True}}
    return (
        sizes | own | nested | {"vocab_size": 32, "draft_vocab_size": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768} | changes
    )


def with_head(module: Eagle3Module) -> dict[str, Tensor]:
    return {**module.state_dict(), "lm_head.weight": module.draft_lm_head}


def test_the_same_module_in_three_dialects(tmp_path: Path) -> None:
    module = tiny_eagle3()
    plain = write(tmp_path / "eagle", eagle(), with_head(module))
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in with_head(module).items()}
    layers = {key: value for key, value in eagle().items() if key not in ("eagle_config", "architectures", "block_size")}
    proposals = {"proposal_methods": [{"speculative_tokens": 4}]}
    speculators = write(
        tmp_path / "speculators",
        {
            "speculators_model_type": "eagle3",
            "architectures": ["Eagle3Speculator"],
            "draft_vocab_size": 32,
            "norm_before_residual": False,
            "eagle_aux_hidden_state_layer_ids": [1, 3],
            "transformer_layer_config": layers | {"rope_theta": 10000.0},
            "speculators_config": proposals,
        },
        renamed,
    )
    for folder in (plain, speculators):
        loaded = load(folder)
        assert loaded.config == module.config
        same(one_shot(loaded, 12, RATIO), one_shot(module, 12, RATIO))
    normed = tiny_eagle3(qk_norm=True)
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in with_head(normed).items()}
    deepspec = eagle(architectures=["Qwen3Eagle3Model"], target_layer_ids=[0, 2], ttt_length=4, model_type="qwen3", rope_theta=10000.0)
    del deepspec["eagle_config"], deepspec["block_size"]
    loaded = load(write(tmp_path / "deepspec", deepspec, tensors | {"embed_tokens.weight": tiny_head().embed}))
    assert loaded.config == normed.config
    same(one_shot(loaded, 12, RATIO), one_shot(normed, 12, RATIO))


def test_a_reduced_vocabulary_with_an_own_head(tmp_path: Path) -> None:
    ids = torch.tensor([1, 2, 5, 9, 10, 11, 20, 31])
    own = torch.randn(8, 16, generator=torch.Generator().manual_seed(4))
    extra = {"lm_head.weight": own, "d2t": ids - torch.arange(8), "t2d": torch.zeros(32, dtype=torch.bool).index_fill_(0, ids, True)}
    module = load(write(tmp_path, eagle(draft_vocab_size=8), {**tiny_eagle3().state_dict(), **extra}))
    tree = one_shot(module, 12, RATIO)
    assert tree.law is not None
    assert set(tree.law.ids.flatten().tolist()) == set(ids.tolist())
    for k, law in enumerate(naive_laws(module, 12, tree.tokens[:1], RATIO.temperature)):
        got = torch.zeros(VOCAB).index_add_(0, tree.law.ids[k], tree.law.probs[k])
        torch.testing.assert_close(got[ids].double(), law, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [None, 8])
def test_saved_drafters_load_again(tmp_path: Path, size: int | None) -> None:
    module = tiny_eagle3()
    ids = None if size is None else torch.tensor([1, 2, 5, 9, 10, 11, 20, 31])
    module.use_draft_vocabulary(ids, None)
    save_drafter(tmp_path / "drafter", module)
    loaded = load(tmp_path / "drafter")
    assert loaded.draft_target_ids is None if ids is None else torch.equal(loaded.draft_target_ids, ids)
    same(one_shot(loaded, 12, RATIO), one_shot(module, 12, RATIO))
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3], "vLLM counts layers"
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2]
    tensors = load_file(tmp_path / "drafter" / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (size or VOCAB, 16)
    assert int(tensors["t2d"].sum()) == (size or VOCAB)


def test_taps_and_steps_that_a_checkpoint_leaves_open(tmp_path: Path) -> None:
    config = eagle()
    del config["eagle_config"], config["block_size"]
    head = tiny_head(num_layers=12)
    tensors = {**with_head(tiny_eagle3()), "fc.weight": torch.randn(16, 48)}
    module = load_drafter(write(tmp_path, config, tensors), head, torch.float32, CPU)
    assert module.config.target_layer_ids == (1, 5, 8)
    assert module.config.block_size == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "one layer"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 2]}, r"\[-1, 1\].*|taps the outputs"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({"norm_before_fc": True}, "norm_before_fc"),
        ({"hidden_size": 24}, "hidden_size is 24"),
        ({"draft_vocab_size": 40}, "over vocab_size"),
        ({"draft_vocab_size": 8}, "d2t|lm_head"),
        ({"block_size": 0}, "block_size"),
        ({"target_layer_ids": [0, 7], "eagle_config": None}, r"\[0, 7\]"),
        ({"speculators_model_type": "eagle3"}, "norm_before_residual is missing"),
        ({"architectures": ["Gemma4Eagle3Model"]}, "Gemma4Eagle3Model"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, eagle(**changes), with_head(tiny_eagle3())))
