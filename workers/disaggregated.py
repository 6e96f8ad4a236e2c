"""What a disaggregated topology has more than a colocated one: draft workers, and engines that draft with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from dspark.config import EngineConfig
from dspark.deploy.default_model import default_cache, prepare
from dspark.drafting import DraftLayout, OpenSession, TurnBatch
from dspark.errors import ConfigError
from dspark.kernels.device import use_device
from dspark.kernels.graphs import CudaGraphs
from dspark.sampling import SamplingParams
from dspark.types import Drafter, DraftTurn
from dspark.workers import build
from dspark.workers.blocks import BLOCK_SIZE, BlockPool
from dspark.workers.build import Loaded, Progress, load_engine, resolve_device, resolve_drafter, resolve_dtype, target_head
from dspark.workers.drafter import checkpoint
from dspark.workers.drafter.dialects import load_drafter, load_projection
from dspark.workers.drafter.draft_links import DraftLinks
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.fused import fuse_layers
from dspark.workers.drafter.graft import LAW_WIDTH, graft
from dspark.workers.drafter.grafted import FeatureProjection
from dspark.workers.drafter.graph_worker import GraphWorkerDrafter
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.drafter.remote import Assign, RemoteDrafter
from dspark.workers.drafter.target_ends import fingerprint, load_target_head
from dspark.workers.drafter.target_head import TargetHead
from dspark.workers.drafter.worker import DraftWorker, WorkerCounters
from dspark.workers.drafter.worker_host import DraftWorkerHost
from dspark.workers.verifier.costs import LiveCosts
from dspark.workers.verifier.memory import free_bytes
from dspark.workers.verifier.parallel.leader import Launcher
from dspark.workers.verifier.targets import Target

KV_SHARE: Final = {"cpu": 0.1, "cuda": 0.8}  # of the memory that is free after loading a draft worker's weights
MAX_CPU_KV_BYTES: Final = 1 << 29
MIN_WAIT_S: Final = 0.05
FIRST_WORKER_S: Final = 120.0  # an engine that loads waits this long for a first draft worker


@dataclass(frozen=True, slots=True)
class RemoteDrafting:
    """How an engine finds draft workers: ``attach`` gets its links, and names the workers to them from then on.

    ``assign``: which worker drafts for a request; ``wait_s``: longest wait of a step for drafts, None: ``default_wait_s``;
    ``fallback``: none, ngram or grafted.
    """

    open_session: OpenSession
    attach: Callable[[DraftLinks], None]
    assign: Assign
    wait_s: float | None = None
    fallback: str = "none"
    first_worker_s: float = FIRST_WORKER_S


@dataclass(frozen=True, slots=True)
class LoadedDraftWorker:
    """A warm draft worker whose host is not started; ``describe`` is what to show of it."""

    host: DraftWorkerHost
    describe: dict[str, Any]


def load_remote_engine(
    config: EngineConfig, remote: RemoteDrafting, progress: Progress = lambda _: None, launcher: Launcher | None = None
) -> Loaded:
    """An engine that drafts with draft workers; otherwise as ``load_engine``."""

    def make_drafter(config: EngineConfig, target: Target, pool: BlockPool) -> tuple[Drafter, str]:
        folder = _drafter_folder(config)
        drafter = _remote_drafter(folder, config, target, pool, remote)
        remote.attach(drafter.links)
        progress("waiting for a draft worker")
        if reason := drafter.links.wait_connected(remote.first_worker_s):
            progress(f"WARNING: no draft worker: {reason}; decoding plainly until one comes")
        return drafter, str(folder)

    loaded = load_engine(config, progress, launcher, make_drafter)
    wait_s = default_wait_s(loaded.engine.drafts.costs) if remote.wait_s is None else remote.wait_s
    loaded.engine.options = dataclasses.replace(loaded.engine.options, draft_wait_s=wait_s)
    return loaded


def default_wait_s(costs: LiveCosts | None) -> float:
    """The longest wait for drafts: what comes later than two short steps take could hardly pay; ``MIN_WAIT_S`` at least."""
    return MIN_WAIT_S if costs is None else max(MIN_WAIT_S, 2.0 * costs.table.step_seconds(1))


def load_draft_worker(config: EngineConfig, kv_tokens: int | None = None, progress: Progress = lambda _: None) -> LoadedDraftWorker:
    """A draft worker for verifiers that run ``config``: of the target it loads the embedding and the output head only."""
    device = resolve_device(config.device)
    use_device(device)
    dtype = resolve_dtype(config.dtype, device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = _drafter_folder(config)
    model = config.model or str(prepare(default_cache(), progress))
    progress(f"loading {folder} as {str(dtype).removeprefix('torch.')} on {device}")
    head = load_target_head(model, dtype, device, config.revision)
    module = load_drafter(folder, head, dtype, device)
    if not isinstance(module, DSparkModule):
        raise ConfigError(f"drafter: {folder}: EAGLE-3 drafters are grafted onto their target only; draft workers drive DSpark and DFlash")
    pool = BlockPool(_kv_tokens(module, kv_tokens) // BLOCK_SIZE)
    drafter = _worker_drafter(config, module, pool, progress)
    worker = DraftWorker(drafter, pool)
    _warm_up(worker, config.max_num_seqs)
    describe = {
        "drafter": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "kv_capacity_tokens": pool.num_blocks * BLOCK_SIZE,
        "kv_capacity_bytes": drafter.pools.num_bytes,
    }
    return LoadedDraftWorker(DraftWorkerHost(worker, _layout(folder, head, module)), describe)


def _worker_drafter(config: EngineConfig, module: DSparkModule, pool: BlockPool, progress: Progress) -> LocalDrafter:
    """Drafts from graphs on a GPU, unless ``graph_tokens`` is 0. ConfigError if they do not fit."""
    device = module.fc.weight.device
    fuse_layers(module)
    if device.type != "cuda" or not config.graph_tokens:
        return LocalDrafter(module, pool, law_width=config.draft_law_width or LAW_WIDTH)
    progress("capturing the drafter's graphs")
    try:
        drafter = GraphWorkerDrafter(module, pool, config.draft_law_width or LAW_WIDTH, config.max_num_seqs, module.config.max_positions)
        drafter.prepare(CudaGraphs(progress))
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"too little memory is left on {device} for the drafter's graphs: lower draft_kv_tokens") from error
    return drafter


def _remote_drafter(folder: Path, config: EngineConfig, target: Target, pool: BlockPool, remote: RemoteDrafting) -> RemoteDrafter:
    head = target_head(target)
    projection = load_projection(folder, head, target.dtype, target.device)
    links = DraftLinks(_layout(folder, head, projection), remote.open_session)
    fallback: Drafter | None = None
    if remote.fallback == "ngram":
        fallback = NgramDrafter()
    elif remote.fallback == "grafted":
        fallback = graft(load_drafter(folder, head, target.dtype, target.device), pool, config.draft_law_width or LAW_WIDTH)
    feeds = fallback is None and build.uses_graphs(config, target)
    return RemoteDrafter(projection, pool, links, remote.assign, fallback, feeds)


def _layout(folder: Path, head: TargetHead, projection: FeatureProjection) -> DraftLayout:
    """What this end says of itself in handshakes. The vocabulary is the target's, whatever part of it the drafter predicts."""
    config, dtype = projection.config, projection.fc.weight.dtype
    name = str(dtype).removeprefix("torch.")
    return DraftLayout(fingerprint(head), checkpoint.fingerprint(folder), name, config.hidden_size, config.block_size, config.vocab_size)


def _drafter_folder(config: EngineConfig) -> Path:
    name = resolve_drafter(config)
    if name in ("none", "ngram"):
        raise ConfigError(f"drafter {name!r} cannot draft on draft workers: name the folder of a DSpark drafter")
    return Path(name)


def _kv_tokens(module: FeatureProjection, wanted: int | None) -> int:
    """Size of a draft worker's pool in tokens; ConfigError if it does not fit."""
    config, weight = module.config, module.fc.weight
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * weight.element_size()
    free = free_bytes(weight.device)
    if wanted is None:
        share = KV_SHARE[weight.device.type] * free
        wanted = int((min(share, MAX_CPU_KV_BYTES) if weight.device.type == "cpu" else share) / per_token)
    if wanted * per_token > free:
        raise ConfigError(
            f"draft_kv_tokens {wanted} takes {wanted * per_token / 2**30:.2f} GiB ({per_token} bytes a token),"
            f" but only {free / 2**30:.2f} GiB are free on {weight.device}"
        )
    return max(wanted // BLOCK_SIZE, 2) * BLOCK_SIZE


def _warm_up(worker: DraftWorker, max_num_seqs: int) -> None:
    """Draft for one request and for many, by either rule, so that no verifier waits for a kernel to be compiled."""
    drafter = worker.drafter
    assert isinstance(drafter, LocalDrafter)
    weight = drafter.module.fc.weight
    features = torch.zeros(BLOCK_SIZE, weight.shape[0], dtype=weight.dtype)
    for count in (1, min(max_num_seqs, worker.pool.num_blocks)):
        for sampling in (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)):
            turns = [
                DraftTurn(f"{i}", BLOCK_SIZE + 1, (0,) * (BLOCK_SIZE + 1), 0, features, drafter.block_size, sampling, 0, cache_salt=f"{i}")
                for i in range(count)
            ]
            worker.answer([("warm-up", TurnBatch(0, tuple(turns)))])
            worker.end_session("warm-up")
    worker.reset()
    worker.counters = WorkerCounters()
