"""Settings of an engine and of a serving cluster; unknown keys are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from dspark.errors import ConfigError
from dspark.types import Mode, Speculation

DType = Literal["auto", "float32", "bfloat16", "float16"]


class EngineConfig(BaseModel):
    """One verifier engine. ``None`` and ``"auto"`` are resolved at load; the effective values are printed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    model: str | None = Field(default=None, description="folder or hub name of the target; None is the embedded model")
    revision: str | None = Field(default=None, description="revision of a hub model")
    drafter: str = Field(default="auto", description="auto, none, ngram, or the folder of a drafter")
    speculation: str = Field(default="adaptive", description="off, static:K, adaptive, adaptive:K, shadow or tree:NODES")
    dtype: DType = Field(default="auto", description="auto is bfloat16 where the device has it")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    max_model_len: int | None = Field(
        default=None, ge=16, description="longest prompt + output; None: the model's own limit, at most kv_tokens"
    )
    kv_tokens: int | None = Field(default=None, ge=64, description="KV pool size in tokens; None: from free memory")
    max_num_seqs: int = Field(default=64, ge=1, le=4096, description="requests that run at once")
    max_queued: int = Field(default=256, ge=0, description="requests that wait; more are refused as overload")
    max_batch_tokens: int | None = Field(
        default=None, ge=16, le=65536, description="tokens of one step, drafted ones included; None: 512 on a CPU, 8192 on a GPU"
    )
    graph_tokens: int = Field(
        default=2048, ge=0, le=8192, description="on a GPU, steps of up to so many tokens are replayed from CUDA graphs; 0: none are"
    )
    prefix_cache: bool = Field(default=True, description="share KV blocks of equal prefixes")
    draft_law_width: int | None = Field(
        default=None,
        ge=1,
        description="support of the draft law under the ratio rule; None: 256, or 512 on the verifier's own GPU, where none is shipped",
    )
    survival: Literal["auto", "head", "margin", "constant"] = Field(
        default="auto", description="what estimates acceptance; auto: the drafter's confidence head if it has one, else its margins"
    )
    driver: Literal["auto", "plain", "overlapped"] = Field(
        default="auto", description="overlapped does host work of a step under the next forward; auto is plain on a CPU"
    )
    profile: bool = Field(default=True, description="measure the step-cost table at start; without it adaptive never trims")
    profile_cache: bool = Field(default=True, description="keep the step-cost table in the cache folder and use it at the next start")
    threads: int | None = Field(default=None, ge=1, description="CPU threads for tensor work, of each rank; None: torch's default")
    stall_s: float = Field(
        default=60.0, ge=1.0, le=3600.0, description="an engine that works on one step for so long, or waits for a rank, is given up"
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="T: the engine runs on T x E ranks, which split its heads and MLPs; each expert is split T ways",
        json_schema_extra={"short_flag": "-tp"},
    )
    expert_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="E: groups of T ranks, which a mixture's experts are spread over",
        json_schema_extra={"short_flag": "-ep"},
    )

    @property
    def num_ranks(self) -> int:
        """Processes that one engine runs in."""
        return self.tensor_parallel * self.expert_parallel

    def step_tokens(self, on_gpu: bool) -> int:
        """Tokens that a step may hold: at least one for every request that runs."""
        return max(self.max_batch_tokens or (8192 if on_gpu else 512), self.max_num_seqs)

    @field_validator("speculation", mode="before")
    @classmethod
    def _parses(cls, value: object) -> object:
        if value is False:  # YAML 1.1 reads a bare ``off`` as false
            return "off"
        if isinstance(value, str):
            try:
                Speculation.parse(value)
            except ValueError:
                forms = "off, static:K, adaptive[:K], shadow[:K] or tree[:NODES[:K]]"
                raise ValueError(f"should be {forms} with K and NODES from 1 to 64") from None
        return value


class ServiceClass(BaseModel):
    """A named promise to requests: latency budgets and a place in the queue."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_ms: float | None = Field(default=None, gt=0, le=1e9, description="milliseconds to the first token")
    tpot_ms: float | None = Field(default=None, gt=0, le=1e9, description="milliseconds per token after it")
    priority: int = Field(
        default=0, ge=-(2**31), lt=2**31, description="lower runs first; over 0 leaves half of the waiting room to others"
    )
    reject_when_late: bool = Field(default=False, description="refuse with 503 and Retry-After when no verifier can keep the budgets")


class AutoscaleConfig(BaseModel):
    """How the number of verifiers and of draft workers follows the latency budgets of requests."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    max_verifiers: int | None = Field(
        default=None, ge=1, le=1024, description="most verifiers; None: num_verifiers is fixed and nothing is scaled"
    )
    min_verifiers: int = Field(default=1, ge=1, le=1024, description="fewest verifiers")
    max_draft_workers: int | None = Field(default=None, ge=1, le=1024, description="most draft workers; None: their number is fixed")
    min_draft_workers: int = Field(default=1, ge=1, le=1024, description="fewest draft workers")
    target_met: float = Field(default=0.95, gt=0, lt=1, description="share of requests that must keep their latency budgets")
    default_ttft_ms: float = Field(default=2000.0, gt=0, le=1e9, description="budget for scaling of requests that have no ttft_ms")
    default_tpot_ms: float = Field(default=100.0, gt=0, le=1e9, description="budget for scaling of requests that have no tpot_ms")
    scaling_window_s: float = Field(default=30.0, gt=0, le=3600, description="how far back requests count")
    scaling_min_samples: int = Field(default=20, ge=1, le=100000, description="fewer requests in the window decide nothing")
    up_cooldown_s: float = Field(default=15.0, ge=0, le=3600, description="after a change, before verifiers are added")
    down_cooldown_s: float = Field(default=120.0, ge=0, le=86400, description="of spare capacity, before a verifier is removed")
    cold_start_s: float = Field(default=10.0, ge=0, le=3600, description="requests of a verifier this young do not count")
    start_timeout_s: float = Field(default=600.0, gt=0, le=86400, description="a verifier that takes longer to come cannot be scheduled")
    speculation_lever: bool = Field(default=True, description="verify fewer drafted tokens, where that helps, before adding verifiers")

    @model_validator(mode="after")
    def _min_below_max(self) -> AutoscaleConfig:
        for kind in ("verifiers", "draft_workers"):
            least, most = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if most is not None and least > most:
                raise ValueError(f"min_{kind} {least} is over max_{kind} {most}")
        return self


class ServeConfig(BaseModel):
    """A serving cluster: routers in front of verifiers that all run the same engine."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    engine: EngineConfig = Field(default=EngineConfig(), description="the engine of every verifier")
    model_name: str | None = Field(default=None, min_length=1, max_length=256, description="name clients ask for; None: the model's own")
    host: str = Field(default="127.0.0.1", min_length=1, description="address the HTTP port binds to")
    port: int = Field(default=8000, ge=1, le=65535, description="HTTP port")
    num_verifiers: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="verifier replicas, each with its own engine",
        json_schema_extra={"short_flag": "--verifiers"},
    )
    topology: Literal["colocated", "disaggregated"] = Field(
        default="colocated", description="where drafts are made: beside each target, or by draft workers of their own"
    )
    num_draft_workers: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="draft workers, if disaggregated; each serves all verifiers",
        json_schema_extra={"short_flag": "--draft-workers"},
    )
    draft_device: str | None = Field(default=None, description="device of draft workers; None: engine.device")
    draft_kv_tokens: int | None = Field(default=None, ge=64, description="context a draft worker holds, in tokens; None: from free memory")
    draft_wait_ms: float | None = Field(
        default=None, ge=0.0, le=10_000.0, description="longest wait of a step for draft workers; None: two short steps, at least 50"
    )
    draft_fallback: Literal["none", "ngram", "grafted"] = Field(
        default="none", description="what drafts for requests that no draft worker drafts for in time"
    )
    num_routers: int = Field(default=1, ge=1, le=256, description="ingress replicas")
    max_body_bytes: int = Field(default=2 * 2**20, ge=1024, le=2**30, description="largest request body; more is refused with 413")
    max_waiting: int = Field(
        default=256, ge=0, description="requests a router holds beyond what the verifiers run; more get 503 and Retry-After"
    )
    replay_wait_s: float = Field(
        default=60.0, ge=0.0, le=3600.0, description="longest wait for another verifier when one dies under a running stream"
    )
    silence_s: float = Field(
        default=30.0,
        ge=1.0,
        le=600.0,
        description="a process that says nothing for so long is given up and replaced",
    )
    move_kv: bool = Field(
        default=True,
        description="let verifiers fetch KV from one another: running requests when one shuts down, long prefixes where that is faster",
    )
    kv_transport: Literal["grpc", "collective"] = Field(
        default="grpc",
        description="how that KV travels: in gRPC messages, or from device to device through torch.distributed (NCCL, on CPUs gloo)",
    )
    drain_s: float = Field(default=600.0, ge=0.0, le=86400.0, description="longest wait for running streams when a replica stops")
    service_classes: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")], ServiceClass] = Field(
        default={}, description="latency budgets by name, as JSON on the command line: " + '{"chat": {"ttft_ms": 500, "tpot_ms": 30}}'
    )
    default_class: str | None = Field(default=None, description="service class of requests that name none")
    autoscale: AutoscaleConfig = Field(default=AutoscaleConfig(), description="how the number of verifiers follows latency budgets")
    api_key: SecretStr | None = Field(
        default=None, description="clients must send it as a bearer token; prefer api_key_file or the environment"
    )
    api_key_file: Path | None = Field(default=None, description="file whose first line is the API key")
    tls_ca_file: Path | None = Field(
        default=None, description="authority of the processes' certificates: with it the streams between them take mutual TLS"
    )
    tls_cert_file: Path | None = Field(default=None, description="certificate chain of every process, PEM")
    tls_key_file: Path | None = Field(default=None, description="its private key, PEM")
    tls_server_name: str | None = Field(default=None, description="name in the certificates; None: the address a process listens on")
    show_docs: bool = Field(default=True, description="serve /docs and /openapi.json")

    @field_validator("service_classes", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        """The command line and the environment hold text."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"should be a JSON object, and is not: {error}") from None

    @model_validator(mode="after")
    def _known_class(self) -> ServeConfig:
        if self.default_class is not None and self.default_class not in self.service_classes:
            raise ValueError(f"default_class {self.default_class} is none of service_classes ({', '.join(self.service_classes)})")
        return self

    @model_validator(mode="after")
    def _count_in_range(self) -> ServeConfig:
        most = self.autoscale.max_verifiers
        if most is not None and not self.autoscale.min_verifiers <= self.num_verifiers <= most:
            raise ValueError(
                f"num_verifiers {self.num_verifiers} is not between min_verifiers {self.autoscale.min_verifiers} and max_verifiers {most}"
            )
        return self

    @model_validator(mode="after")
    def _one_key_source(self) -> ServeConfig:
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("api_key and api_key_file exclude each other")
        return self

    @model_validator(mode="after")
    def _whole_tls(self) -> ServeConfig:
        files = {"tls_ca_file": self.tls_ca_file, "tls_cert_file": self.tls_cert_file, "tls_key_file": self.tls_key_file}
        missing = [name for name, file in files.items() if file is None]
        if 0 < len(missing) < len(files) or (missing and self.tls_server_name is not None):
            raise ValueError(f"mutual TLS also needs {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _pairs_are_bare(self) -> ServeConfig:
        if self.kv_transport != "collective":
            return self
        if self.tls_ca_file is not None:
            raise ValueError("kv_transport collective cannot be used with mutual TLS: torch.distributed encrypts nothing")
        if not self.move_kv:
            raise ValueError("kv_transport collective has nothing to carry: move_kv is off")
        return self

    @model_validator(mode="after")
    def _has_something_to_draft(self) -> ServeConfig:
        engine = self.engine
        if self.topology != "disaggregated":
            return self
        if engine.drafter in ("none", "ngram") or (engine.drafter == "auto" and engine.model is not None):
            raise ValueError(f"topology disaggregated needs the folder of a drafter: engine.drafter is {engine.drafter!r}")
        if Speculation.parse(engine.speculation).mode is Mode.OFF:
            raise ValueError("topology disaggregated has nothing to draft for: engine.speculation is off")
        return self

    def read_api_key(self) -> SecretStr | None:
        """The key clients must send, from ``api_key`` or ``api_key_file``; ConfigError when the file has none."""
        if self.api_key_file is None:
            return self.api_key
        try:
            key = self.api_key_file.read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_key_file {self.api_key_file} cannot be read: {error}") from error
        if not key:
            raise ConfigError(f"api_key_file {self.api_key_file} has an empty first line")
        return SecretStr(key)
