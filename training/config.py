"""Settings of ``dspark train``: one YAML or TOML file a target, one section a stage; unknown keys are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dspark.config import DType
from dspark.config_file import read_file, validate
from dspark.errors import ConfigError

Kind = Literal["dspark", "dflash", "eagle3"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Section(BaseModel):
    """A part of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class Opening(Section):
    """How some self-written prompts begin: the target goes on from one of ``texts``; ``ending`` is put behind what it wrote."""

    texts: tuple[str, ...] = Field(default=("",), min_length=1, description="beginnings of a user turn, one drawn for each prompt")
    ending: str = Field(default="", description="text behind the written prompt")
    weight: float = Field(default=1.0, gt=0, description="share of this opening among all")


class SynthesizeConfig(Section):
    """Prompts, and the target's own answers to them."""

    prompts: Path | None = Field(default=None, description="JSON lines file or folder of them; None: the target writes prompts itself")
    exclude: tuple[Path, ...] = Field(default=(), description="folders of evaluation prompts that may not be trained on")
    num_prompts: int = Field(default=4096, ge=1, description="answers to make (a limit for prompts from files)")
    openings: tuple[Opening, ...] = Field(default=(Opening(),), min_length=1, description="how self-written prompts begin")
    prompt_temperature: float = Field(default=1.0, gt=0, description="temperature of self-written prompts")
    max_prompt_tokens: int = Field(default=256, ge=8, description="longer prompts are dropped")
    min_prompt_chars: int = Field(default=12, ge=1, description="shorter prompts are dropped")
    temperatures: tuple[float, ...] = Field(default=(0.0, 1.0), min_length=1, description="of answers, drawn for each prompt")
    top_p: float = Field(default=1.0, gt=0, le=1, description="of answers")
    top_k: int = Field(default=0, ge=0, description="of answers; 0 is all")
    max_tokens: int = Field(default=512, ge=2, description="longest answer")
    min_tokens: int = Field(default=4, ge=2, description="shorter answers are dropped")
    generator: Literal["auto", "engine", "dense"] = Field(
        default="auto", description="the serving engine, or one large dense batch (auto: dense on a GPU, for untruncated laws)"
    )
    wave_size: int = Field(default=256, ge=1, description="prompts of one shard, answered together")
    seed: int = Field(default=0, description="of prompts and answers")

    @field_validator("temperatures")
    @classmethod
    def _not_negative(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) < 0:
            raise ValueError("temperatures must be at least 0")
        return value


class DrafterConfig(Section):
    """The drafter's shape; None takes the target's."""

    kind: Kind = Field(
        default="dspark", description="dflash: no sequential head, the anchor is a separate input; eagle3: one layer run block_size times"
    )
    num_layers: int | None = Field(default=None, ge=1, description="draft layers; None: 3, and 1 for eagle3, which has no more")
    num_taps: int | None = Field(
        default=None, ge=1, description="target layers tapped, evenly spaced (unless taps names them); None: 5, and 3 for eagle3"
    )
    style: Literal["auto", "qwen3", "gemma4"] = Field(default="auto", description="norms of the layers; auto: gemma4 for such a target")
    taps: tuple[int, ...] | None = Field(default=None, description="target layer ids; id L is the output of layer L, -1 the embeddings")
    block_size: int = Field(default=7, ge=1, le=64, description="drafted tokens a round")
    mask_token_id: int | None = Field(default=None, ge=0, description="stands for tokens not drafted yet; None: an unused id")
    head: Literal["vanilla", "gated", "rnn", "none"] = Field(default="vanilla", description="sequential head")
    markov_rank: int = Field(default=256, ge=1, description="of the sequential head")
    confidence: bool | None = Field(default=None, description="train a confidence head; None: for dspark, the others' dialects have none")
    intermediate_size: int | None = Field(default=None, ge=1, description="width of the MLPs")
    num_heads: int | None = Field(default=None, ge=1, description="attention heads")
    num_kv_heads: int | None = Field(default=None, ge=1, description="key-value heads")
    head_dim: int | None = Field(default=None, ge=2, description="size of a head")
    window: int | None = Field(default=None, ge=1, description="context positions that a draft layer sees; None: all")
    draft_vocab_size: int | None = Field(
        default=None,
        ge=2,
        description="predict this many tokens, the most frequent of the data (dspark and dflash: when drafting on a CPU); None: all",
    )

    @model_validator(mode="after")
    def _kinds_differ(self) -> DrafterConfig:
        if self.kind == "dspark":
            return self
        if "head" in self.model_fields_set and self.head != "none":
            raise ValueError(f"head: a {self.kind} drafter has no sequential head; leave it out")
        if self.confidence:
            raise ValueError(f"confidence: the checkpoints of {self.kind} drafters have no confidence head; leave it out")
        if self.style == "gemma4":
            raise ValueError(f"style: the checkpoints of {self.kind} drafters know no gemma4 layers")
        if self.kind == "eagle3" and (self.num_layers or 1) > 1:
            raise ValueError("num_layers: an eagle3 drafter has one layer")
        if self.kind == "eagle3" and self.window is not None:
            raise ValueError("window: the checkpoints of eagle3 drafters have none")
        return self


class LossConfig(Section):
    """DSpark section 3.3."""

    cross_entropy: float = Field(default=0.1, ge=0, description="weight of the cross-entropy with the data's token")
    law: float = Field(default=0.9, ge=0, description="weight of the L1 distance between draft and target law")
    confidence: float = Field(default=1.0, ge=0, description="weight of the confidence head's term")
    decay: float | None = Field(default=None, gt=0, description="position k weighs exp(-(k - 1) / decay); None: 4 for 7 positions")
    chunk_rows: int = Field(default=4096, ge=1, description="block positions whose laws are in memory at once")


class TrainerConfig(Section):
    """How long, how fast, and what is kept."""

    epochs: float = Field(default=1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps; None: from epochs")
    train_seconds: float | None = Field(default=None, gt=0, description="end of the schedule by time, if that comes first")
    batch_tokens: int = Field(default=16384, ge=64, description="context and block positions of one forward, padding included")
    accumulate: int = Field(default=1, ge=1, description="forwards a step")
    anchors: int = Field(default=64, ge=1, description="blocks drawn from each sequence")
    max_len: int = Field(default=1024, ge=16, description="longer sequences are cut")
    lr: float = Field(default=6e-4, gt=0, description="peak learning rate")
    warmup: float = Field(default=0.04, ge=0, lt=1, description="share of the schedule")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    held_out: int = Field(default=64, ge=1, description="sequences never trained on, for the held-out acceptance length")
    eval_every: int = Field(default=500, ge=1, description="steps between held-out measurements")
    save_every_s: float = Field(default=60.0, ge=0, description="seconds between checkpoints")
    log_every: int = Field(default=20, ge=1, description="steps between lines of metrics")
    compile: bool | None = Field(
        default=None, description="compile the loss with torch.compile; None: on a GPU, unless train_seconds is under two minutes"
    )
    feature_cache_gib: float = Field(
        default=0.0, ge=0, description="memory of each worker for target features that later epochs read again; 0: none are kept"
    )
    seed: int = Field(default=0, description="of initial weights, data order and anchors")


class CalibrateConfig(Section):
    """Sequential temperature scaling on rounds of the serving engine."""

    num_prompts: int = Field(default=256, ge=2, description="held-out prompts; every second one measures the error and fits nothing")
    max_tokens: int = Field(default=128, ge=2, description="of each answer")
    temperatures: tuple[float, ...] = Field(default=(0.0, 1.0), min_length=1, description="of the answers, taken in turn")
    bins: int = Field(default=15, ge=2, description="of the expected calibration error")
    min_rounds: int = Field(default=200, ge=1, description="rounds to fit on, and to measure on; fewer are refused")
    max_num_seqs: int = Field(default=64, ge=1, description="requests at once")


class EvaluateConfig(Section):
    """Acceptance length through the serving engine."""

    prompts: Path | None = Field(default=None, description="folder of prompt sets; None: the built-in sets")
    sets: tuple[str, ...] | None = Field(default=None, description="names of sets; None: all of the folder")
    limit: int = Field(default=80, ge=1, description="prompts a set")
    max_tokens: int = Field(default=256, ge=1, description="of each answer")
    temperatures: tuple[float, ...] = Field(default=(0.0, 1.0), min_length=1, description="one table each")
    drafters: tuple[str, ...] = Field(default=(), description="compared beside ours: ngram, or folders")
    max_num_seqs: int = Field(default=64, ge=1, description="requests at once")
    draft_law_width: int | None = Field(default=None, ge=1, description="support of the draft laws; None: as served by default")


class CompareConfig(Section):
    """Drafters of several kinds trained alike."""

    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1, description="of drafters")
    synthesize_seconds: float | None = Field(
        default=None, gt=0, description="of making data, if there are none; None: until all of synthesize.num_prompts are answered"
    )
    train_seconds: float | None = Field(
        default=None, gt=0, description="of training each, and nothing else ends it; None: the trainer's own schedule"
    )


class TrainConfig(Section):
    """One target and everything that becomes of it; ``out`` holds the data, the checkpoints and the drafter."""

    model: str | None = Field(default=None, description="folder or hub name of the target; None is the embedded model")
    revision: str | None = Field(default=None, description="revision of a hub model")
    out: Path = Field(description="folder of the run")
    data_folder: Path | None = Field(default=None, description="folder of the answers; None: data in the folder of the run")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    dtype: DType = Field(default="auto", description="of the target, and of the saved drafter; auto is bfloat16")
    synthesize: SynthesizeConfig = Field(default=SynthesizeConfig(), description="prompts and answers")
    drafter: DrafterConfig = Field(default=DrafterConfig(), description="the drafter's shape")
    loss: LossConfig = Field(default=LossConfig(), description="weights of the loss")
    trainer: TrainerConfig = Field(default=TrainerConfig(), description="optimisation")
    calibrate: CalibrateConfig = Field(default=CalibrateConfig(), description="calibration of the confidences")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="acceptance length")
    compare: CompareConfig = Field(default=CompareConfig(), description="kinds of drafters side by side")

    @property
    def data(self) -> Path:
        """Folder of the shards."""
        return self.data_folder or self.out / "data"

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def drafter_folder(self) -> Path:
        """The trained drafter, ready to serve."""
        return self.out / "drafter"


def read_config(path: Path, overrides: dict[str, object]) -> TrainConfig:
    """The settings of a file; ``overrides`` by dotted path win. ConfigError names the key that is wrong."""
    values = read_file(path)
    sources = {}
    for name, value in overrides.items():
        *parents, last = name.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{path}: {parent} must hold keys and values")
        section[last] = value
        sources[name] = "the command line"
    return validate(TrainConfig, values, sources)
