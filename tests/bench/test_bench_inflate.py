"""An inflated model computes what its source does, and so does its drafter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import greedy, make_engine, run
from helpers.tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM

from dspark import LLM, SamplingParams
from dspark.bench.cli import main
from dspark.bench.inflate import InflatePlan, inflate
from dspark.bench.prompt_sets import DEFAULT_FOLDER, load_set
from dspark.bench.widen import Places, Shape
from dspark.errors import ConfigError
from dspark.workers.blocks import BlockPool
from dspark.workers.build import target_head
from dspark.workers.drafter.dialects import load_drafter
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.module_config import LayerMask, ModuleConfig
from dspark.workers.drafter.saving import save_drafter
from dspark.workers.verifier.targets import Target, as_target, load_model

CPU = torch.device("cpu")
SIZES = {"hidden": 192, "intermediate": 288, "layers": 5, "heads": 12, "kv-heads": 4, "head-dim": 32}
FLAGS = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


def open_target(folder: Path) -> Target:
    return as_target(load_model(str(folder), torch.float32, CPU), folder.name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model (2 layers of 4 heads of 16, 2 KV heads) whose RMSNorm weights and eps matter."""
    folder = save_tiny_model(tmp_path_factory.mktemp("source"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
    model.config.rms_norm_eps = 1e-2
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drafter(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random drafter for it, with norms of heads and a confidence head."""
    folder = tmp_path_factory.mktemp("drafter")
    target = open_target(source)
    config = ModuleConfig(
        hidden_size=64,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        layer_masks=(LayerMask(), LayerMask()),
        target_layer_ids=(-1, 0, 1),
        block_size=4,
        mask_token_id=0,
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        rms_norm_eps=1e-2,
        markov_rank=8,
    )
    module = DSparkModule(config, target_head(target))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + (tensor.dim() == 1))
    save_drafter(folder, module)
    (folder / "calibration.json").write_text(json.dumps({"temperatures": [1.5, 1.0, 1.0, 0.5]}))
    return folder


@pytest.fixture(scope="module")
def large(source: Path, drafter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The inflated model and its drafters, in the large shape and in its own."""
    folders = {}
    for name, extra in (("whole", []), ("small", ["--small-drafter"])):
        model, graft = (tmp_path_factory.mktemp(name) / part for part in ("model", "drafter"))
        places = ["--model", str(source), "--out", str(model), "--drafter", str(drafter), "--drafter-out", str(graft)]
        assert main(["inflate", *places, *FLAGS, "--dtype", "float32", *extra]) == 0
        folders |= {"model": model, name: graft}
    return folders


def test_logits_agree(source: Path, large: dict[str, Path]) -> None:
    small, big = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, large["model"]))
    ids = torch.randint(0, small.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = small(ids, output_hidden_states=True), big(ids, output_hidden_states=True)
    assert torch.allclose(found.logits, expected.logits, atol=1e-3 * float(expected.logits.std()))
    stream = found.hidden_states[1]  # after the first layer
    assert torch.allclose(stream[..., :64], expected.hidden_states[1], atol=1e-4)
    assert not stream[..., 64:].any()


def test_it_has_the_asked_size_and_little_of_it_is_zero(large: dict[str, Path]) -> None:
    big = AutoModelForCausalLM.from_pretrained(large["model"])
    config = big.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (192, 5, 12, 32)
    matrices = [weight for name, weight in big.named_parameters() if weight.dim() == 2 and "embed_tokens" not in name]
    zeros, values = sum(int((weight == 0).sum()) for weight in matrices), sum(weight.numel() for weight in matrices)
    assert zeros / values < 0.2
    assert (large["model"] / "tokenizer.json").is_file()
    assert len(list(large["model"].glob("*.safetensors"))) == 6


def draft_of(target: Target, folder: Path) -> tuple[list[Any], list[Any]]:
    """Tokens and (drafted, accepted) of every round of a prompt under a drafter."""
    pool = BlockPool(128)
    module = load_drafter(folder, target_head(target), torch.float32, CPU)
    engine = make_engine(target, LocalDrafter(module, pool), pool, speculation="static:4")
    confidences: list[float] = []
    engine.judge = _spy(engine.judge, confidences)
    outcomes = run(engine, [greedy("a", range(5, 25), max_tokens=32)])["a"].outcomes
    return [(outcome.tokens, outcome.drafted, outcome.accepted) for outcome in outcomes], confidences


def _spy(judge: Any, confidences: list[float]) -> Any:
    def spied(logits: Any, items: Any) -> Any:
        for item in items:
            confidences.extend([*item.draft.tokens, *item.draft.confidence] if item.draft is not None else [])
        return judge(logits, items)

    return spied


@pytest.mark.parametrize("which", ["whole", "small"])
def test_the_drafter_drafts_the_same(source: Path, drafter: Path, large: dict[str, Path], which: str) -> None:
    rounds, drafts = draft_of(open_target(source), drafter)
    wide_rounds, wide_drafts = draft_of(open_target(large["model"]), large[which])
    assert wide_rounds == rounds
    assert len(drafts) > 100
    assert wide_drafts == pytest.approx(drafts, abs=1e-4)


@pytest.mark.slow
def test_the_embedded_model_and_drafter_write_and_draft_the_same(tmp_path: Path) -> None:
    """On real text in fp32: SmolLM2-135M at twice its width, with heads of twice the size and three more layers."""
    sizes = ["--hidden", "1152", "--intermediate", "2048", "--layers", "33", "--heads", "16", "--kv-heads", "4", "--head-dim", "128"]
    model, graft = tmp_path / "model", tmp_path / "drafter"
    assert main(["inflate", "--out", str(model), "--drafter-out", str(graft), "--dtype", "float32", *sizes]) == 0
    prompts = load_set(DEFAULT_FOLDER, "code")[:3]
    found = []
    for folder, drafter in ((None, "auto"), (str(model), str(graft))):
        with LLM(folder, drafter, "static:7", "float32", kv_tokens=2048, profile=False) as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True))
            found.append([(output.token_ids, output.choices[0].accepted) for output in outputs])
    assert found[1] == found[0]
    assert sum(accepted for _, accepted in found[0]) > 20


def test_rotary_pairs_keep_their_frequency() -> None:
    places = Places(Shape(16, 16, 2, 1, 4), Shape(64, 64, 4, 1, 8))
    assert places.dims == [0, 2, 4, 6]  # pairs (0, 2) and (1, 3) of 4 become (0, 4) and (2, 6) of 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 32}, "hidden 32 is under the source's 64"),
        ({"kv_heads": 1}, "kv_heads 1 is under"),
        ({"heads": 4}, "group 1 is under"),
        ({"head_dim": 24}, "head_dim must be a multiple"),
    ],
)
def test_shapes_that_cannot_hold_the_source_are_refused(source: Path, tmp_path: Path, change: dict[str, int], message: str) -> None:
    sizes = {"hidden": 192, "intermediate": 288, "heads": 12, "kv_heads": 4, "head_dim": 32} | change
    with pytest.raises(ConfigError, match=message):
        inflate(InflatePlan(source, tmp_path / "out", Shape(**sizes), 5, "float32"), print)
    with pytest.raises(ConfigError, match="--layers 1 is under"):
        inflate(InflatePlan(source, tmp_path / "out", Shape(192, 288, 12, 4, 32), 1, "float32"), print)


def test_a_drafter_of_another_target_is_refused_before_anything_is_written(source: Path, drafter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(drafter, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_target_layers": 3}))
    places = ["--model", str(source), "--out", str(tmp_path / "out"), "--drafter", str(other), "--drafter-out", str(tmp_path / "graft")]
    with pytest.raises(ConfigError, match="was made for another target"):
        main(["inflate", *places, *FLAGS, "--dtype", "float32"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--drafter-out needs --drafter"):
        main(["inflate", "--model", str(source), "--out", str(tmp_path / "out"), "--drafter-out", str(tmp_path / "graft")])


def test_nothing_is_overwritten(source: Path, large: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="is not empty"):
        inflate(InflatePlan(source, large["model"], Shape(192, 288, 12, 4, 32), 5, "float32"), print)
