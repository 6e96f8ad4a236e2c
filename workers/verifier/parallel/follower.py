"""A rank that is not the engine: it runs what the leader announces, and ends when the leader does."""

from __future__ import annotations

import torch

from dspark.workers.blocks import BLOCK_SIZE
from dspark.workers.verifier.forward import Forward, StepInput
from dspark.workers.verifier.parallel.group import RankGroup
from dspark.workers.verifier.parallel.loading import agree_on_kv, load_share, reach_store
from dspark.workers.verifier.parallel.messages import decode
from dspark.workers.verifier.parallel.spec import RankSpec


def follow(spec: RankSpec, own_host: str) -> None:
    """Join, load, and work until the leader announces the end. WorkerLost if it goes without a word."""
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = reach_store(spec)
    group = RankGroup(spec.layout, store, own_host, device)
    target, _ = load_share(spec, group, store)
    num_blocks = agree_on_kv(spec, group, target) // BLOCK_SIZE
    obey(group, Forward(target, num_blocks, BLOCK_SIZE, ()))


def obey(group: RankGroup, forward: Forward) -> None:
    """Do what the leader announces until it announces the end."""
    while (announced := decode(group.receive())) is not None:
        if isinstance(announced, StepInput):
            forward.run(announced)
        else:
            forward.move(announced.sources, announced.targets)
