"""The training loop: batches in, a drafter out; stopped at any time, it goes on where its last checkpoint was.

Several processes (``World``) take turns at the batches of one stream: process r of W takes batch r of every W. So W processes
with ``accumulate`` a train as one does with W * a, and everything that follows from a clock follows from the first one's.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from dspark.training import checkpoints
from dspark.training.batches import Batch, make_batch, plan_epoch, split_corpus
from dspark.training.checkpoints import Counters
from dspark.training.config import TrainConfig, TrainerConfig
from dspark.training.export import export_module
from dspark.training.feature_cache import CachedReader
from dspark.training.features import FeatureReader
from dspark.training.metrics import Metrics
from dspark.training.model import module_config, new_module
from dspark.training.objective import Objective, Outcome, mean_outcomes
from dspark.training.plots import plot_metrics
from dspark.training.shards import read_corpus
from dspark.training.target import fingerprint, load_target, peak_memory
from dspark.training.world import World
from dspark.workers.build import target_head
from dspark.workers.verifier.targets import Target

Progress = Callable[[str], None]
BETAS = (0.9, 0.95)
NOT_IDENTITY = {"train_seconds", "max_steps", "epochs", "save_every_s", "log_every", "eval_every", "compile", "feature_cache_gib"}
# Without cuDNN's, which is planned anew for every new length.
ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
HELD_OUT_EPOCH = 2**31 - 1
COMPILING_PAYS_S = 120.0  # compiling takes ten seconds, and saves a fifth of the rest


def train(config: TrainConfig, progress: Progress, max_seconds: float | None = None) -> bool:
    """Train, or go on training; True when the schedule is done and the drafter is saved, False when time ran out first."""
    target, tokenizer = load_target(config)
    return Trainer(config, target, tokenizer, progress).run(max_seconds)


def compiles(settings: TrainerConfig, device: torch.device) -> bool:
    """Whether the loss is compiled: as the settings say, otherwise where that pays."""
    if settings.compile is not None:
        return settings.compile
    return device.type == "cuda" and (settings.train_seconds is None or settings.train_seconds >= COMPILING_PAYS_S)


class Trainer:
    """Everything one process needs to train a drafter."""

    def __init__(self, config: TrainConfig, target: Target, tokenizer: Any, progress: Progress, world: World | None = None) -> None:
        self.config = config
        self.settings = config.trainer
        self.target = target
        self.progress = progress
        self.world = world or World()
        self.corpus = read_corpus(config.data)
        self.split = split_corpus(self.corpus, self.settings)
        head = target_head(target)
        shape = module_config(config.drafter, target, tokenizer)
        self.reader = FeatureReader(target, head, shape.target_layer_ids)
        cache_bytes = int(self.settings.feature_cache_gib * 2**30)
        reader = CachedReader(self.reader, cache_bytes) if cache_bytes else self.reader
        self.module = new_module(shape, head, target.device, self.settings.seed)
        self.objective = Objective(self.module, reader, head, config.loss, compiles(self.settings, target.device))
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=self.settings.lr,
            betas=BETAS,
            weight_decay=self.settings.weight_decay,
            fused=target.device.type == "cuda",
        )
        self.identity = self._identity()
        self.counters = checkpoints.load(config.checkpoints, self.module, self.optimizer, self.identity) or Counters()
        self.forward = self.world.wrap(self.objective)
        self.total_steps = self._total_steps()
        self.metrics = Metrics(config.out) if self.world.is_first else None
        self._plan: tuple[int, list[Any]] = (-1, [])

    def run(self, max_seconds: float | None = None) -> bool:
        """Train until the schedule ends or ``max_seconds`` are over; a checkpoint is left either way."""
        begin, before, last_save = time.monotonic(), self.counters.seconds, 0.0
        self._say(self._describe())
        with tqdm(total=self.total_steps, initial=self.counters.step, unit=" steps", disable=self.world.size > 1) as bar:
            elapsed = 0.0
            while self._share() < 1.0 and (max_seconds is None or elapsed <= max_seconds):
                figures = self._step()
                elapsed = self.world.agree(time.monotonic() - begin)
                self.counters.seconds = before + elapsed
                bar.update(1)
                self._report(figures, bar)
                if elapsed - last_save > self.settings.save_every_s:
                    self._save()
                    last_save = elapsed
        self._save()
        is_done = self._share() >= 1.0
        if self.world.is_first:
            self._finish(is_done, max_seconds)
        return is_done

    def held_out(self) -> dict[str, float]:
        """Figures over the held-out sequences, always with the same anchors."""
        self.module.eval()
        with torch.no_grad(), sdpa_kernel(ATTENTION_KERNELS):
            figures = mean_outcomes(self._held_out_outcomes())
        self.module.train()
        return figures

    def _held_out_outcomes(self) -> Iterator[tuple[Outcome, Tensor]]:
        for number, indices in enumerate(self._plan_epoch(self.split.held_out, HELD_OUT_EPOCH)):
            batch = self._batch(indices, -1 - number)
            yield self.objective(batch), batch.temperatures.repeat_interleave(batch.anchors.shape[1])

    def _step(self) -> dict[str, Tensor]:
        """One optimizer step; returns device tensors, so that nothing waits."""
        share = self._share()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * _schedule(share, self.settings.warmup)
        sums: dict[str, Tensor] = {}
        for turn in range(self.settings.accumulate):
            batch = self._next_batch()
            is_last = turn + 1 == self.settings.accumulate
            with nullcontext() if is_last else self.world.without_sync(self.forward):
                outcome = self._backward(batch)
            parts = {"loss": outcome.loss.detach(), "cross_entropy": outcome.cross_entropy, "law": outcome.law}
            parts |= {"confidence": outcome.confidence, "acceptance_length": outcome.acceptance_length()}
            sums = {name: sums.get(name, torch.zeros_like(value)) + value / self.settings.accumulate for name, value in parts.items()}
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.counters.step += 1
        return sums

    def _backward(self, batch: Batch) -> Outcome:
        with sdpa_kernel(ATTENTION_KERNELS):
            outcome: Outcome = self.forward(batch)
            (outcome.loss / self.settings.accumulate).backward()  # type: ignore[no-untyped-call]
        return outcome

    def _next_batch(self) -> Batch:
        """This process's next batch; moves the counters on by everybody's."""
        own: tuple[Any, int] | None = None
        for rank in range(self.world.size):
            counters = self.counters
            if self._plan[0] != counters.epoch:
                self._plan = (counters.epoch, self._plan_epoch(self.split.train, counters.epoch))
            indices = self._plan[1][counters.batch]
            if rank == self.world.rank:
                own = indices, counters.epoch * 1_000_003 + counters.batch
            lengths = self.corpus.starts[indices + 1] - self.corpus.starts[indices]
            counters.tokens += int(np.minimum(lengths, self.settings.max_len).sum())
            counters.batch += 1
            if counters.batch == len(self._plan[1]):
                counters.epoch, counters.batch = counters.epoch + 1, 0
        assert own is not None
        return self._batch(*own)

    def _plan_epoch(self, indices: Any, epoch: int) -> list[Any]:
        return plan_epoch(self.corpus, indices, self.settings, self.module.config.block_size, epoch)

    def _batch(self, indices: Any, number: int) -> Batch:
        """Anchors are drawn from the batch's number alone, so a resumed run draws the same ones."""
        draws = torch.Generator().manual_seed((self.settings.seed * 1_000_033 + number) % 2**63)
        return make_batch(self.corpus, indices, self.settings, draws)

    def _share(self) -> float:
        """Part of the schedule that is done, by steps or by time, whichever is further."""
        share = self.counters.step / self.total_steps
        if self.settings.train_seconds is not None:
            share = max(share, self.counters.seconds / self.settings.train_seconds)
        return share

    def _total_steps(self) -> int:
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        batches = len(self._plan_epoch(self.split.train, 0))
        return max(1, math.ceil(self.settings.epochs * batches / self.settings.accumulate / self.world.size))

    def _report(self, figures: dict[str, Tensor], bar: Any) -> None:
        step = self.counters.step
        if step % self.settings.log_every and step != 1:
            return
        values = self.world.mean(torch.stack([value.float() for value in figures.values()])).tolist()
        if self.metrics is None:
            return
        line: dict[str, Any] = {"step": step, "seconds": round(self.counters.seconds, 2), "tokens": self.counters.tokens}
        line |= dict(zip(figures, values, strict=True))
        line["lr"] = self.optimizer.param_groups[0]["lr"]
        bar.set_postfix(loss=f"{line['loss']:.3f}", tau=f"{line['acceptance_length']:.2f}")
        if step % self.settings.eval_every == 0:
            line["held_out"] = self.held_out()
            self._say(f"step {step}: held out {_short(line['held_out'])}")
        self.metrics.log(line)

    def _save(self) -> None:
        if self.world.is_first:
            checkpoints.save(self.config.checkpoints, self.module, self.optimizer, self.counters, self.identity)

    def _finish(self, is_done: bool, max_seconds: float | None) -> None:
        """What the first process does at the end: the drafter, its last figures and the plot, if the schedule is done."""
        assert self.metrics is not None
        if not is_done:
            self.metrics.close()
            self.progress(f"stopped after {max_seconds:.0f} s at step {self.counters.step}; run again to go on")
            return
        figures = self.held_out()
        self.reader.close()
        self.metrics.log({"step": self.counters.step, "seconds": self.counters.seconds, "held_out": figures})
        self.metrics.close()
        export_module(self.config, self.module, self.corpus, self.target)
        self.progress(f"held out {_short(figures)}; drafter in {self.config.drafter_folder}")
        self.progress(f"{self.counters.tokens / 1e6:.1f} M token visits in {self.counters.seconds:.0f} s{peak_memory(self.target.device)}")
        if (picture := plot_metrics(self.metrics.path)) is not None:
            self.progress(f"plot in {picture}")

    def _say(self, line: str) -> None:
        if self.world.is_first:
            self.progress(line)

    def _identity(self) -> str:
        """What a checkpoint must share with the run that goes on from it."""
        parts = {
            "target": fingerprint(self.target),
            "drafter": self.config.drafter.model_dump(mode="json"),
            "loss": self.config.loss.model_dump(mode="json", exclude={"chunk_rows"}),
            "trainer": self.settings.model_dump(mode="json", exclude=NOT_IDENTITY),
            "samples": len(self.corpus),
            "workers": self.world.size,
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()

    def _describe(self) -> str:
        count = sum(p.numel() for p in self.module.parameters())
        return (
            f"training {count / 1e6:.1f} M parameters on {len(self.split.train)} samples ({len(self.corpus.tokens) / 1e6:.1f} M tokens),"
            f" step {self.counters.step} of {self.total_steps}"
        )


def _schedule(share: float, warmup: float) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine."""
    if share < warmup:
        return (share + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (share - warmup) / (1.0 - warmup))))


def _short(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if name.endswith("length"))
