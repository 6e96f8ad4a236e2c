"""Assemble an engine from its configuration: target, KV pool, drafter, cost table.

The only place where the verifier and the drafter rooms meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dspark.config import EngineConfig
from dspark.deploy.default_model import DEFAULT_MODEL_NAME, default_cache, default_drafter, prepare
from dspark.errors import ConfigError
from dspark.kernels.device import use_device
from dspark.kernels.graphs import CudaGraphs
from dspark.types import Drafter, Mode, Speculation
from dspark.workers.blocks import BLOCK_SIZE, BlockPool
from dspark.workers.drafter.dialects import load_drafter
from dspark.workers.drafter.dspark_blocks import HEAD_TOP_K
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.fused import fuse_layers
from dspark.workers.drafter.graft import LAW_WIDTH, graft
from dspark.workers.drafter.graph_local import GraphDrafter
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.drafter.none import NoDrafter
from dspark.workers.drafter.paged_context import DraftPools
from dspark.workers.drafter.remote import RemoteDrafter
from dspark.workers.drafter.target_ends import head_of
from dspark.workers.drafter.target_head import TargetHead
from dspark.workers.self_check import SUSPICIOUS, acceptance_on_builtin_text
from dspark.workers.verifier.cost_cache import device_name, fingerprint
from dspark.workers.verifier.cost_cache import load as load_costs
from dspark.workers.verifier.cost_cache import save as save_costs
from dspark.workers.verifier.costs import CostTable
from dspark.workers.verifier.device_edits import DeviceEdits
from dspark.workers.verifier.engine import Engine, EngineOptions
from dspark.workers.verifier.fused import fuse
from dspark.workers.verifier.memory import CudaMemory, free_bytes, kv_capacity, measure_reserve
from dspark.workers.verifier.parallel.leader import Launcher, Ranks
from dspark.workers.verifier.parallel.loading import check_splits, loads_at_once
from dspark.workers.verifier.parallel.processes import ProcessLauncher
from dspark.workers.verifier.parallel.spec import RankSpec
from dspark.workers.verifier.profile import describe as describe_costs
from dspark.workers.verifier.profile import measure_costs, reach, still_holds
from dspark.workers.verifier.runner import GraphOptions
from dspark.workers.verifier.scheduler import Limits
from dspark.workers.verifier.survival import make_estimator
from dspark.workers.verifier.targets import Target, as_target, check_faithful, check_model_folder, load_model, load_tokenizer, own_logits

Progress = Callable[[str], None]
MakeDrafter = Callable[[EngineConfig, Target, BlockPool], tuple[Drafter, str]]
LOADING_WAIT_S = 10.0  # for drafts while nobody waits for text: first rounds are slow


@dataclass(frozen=True, slots=True)
class Loaded:
    """A ready engine. ``config`` holds the effective settings; ``describe`` what to show at start."""

    engine: Engine
    tokenizer: Any
    model_name: str
    config: EngineConfig
    describe: dict[str, Any]


def load_engine(
    config: EngineConfig,
    progress: Progress = lambda _: None,
    launcher: Launcher | None = None,
    make_drafter: MakeDrafter | None = None,
) -> Loaded:
    """Build an engine; ConfigError names the setting that cannot work. The engine must be closed.

    With ``tensor_parallel`` or ``expert_parallel`` over 1 this process is the leader, and ``launcher`` starts the other
    ranks (None: as processes beside this one). ``make_drafter``: what drafts, if not this process.
    """
    device = resolve_device(config.device)
    use_device(device)
    dtype = resolve_dtype(config.dtype, device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = config.model or str(prepare(default_cache(), progress))
    check_model_folder(folder)
    shown = f"loading {config.model or DEFAULT_MODEL_NAME} as {_name(dtype)} on {device}"
    if config.num_ranks > 1:
        progress(f"{shown}, on {config.num_ranks} ranks (tensor {config.tensor_parallel} x expert {config.expert_parallel})")
        spec = _leader_spec(config, folder, dtype, device)
        return _load_parallel(config, spec, launcher or ProcessLauncher(), progress, make_drafter)
    progress(shown)
    model = load_model(folder, dtype, device, config.revision)
    target = as_target(model, config.model or DEFAULT_MODEL_NAME)
    reference = own_logits(model)
    if fuse(target):
        check_faithful(target, reference)
    return assemble(target, load_tokenizer(folder, config.revision), config, progress, make_drafter)


def _leader_spec(config: EngineConfig, folder: str, dtype: torch.dtype, device: torch.device) -> RankSpec:
    """Rank 0 of a parallel engine; where its store listens is decided when that is opened."""
    if device.index is not None:
        raise ConfigError(f"device {device}: parallel ranks take the GPUs that are visible, one each; say cuda")
    check_splits(folder, config.revision, config.tensor_parallel, config.expert_parallel)
    threads = config.threads or max(1, torch.get_num_threads() // (config.num_ranks if device.type == "cpu" else 1))
    torch.set_num_threads(threads)
    return RankSpec(
        rank=0,
        tensor=config.tensor_parallel,
        expert=config.expert_parallel,
        host="",
        port=0,
        model=folder,
        name=config.model or DEFAULT_MODEL_NAME,
        revision=config.revision,
        dtype=_name(dtype),
        device=str(device),
        threads=threads,
        kv_tokens=config.kv_tokens,
        loads_at_once=loads_at_once(folder, free_bytes(torch.device("cpu"))),
    )


def _load_parallel(
    config: EngineConfig, spec: RankSpec, launcher: Launcher, progress: Progress, make_drafter: MakeDrafter | None
) -> Loaded:
    """An engine whose target is spread over ranks; they end with it, or with an error here."""
    ranks = Ranks(spec, launcher, config.stall_s)
    with ranks.loading():
        target = ranks.load_target()
        return assemble(target, load_tokenizer(spec.model, spec.revision), config, progress, make_drafter)


def assemble(
    target: Target, tokenizer: Any, config: EngineConfig, progress: Progress = lambda _: None, make_drafter: MakeDrafter | None = None
) -> Loaded:
    """An engine around a loaded target."""
    module = None if make_drafter is not None else _module(config, target)
    kv_tokens = _kv_tokens(config, target, _bytes_beside_kv(target, module, make_drafter is not None))
    max_model_len = _max_model_len(config, target, kv_tokens)
    pool = BlockPool(kv_tokens // BLOCK_SIZE)
    drafter, drafter_name = _drafter(config, target, pool, module) if make_drafter is None else make_drafter(config, target, pool)
    driver = ("overlapped" if target.device.type == "cuda" else "plain") if config.driver == "auto" else config.driver
    options = EngineOptions(
        max_model_len=max_model_len,
        limits=Limits(config.max_num_seqs, config.step_tokens(target.device.type == "cuda"), config.prefix_cache),
        max_queued=config.max_queued,
        speculation=Speculation.parse(config.speculation),
        auto_trees=isinstance(drafter, LocalDrafter | RemoteDrafter),
        overlapped=driver == "overlapped",
    )
    options = dataclasses.replace(options, graphs=_graphs(config, target, options, drafter, progress))
    try:
        engine = Engine(target, pool, drafter, dataclasses.replace(options, draft_wait_s=LOADING_WAIT_S), tokenizer)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"kv_tokens {kv_tokens} do not fit on {target.device}: lower kv_tokens or max_batch_tokens") from error
    engine.runner.prepare(progress)
    if isinstance(drafter, GraphDrafter) and options.graphs is not None:
        try:
            drafter.prepare(options.graphs.capture, engine.runner.step_tokens, engine.runner.draft_laws)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"too little memory is left on {target.device} for the drafter's graphs: lower kv_tokens") from error
    _check_drafter(engine, tokenizer, drafter_name, progress)
    survival = _survival(config, drafter, drafter_name)
    engine.drafts.survival = make_estimator(survival, drafter.block_size, drafter.signals)
    if config.profile:
        engine.set_costs(_costs(engine, config, drafter_name, progress))
    elif drafter.block_size and options.speculation.mode in (Mode.ADAPTIVE, Mode.SHADOW):
        progress("WARNING: no step-cost table (profile: false): adaptive speculation verifies every drafted token")
    engine.options = options
    effective = config.model_copy(
        update={
            "drafter": drafter_name,
            "driver": driver,
            "survival": survival,
            "dtype": _name(target.dtype),
            "device": str(target.device),
            "max_model_len": max_model_len,
            "kv_tokens": kv_tokens,
            "max_batch_tokens": options.limits.max_batch_tokens,
            "threads": torch.get_num_threads(),
        }
    )
    return Loaded(engine, tokenizer, Path(target.name).name, effective, _describe(engine, effective))


def uses_graphs(config: EngineConfig, target: Target) -> bool:
    """Whether steps run from CUDA graphs."""
    return target.device.type == "cuda" and config.graph_tokens > 0


def _graphs(config: EngineConfig, target: Target, options: EngineOptions, drafter: Drafter, progress: Progress) -> GraphOptions | None:
    if not uses_graphs(config, target):
        return None
    return GraphOptions(
        capture=CudaGraphs(progress),
        max_tokens=min(config.graph_tokens, options.limits.max_batch_tokens),
        max_rows=options.limits.max_num_seqs,
        max_model_len=options.max_model_len,
        longest=1 + drafter.block_size,
        with_trees=drafter.block_size > 0,
        with_matches=isinstance(drafter, GraphDrafter),
        law_width=drafter.law_width if isinstance(drafter, GraphDrafter) else 1,
    )


def measure_profile(config: EngineConfig, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Measure the step-cost table of this configuration and keep it for later starts; its fields as plain values."""
    loaded = load_engine(config.model_copy(update={"profile": False}), progress)
    try:
        table = measure_costs(loaded.engine, progress)
        _keep(table, _fingerprint(loaded.engine, config, loaded.config.drafter), progress)
    finally:
        loaded.engine.close()
    return dataclasses.asdict(table)


def _costs(engine: Engine, config: EngineConfig, drafter_name: str, progress: Progress) -> CostTable:
    """The step-cost table: from an earlier start if that had the same fingerprint and still holds, otherwise measured."""
    name = _fingerprint(engine, config, drafter_name)
    table = load_costs(_costs_folder(), name) if config.profile_cache else None
    if table is not None and still_holds(engine, table):
        for line in describe_costs(table):
            progress(line)
        progress("(measured at an earlier start)")
        return table
    progress("measuring step costs")
    table = measure_costs(engine, progress)
    if config.profile_cache:
        _keep(table, name, progress)
    return table


def _costs_folder() -> Path:
    return default_cache() / "costs"


def _keep(table: CostTable, name: str, progress: Progress) -> None:
    try:
        save_costs(_costs_folder(), name, table)
    except OSError as error:
        progress(f"the step costs cannot be kept for the next start: {error}")


def _fingerprint(engine: Engine, config: EngineConfig, drafter_name: str) -> str:
    """Of everything that a step's cost hangs on."""
    target, drafter = engine.target, engine.drafter
    facts = {
        "model": target.model.config.to_json_string(),
        "fused": type(target.decoder_layers()[0]).__name__,
        "dtype": str(target.dtype),
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
        "ranks": [config.tensor_parallel, config.expert_parallel],
        "drafter": [Path(drafter_name).name, drafter.block_size, getattr(getattr(drafter, "module", None), "config", None)],
        "graphs": 0 if engine.options.graphs is None else engine.options.graphs.max_tokens,
        "reach": reach(target.device, engine.options.limits),
        "limits": [engine.options.limits.max_num_seqs, engine.options.limits.max_batch_tokens, config.draft_law_width],
    }
    return fingerprint(facts)


def _describe(engine: Engine, config: EngineConfig) -> dict[str, Any]:
    target, pool = engine.target, engine.pool
    tokens = pool.num_blocks * pool.block_size
    return {
        **config.model_dump(),
        "architecture": type(target.model).__name__,
        "parameters": target.num_parameters,
        "draft_block_size": engine.drafter.block_size,
        "kv_capacity_tokens": tokens,
        "kv_capacity_bytes": tokens * target.kv_bytes_per_token * config.num_ranks,
        "kv_capacity_requests": tokens // engine.options.max_model_len,
    }


def resolve_device(name: str) -> torch.device:
    """The device that a configuration names; ConfigError if this machine has no such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this machine has no usable CUDA device")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a configuration names."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]  # the names are checked by EngineConfig
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _max_model_len(config: EngineConfig, target: Target, kv_tokens: int) -> int:
    if config.max_model_len is None:
        return min(target.max_position, kv_tokens)
    if config.max_model_len > target.max_position:
        raise ConfigError(f"max_model_len {config.max_model_len} is over the model's own limit of {target.max_position}")
    if config.max_model_len > kv_tokens:
        raise ConfigError(f"max_model_len {config.max_model_len} is over kv_tokens {kv_tokens}: one request would not fit")
    return config.max_model_len


def _drafter(config: EngineConfig, target: Target, pool: BlockPool, module: DSparkModule | Eagle3Module | None) -> tuple[Drafter, str]:
    """The drafter that the configuration names, and the name that says what ``auto`` became."""
    name = resolve_drafter(config)
    if module is None:
        return (NoDrafter(), "none") if name == "none" else (NgramDrafter(), "ngram")
    if uses_graphs(config, target):
        longest = _max_model_len(config, target, pool.num_blocks * pool.block_size)
        return GraphDrafter(module, pool, config.draft_law_width or HEAD_TOP_K, config.max_num_seqs, longest), name
    return graft(module, pool, config.draft_law_width or LAW_WIDTH), name


def _module(config: EngineConfig, target: Target) -> DSparkModule | Eagle3Module | None:
    """The module that is grafted onto the target; None where drafts come from elsewhere, or not at all."""
    name = resolve_drafter(config)
    if name in ("none", "ngram"):
        return None
    module = load_drafter(Path(name), target_head(target), target.dtype, target.device)
    if isinstance(module, DSparkModule):
        fuse_layers(module)
    return module


def _bytes_beside_kv(target: Target, module: DSparkModule | Eagle3Module | None, is_remote: bool) -> int:
    """Bytes a token of KV that drafting keeps here: a module's own KV, or features for drafters elsewhere."""
    if is_remote:
        return target.hidden_size * target.dtype.itemsize
    if module is None:
        return 0
    features = target.hidden_size * target.dtype.itemsize if isinstance(module, Eagle3Module) else 0
    return DraftPools.bytes_per_token(module.config, target.dtype.itemsize) + features


def _kv_tokens(config: EngineConfig, target: Target, bytes_per_token: int) -> int:
    """Size of the KV pool: on one GPU what the largest steps leave, ``bytes_per_token`` kept beside it."""
    if target.ranks is not None:
        return target.ranks.agree_on_kv(target)
    if target.device.type != "cuda":
        return kv_capacity(config.kv_tokens, target)
    probe, steps = CudaMemory(target.device), config.step_tokens(True)
    edit_bytes = DeviceEdits.num_bytes(config.max_num_seqs, target.vocab_size) if config.graph_tokens else 0
    reserve = measure_reserve(target, probe, steps, min(config.graph_tokens, steps), bytes_per_token, edit_bytes)
    torch.cuda.empty_cache()
    return kv_capacity(config.kv_tokens, target, reserve=reserve, probe=probe)


def resolve_drafter(config: EngineConfig) -> str:
    """What ``auto`` becomes: none, ngram, or the folder of a module."""
    if Speculation.parse(config.speculation).mode is Mode.OFF:
        return "none"
    if config.drafter != "auto":
        return config.drafter
    embedded = default_drafter() if config.model is None else None
    return str(embedded) if embedded is not None else "ngram"


def _survival(config: EngineConfig, drafter: Drafter, drafter_name: str) -> str:
    """The survival estimator that the configuration names or means; ConfigError if the drafter gives it nothing to go by."""
    if config.survival == "head" and not drafter.signals.has_head:
        raise ConfigError(f"survival head: drafter {drafter_name!r} has no trained confidence head; use auto, margin or constant")
    if config.survival != "auto":
        return config.survival
    return "head" if drafter.signals.has_head else "margin"


def target_head(target: Target) -> TargetHead:
    """The target's embedding and output head, as drafters share them."""
    embedding: Any = target.model.get_input_embeddings()
    lm_head: Any = target.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head_of(target.model, embedding.weight, lm_head.weight)


def _check_drafter(engine: Engine, tokenizer: Any, name: str, progress: Progress) -> None:
    """Say loudly when a grafted drafter does not fit its target."""
    if not engine.drafter.taps or tokenizer is None:
        return
    length = acceptance_on_builtin_text(engine, tokenizer)
    if length is None:
        progress(f"WARNING: drafter {name!r} was not checked: no drafts came")
        return
    progress(f"drafter check: {length:.2f} tokens a round on built-in text")
    if length < SUSPICIOUS:
        progress(
            f"WARNING: drafter {name!r} is accepted almost never ({length:.2f} tokens a round): it is untrained, or was made"
            " for another target, or its taps or anchor convention are read wrongly; expect no speed-up"
        )
