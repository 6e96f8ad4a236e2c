"""Target features kept from one epoch to the next, within a bound.

Every epoch visits every sample once, in another order and with other neighbours. So features are kept by sample, and what was
kept first stays: replacing would throw away what the next epoch asks for. A sample's features do not depend on its batch (a
causal model over right-padded rows), up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.training.batches import Batch
from dspark.training.features import FeatureReader

Kept = tuple[Tensor, Tensor]


class CachedReader:
    """Reads through ``reader`` and keeps at most ``limit_bytes`` of features in the host's memory."""

    def __init__(self, reader: FeatureReader, limit_bytes: int) -> None:
        self.reader = reader
        self.target = reader.target
        self.num_bytes = 0
        self._limit_bytes = limit_bytes
        self._kept: dict[int, Kept] = {}

    def close(self) -> None:
        self.reader.close()

    def read(self, batch: Batch) -> Kept:
        """(taps [B, L, m * d], hidden [B, L, d]) of a batch; those of kept samples are 0 behind their ends."""
        samples = batch.samples.tolist()
        missing = [row for row, sample in enumerate(samples) if sample not in self._kept]
        if len(missing) == len(samples):
            taps, hidden = self.reader.run(batch.tokens)
        else:
            taps, hidden = self._assemble(batch, samples, missing)
        lengths = batch.lengths.tolist() if missing else []
        for row in missing:
            self._keep(samples[row], taps[row, : lengths[row]], hidden[row, : lengths[row]])
        return taps, hidden

    def _assemble(self, batch: Batch, samples: list[int], missing: list[int]) -> Kept:
        widths = [part.shape[-1] for part in next(iter(self._kept.values()))]
        like = torch.empty(0, dtype=self.target.dtype, device=self.target.device)
        taps, hidden = (like.new_zeros(*batch.tokens.shape, width) for width in widths)
        for row, sample in enumerate(samples):
            if sample in self._kept:
                for whole, part in zip((taps, hidden), self._kept[sample], strict=True):
                    whole[row, : len(part)] = part.to(whole.device, non_blocking=True)
        if missing:
            taps[missing], hidden[missing] = self.reader.run(batch.tokens[missing])
        return taps, hidden

    def _keep(self, sample: int, taps: Tensor, hidden: Tensor) -> None:
        size = taps.nbytes + hidden.nbytes
        if self.num_bytes + size <= self._limit_bytes:
            self._kept[sample] = (taps.to("cpu", copy=True), hidden.to("cpu", copy=True))
            self.num_bytes += size
