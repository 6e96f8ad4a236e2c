"""A rank that is not the engine: it runs what the leader announces, and ends when the leader does."""

from __future__ import annotations

import logging

import torch

from dspark.kernels.device import use_device
from dspark.kernels.graphs import CudaGraphs, plain_calls
from dspark.workers.blocks import BLOCK_SIZE, BlockPool
from dspark.workers.verifier.forward import Forward
from dspark.workers.verifier.graphs import GraphForward
from dspark.workers.verifier.parallel.group import RankGroup
from dspark.workers.verifier.parallel.loading import agree_on_kv, load_share, reach_store
from dspark.workers.verifier.parallel.messages import Blocks, Move, Start, decode
from dspark.workers.verifier.parallel.spec import RankSpec
from dspark.workers.verifier.parallel.whole_blocks import collect, spread
from dspark.workers.verifier.targets import Target

log = logging.getLogger(__name__)


def follow(spec: RankSpec, own_host: str) -> None:
    """Join, load, and work until the leader announces the end. WorkerLost if it goes without a word."""
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device)
    use_device(device)
    store = reach_store(spec)
    group = RankGroup(spec.layout, store, own_host, device)
    target = load_share(spec, group, store).target
    num_blocks = agree_on_kv(spec, group, target) // BLOCK_SIZE
    obey(group, target, num_blocks)


def obey(group: RankGroup, target: Target, num_blocks: int) -> None:
    """Do what the leader announces until it announces the end; the first is a start."""
    forward: Forward | None = None
    while (announced := decode(group.receive())) is not None:
        if isinstance(announced, Start):
            forward = None  # its KV makes room
            forward = start(target, num_blocks, announced)
            continue
        assert forward is not None, "a leader announces a start before anything else"
        if isinstance(announced, Move):
            forward.move(announced.sources, announced.targets)
        elif not isinstance(announced, Blocks):
            forward.run(announced)
        elif announced.is_spread:
            spread(group, forward.store, announced.ids, {})
        else:
            collect(group, forward.store, announced.ids, {})


def start(target: Target, num_blocks: int, announced: Start) -> Forward:
    """This rank's forward. Graphs are captured in step with the leader: their collectives run while they are."""
    if announced.graphs is None:
        return Forward(target, num_blocks, BLOCK_SIZE, ())
    capture = CudaGraphs(log.warning) if target.device.type == "cuda" else plain_calls
    forward = GraphForward(target, BlockPool(num_blocks), (), None, announced.graphs, capture)
    forward.prepare()
    return forward
