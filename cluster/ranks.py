"""Ranks as Ray actors, in the placement group of the replica that leads them. Serve sees and calls the leader only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dspark.errors import ConfigError
from dspark.workers.verifier.parallel.layout import Layout
from dspark.workers.verifier.parallel.spec import RankSpec

if TYPE_CHECKING:
    from dspark.workers.verifier.parallel.leader import Loss

CPU_OF_A_RANK = 0.01  # a bundle must ask for something; without GPUs, ranks share the cores that torch would take by itself


def bundles(num_ranks: int, gpus: float) -> dict[str, Any]:
    """Deployment options that reserve a place for each rank, on one node if one has room."""
    if num_ranks == 1:
        return {}
    bundle = {"GPU": gpus} if gpus else {"CPU": CPU_OF_A_RANK}
    return {"placement_group_bundles": [bundle] * num_ranks, "placement_group_strategy": "PACK"}


class Rank:
    """The actor of one rank."""

    def follow(self, spec: RankSpec) -> None:
        """Work for the leader until it announces the end."""
        from dspark.workers.verifier.parallel.follower import follow

        follow(spec, ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


class ActorLauncher:
    """Starts rank r in bundle r of the replica's placement group; each process sees its own GPU only."""

    def __init__(self) -> None:
        self.host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]

    def device(self, kind: str, layout: Layout) -> str:
        return "cuda:0" if kind == "cuda" else kind

    def start(self, specs: Sequence[RankSpec]) -> ActorRanks:
        return ActorRanks(specs)


class ActorRanks:
    """One actor for each of ``specs``. They are this process's: Ray ends them when it dies."""

    def __init__(self, specs: Sequence[RankSpec]) -> None:
        group = ray.util.get_current_placement_group()
        if group is None:
            raise ConfigError("a parallel verifier needs a placement group: deploy it with build_colocated")
        self._actors: list[Any] = []
        self._runs: dict[Any, int] = {}
        for spec in specs:
            gpus = 1 if spec.device.startswith("cuda") else 0
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=spec.rank)
            actor: Any = ray.remote(Rank).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=place).remote()
            self._actors.append(actor)
            self._runs[actor.follow.remote(spec)] = spec.rank

    def loss(self) -> Loss | None:
        """Why one of them has ended; None while all run."""
        ended, _ = ray.wait(list(self._runs), timeout=0)
        return _loss(self._runs[ended[0]], ended[0]) if ended else None

    def end(self, grace_s: float) -> None:
        """Give them ``grace_s`` to end by themselves, then kill their processes."""
        ray.wait(list(self._runs), num_returns=len(self._runs), timeout=grace_s)
        for actor in self._actors:
            ray.kill(actor)


def _loss(rank: int, run: Any) -> Loss:
    """Why the actor of a rank has returned."""
    from dspark.workers.verifier.parallel.leader import Loss

    try:
        ray.get(run)
    except RayTaskError as error:
        return Loss(f"rank {rank}: {error.cause}", isinstance(error.cause, ConfigError))
    except RayError as error:
        return Loss(f"rank {rank} died: {str(error).splitlines()[0]}")
    return Loss(f"rank {rank} ended by itself")
