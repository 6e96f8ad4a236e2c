"""Who holds what: pure arithmetic on ranks, heads and experts.

T x E ranks. Attention heads, the inner width of dense and shared MLPs, and the columns of the output head are split over
all of them. Experts are spread over E groups of T ranks, and each expert's inner width is split over the T of its group.
"""

from __future__ import annotations

from dataclasses import dataclass

from dspark.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of one rank among ``tensor * expert`` ranks."""

    rank: int
    tensor: int
    expert: int

    @property
    def size(self) -> int:
        return self.tensor * self.expert

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def leads_group(self) -> bool:
        """Whether this is the first rank of its expert group."""
        return self.rank % self.tensor == 0

    def share(self, total: int) -> range:
        """This rank's part of ``total`` things that are split over all ranks; sizes differ by one at most."""
        return part(total, self.rank, self.size)

    def kv_share(self, kv_heads: int) -> range:
        """The KV heads that this rank's query heads read; more ranks than KV heads share them."""
        if kv_heads >= self.size:
            return self.share(kv_heads)
        head = self.rank * kv_heads // self.size
        return range(head, head + 1)

    def experts(self, num_experts: int) -> range:
        """The experts of this rank's group."""
        return part(num_experts, self.rank // self.tensor, self.expert)

    def expert_width(self, width: int) -> range:
        """This rank's part of the inner width of each of its experts."""
        return part(width, self.rank % self.tensor, self.tensor)


def part(total: int, index: int, count: int) -> range:
    """Contiguous part ``index`` of ``count`` of ``range(total)``."""
    return range(total * index // count, total * (index + 1) // count)


def check_heads(name: str, heads: int, kv_heads: int, size: int) -> None:
    """ConfigError if attention heads cannot be split over ``size`` ranks."""
    ranks = f"{name} cannot be split over tensor_parallel x expert_parallel = {size} ranks"
    if heads % size:
        raise ConfigError(f"{ranks}: {size} does not divide its {heads} attention heads")
    if kv_heads % size and size % kv_heads:
        raise ConfigError(f"{ranks}: {size} neither divides its {kv_heads} KV heads nor is a multiple of them")


def check_experts(name: str, num_experts: int, expert: int) -> None:
    """ConfigError if a model's experts cannot be spread over ``expert`` groups."""
    if expert > 1 and not num_experts:
        raise ConfigError(f"expert_parallel {expert}: {name} has no experts")
    if num_experts and expert > num_experts:
        raise ConfigError(f"expert_parallel {expert} is more than the {num_experts} experts of {name}")
