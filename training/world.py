"""The processes that train one drafter together; alone, all of it is nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class World:
    """Process ``rank`` of ``size``, which have torch's default process group when there are several."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def of_process_group(device: torch.device) -> World:
        """The world of the default process group."""
        return World(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def agree(self, value: float) -> float:
        """The first process's value: clocks differ, and what follows from one must not."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of all processes' values."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over all processes; the first one's weights are everybody's."""
        return module if self.size == 1 else DistributedDataParallel(module)

    @staticmethod
    def without_sync(module: nn.Module) -> AbstractContextManager[None]:
        """Gradients stay this process's own until the next backward outside."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()
