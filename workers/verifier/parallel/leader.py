"""The leader's hold on the other ranks: start them, announce steps to them, and notice at once when one is gone."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dspark.errors import ConfigError, DSparkError, WorkerLost
from dspark.workers.blocks import BLOCK_SIZE
from dspark.workers.verifier.attention import KVStore
from dspark.workers.verifier.forward import StepInput
from dspark.workers.verifier.graphs import GraphSizes
from dspark.workers.verifier.parallel.group import RankGroup
from dspark.workers.verifier.parallel.layout import Layout
from dspark.workers.verifier.parallel.loading import agree_on_kv, here_key, load_share, open_store
from dspark.workers.verifier.parallel.messages import END, Blocks, encode_blocks, encode_move, encode_start, encode_step
from dspark.workers.verifier.parallel.sharding import ExpertLoad
from dspark.workers.verifier.parallel.spec import RankSpec
from dspark.workers.verifier.parallel.whole_blocks import collect, spread
from dspark.workers.verifier.targets import Target

POLL_S = 0.1
END_S = 5.0  # for the others to end by themselves

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loss:
    """A rank that is gone. ``is_refusal``: it refused to load, for a reason that the operator can act on."""

    reason: str
    is_refusal: bool = False


class Started(Protocol):
    """The processes of the other ranks."""

    def loss(self) -> Loss | None:
        """Why one of them has ended; None while all run."""

    def end(self, grace_s: float) -> None:
        """End all of them, after ``grace_s`` by force. More than once is fine."""


class Launcher(Protocol):
    """Where ranks come from. ``host`` is the address under which they find the leader."""

    host: str

    def device(self, kind: str, layout: Layout) -> str:
        """The device of kind cpu or cuda of a rank, as the process of that rank calls it. ConfigError if there is none."""

    def start(self, specs: Sequence[RankSpec]) -> Started:
        """Start a process for each of these ranks."""


class Ranks:
    """The other ranks of a parallel target, from their start to their end. ``spec`` is the leader's.

    A forward that takes longer than ``stall_s`` has met a rank that is stopped or cut off.
    """

    def __init__(self, spec: RankSpec, launcher: Launcher, stall_s: float) -> None:
        self._store, port = open_store(launcher.host)
        specs = [replace(spec, rank=rank, host=launcher.host, port=port) for rank in range(spec.layout.size)]
        specs = [replace(one, device=launcher.device(spec.device, one.layout)) for one in specs]
        self._spec = specs[0]
        self._stall_s = stall_s
        self._loss: Loss | None = None
        self._load: ExpertLoad | None = None
        self._heads: dict[str, int] = {}  # of the whole model, by pool
        self._busy_since: float | None = None
        self._done: torch.cuda.Event | None = None  # of the last forward, on a GPU
        self._is_closing = threading.Event()
        self._started = launcher.start(specs[1:])
        try:
            self._meet()
            self._group = self._connect(launcher.host)
        except BaseException:
            self._started.end(0.0)
            raise
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    @property
    def lost(self) -> str | None:
        """Why the group is of no use any more; None while it is."""
        return self._group.lost

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Until this ends, an error ends all ranks; what one of them refused is raised here as ConfigError."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, WorkerLost) and self._loss is not None and self._loss.is_refusal:
                raise ConfigError(self._loss.reason) from error
            raise
        if self._load is not None:
            self._load.clear()

    def load_target(self) -> Target:
        """The leader's share of the target; the others load theirs meanwhile."""
        target, self._load, whole = load_share(self._spec, self._group, self._store)
        self._heads = {f"{kind} {layer}": shape.kv_heads for layer, shape in whole.items() for kind in ("key", "value")}
        target.ranks = self
        return target

    def agree_on_kv(self, target: Target) -> int:
        """Tokens of KV that every rank has room for."""
        return agree_on_kv(self._spec, self._group, target)

    def start(self, graphs: GraphSizes | None) -> None:
        """Announce an empty KV pool and the graphs that the leader will capture next."""
        self._group.send(encode_start(graphs))

    @contextmanager
    def step(self, inputs: StepInput) -> Iterator[None]:
        """Announce a forward; the leader runs its own inside."""
        with self._announced(encode_step(inputs, BLOCK_SIZE)):
            yield

    def counting(self, slots: Tensor, num_tokens: int) -> AbstractContextManager[None]:
        """Inside a forward of the leader, which a graph may hold: count where its tokens go (slot -1 and beyond the last: padding)."""
        return nullcontext() if self._load is None else self._load.counting(slots, num_tokens)

    def whole_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape [block_size, heads, dim] that a block of a pool has in one rank, from that of this rank's share."""
        block_size, _, dim = shape
        return block_size, self._heads[name], dim

    def collect(self, store: KVStore, blocks: Sequence[int]) -> dict[str, Tensor]:
        """The KV of blocks as one rank would hold it: [n, block_size, heads, dim] by pool."""
        with self._announced(encode_blocks(Blocks(list(blocks), is_spread=False))):
            return collect(self._group, store, blocks, self._heads)

    def spread(self, store: KVStore, blocks: Sequence[int], whole: Mapping[str, Tensor]) -> None:
        """Write such KV into the blocks of all ranks."""
        with self._announced(encode_blocks(Blocks(list(blocks), is_spread=True))):
            spread(self._group, store, blocks, whole)

    @contextmanager
    def _announced(self, words: Tensor) -> Iterator[None]:
        """What all ranks do at the same time; it is a stall if it does not end."""
        self._done, self._busy_since = None, time.monotonic()
        self._group.send(words)
        yield
        if self._spec.device.startswith("cuda"):
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            self._done = done
        else:
            self._busy_since = None

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Announce that KV moves from slots to other slots."""
        self._group.send(encode_move(sources, targets))

    def check(self) -> None:
        """WorkerLost if a rank was lost."""
        self._group.check()

    def stats(self) -> dict[str, float]:
        """Tokens that chose each expert, and those that each rank's experts worked for, since the engine was loaded."""
        if self._load is None:
            return {}
        tokens = self._load.tokens.tolist()
        layout = self._spec.layout
        shares = [sum(tokens[i] for i in replace(layout, rank=rank).experts(len(tokens))) for rank in range(layout.size)]
        mean = sum(shares) / len(shares)
        by_expert = {f'expert_tokens_total{{expert="{i}"}}': float(count) for i, count in enumerate(tokens)}
        by_rank = {f'rank_expert_tokens_total{{rank="{rank}"}}': float(count) for rank, count in enumerate(shares)}
        return by_expert | by_rank | {"expert_load_imbalance": max(shares) / mean if mean else 1.0}

    def close(self) -> None:
        """End the other ranks. Closing twice is fine."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        self._watcher.join()
        if self._group.lost is None and not self._is_busy():
            try:
                self._group.send(END)
            except WorkerLost as lost:
                log.info("a rank had ended before it was told to: %s", lost)
        self._started.end(END_S)

    def _meet(self) -> None:
        """Return when all ranks have reached the store."""
        keys = [here_key(rank) for rank in range(1, self._spec.layout.size)]
        while not self._store.check(keys):
            if (loss := self._started.loss()) is not None:
                raise _as_error(loss)
            time.sleep(POLL_S)

    def _connect(self, host: str) -> RankGroup:
        """The group, once all ranks have joined it. A rank that ends while they connect is named, as it is later."""
        try:
            return RankGroup(self._spec.layout, self._store, host, torch.device(self._spec.device))
        except RuntimeError as error:
            deadline = time.monotonic() + END_S
            while (loss := self._started.loss()) is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
            if loss is None:
                raise WorkerLost(f"the ranks could not connect: {error}") from error
            raise _as_error(loss) from error

    def _is_busy(self) -> bool:
        """Whether a forward has begun and not ended; one that failed counts as well."""
        return self._busy_since is not None and (self._done is None or not self._done.query())  # type: ignore[no-untyped-call]

    def _watch(self) -> None:
        while not self._is_closing.wait(POLL_S):
            loss = self._started.loss() or self._stall()
            if loss is not None:
                self._loss = loss
                self._group.fail(loss.reason)
                self._started.end(0.0)
                return

    def _stall(self) -> Loss | None:
        since = self._busy_since
        if since is None or not self._is_busy() or time.monotonic() - since < self._stall_s:
            return None
        return Loss(f"a forward has not ended in {self._stall_s:g} s: a rank is stopped or cut off")


def _as_error(loss: Loss) -> DSparkError:
    return ConfigError(loss.reason) if loss.is_refusal else WorkerLost(loss.reason)
