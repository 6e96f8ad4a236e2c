"""What every rank does to become part of a verifier, in step with the others: the same calls in the same order."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # not in its __all__

from dspark.workers.verifier.attention import LayerShape
from dspark.workers.verifier.fused import fuse
from dspark.workers.verifier.memory import kv_capacity
from dspark.workers.verifier.parallel.group import RankGroup
from dspark.workers.verifier.parallel.layout import check_experts, check_heads
from dspark.workers.verifier.parallel.sharding import ExpertLoad, split_model
from dspark.workers.verifier.parallel.spec import RankSpec
from dspark.workers.verifier.targets import (
    Target,
    architecture,
    as_target,
    check_faithful,
    load_config,
    load_model,
    own_logits,
    paged_logits,
    probe_layers,
)

JOIN_TIMEOUT = timedelta(minutes=10)  # for all processes to start and import torch
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LOAD_TIMEOUT = timedelta(hours=2)


def check_splits(model: str, revision: str | None, tensor: int, expert: int) -> None:
    """Refuse what a model's configuration shows cannot be split, before any process starts."""
    config = load_config(model, revision)
    name, text = architecture(config), config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    check_heads(name, heads, getattr(text, "num_key_value_heads", None) or heads, tensor * expert)
    check_experts(name, next((getattr(text, key) for key in NUM_EXPERTS if getattr(text, key, None)), 0), expert)


def open_store(host: str) -> tuple[TCPStore, int]:
    """The leader's store, on a free port of ``host`` and of no other address; with the port."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    store = TCPStore(host, port, is_master=True, timeout=JOIN_TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def reach_store(spec: RankSpec) -> TCPStore:
    """A follower's way to the leader's store; says that it is here."""
    store = TCPStore(spec.host, spec.port, is_master=False, timeout=JOIN_TIMEOUT, wait_for_workers=False)
    store.set(here_key(spec.rank), "")
    return store


def here_key(rank: int) -> str:
    return f"here/{rank}"


class Share(NamedTuple):
    """This rank's share of the target, the count of its experts' tokens, and on the leader the layers of the whole model."""

    target: Target
    load: ExpertLoad | None
    whole: dict[int, LayerShape]


def load_share(spec: RankSpec, group: RankGroup, store: Store) -> Share:
    """Load the model and keep this rank's share, checked against the whole model by the leader. ConfigError as ``load_model``."""
    device = torch.device(spec.device)
    if spec.rank >= spec.loads_at_once:
        store.wait([f"loaded/{spec.rank - spec.loads_at_once}"], LOAD_TIMEOUT)
    model = load_model(spec.model, getattr(torch, spec.dtype), torch.device("cpu"), spec.revision)
    num_parameters = sum(p.numel() for p in model.parameters())
    whole, expected = (probe_layers(model), own_logits(model)) if group.layout.is_leader else ({}, None)
    load = split_model(model, group)
    model.to(device)  # type: ignore[arg-type]  # the stub binds the wrapped method wrongly
    store.set(f"loaded/{spec.rank}", "")
    target = as_target(model, spec.name)
    target.num_parameters = num_parameters
    fuse(target)
    if expected is None:
        paged_logits(target)
    else:
        check_faithful(target, expected.to(device))
    return Share(target, load, whole)


def agree_on_kv(spec: RankSpec, group: RankGroup, target: Target) -> int:
    """Tokens of KV that every rank has room for."""
    return group.minimum(kv_capacity(spec.kv_tokens, target, spec.layout.size if target.device.type == "cpu" else 1))


def loads_at_once(model: str, free_bytes: int) -> int:
    """How many ranks may load at the same time: experts are put together in memory, so each holds the whole model for a while."""
    folder = Path(model)
    if not folder.is_dir():
        return 1  # the first one downloads it
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return max(1, int(0.8 * free_bytes / max(size, 1)))
