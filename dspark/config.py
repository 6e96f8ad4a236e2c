"""Settings of an engine and of a serving cluster; unknown keys are refused by name."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dspark.types import Speculation

DType = Literal["auto", "float32", "bfloat16", "float16"]


class EngineConfig(BaseModel):
    """One verifier engine. ``None`` and ``"auto"`` are resolved at load; the effective values are printed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    model: str | None = Field(None, description="folder or hub name of the target; None is the embedded model")
    revision: str | None = Field(None, description="revision of a hub model")
    drafter: str = Field("auto", description="auto, none, ngram, or the folder of a DSpark drafter")
    speculation: str = Field("adaptive", description="off, static:K, adaptive or adaptive:K")
    dtype: DType = Field("auto", description="auto is bfloat16 where the device has it")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    max_model_len: int | None = Field(None, ge=16, description="longest prompt + output; None: the model's own limit, at most kv_tokens")
    kv_tokens: int | None = Field(None, ge=64, description="KV pool size in tokens; None: from free memory")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="requests that run at once")
    max_queued: int = Field(256, ge=0, description="requests that wait; more are refused as overload")
    max_batch_tokens: int = Field(512, ge=16, le=65536, description="tokens of one step, drafted ones included")
    prefix_cache: bool = Field(True, description="share KV blocks of equal prefixes")
    draft_law_width: int = Field(64, ge=1, description="support of the draft law under the ratio rule")
    profile: bool = Field(True, description="measure the step-cost table at start; without it adaptive never trims")
    threads: int | None = Field(None, ge=1, description="CPU threads for tensor work; None: torch's default")

    @field_validator("speculation")
    @classmethod
    def _parses(cls, value: str) -> str:
        Speculation.parse(value)
        return value
