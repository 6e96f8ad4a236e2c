"""What truncating draft laws costs: acceptance by width, teacher-forced on held-out answers, without the noise of sampled rounds.

::

    hidden, goal   [R, γ, d]   what the drafter's head reads, and the target's hidden states, at the positions of R blocks
    draft law                  softmax of the drafter's logits over the ``width`` largest, at temperature 1
    overlap        [R, γ]      1 - ||draft - target||_1 / 2: what a token drawn from that law is accepted with, by itself
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.errors import ConfigError
from dspark.training.batches import Batch, make_batch, split_corpus
from dspark.training.config import TrainConfig
from dspark.training.drafting import Drafted, draft
from dspark.training.features import FeatureReader
from dspark.training.files import write_json
from dspark.training.model import Module
from dspark.training.shards import read_corpus
from dspark.training.target import load_target
from dspark.workers.build import target_head
from dspark.workers.drafter.dialects import load_drafter
from dspark.workers.drafter.target_head import TargetHead

Progress = Callable[[str], None]
RESULTS = "widths.json"
WIDTHS = (16, 64, 256, 512, 1024)


def measure_widths(config: TrainConfig, progress: Progress, drafters: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Acceptance by width of the draft law, whole laws last, of our drafter or of those named; writes ``widths.json``.

    Measured on the held-out answers that were sampled. ConfigError without any, or without a drafter.
    """
    target, _ = load_target(config)
    head = target_head(target)
    corpus = read_corpus(config.data)
    samples = [int(i) for i in split_corpus(corpus, config.trainer).held_out if corpus.temperatures[i] > 0]
    if not samples:
        raise ConfigError("no held-out answer was sampled: synthesize.temperatures needs one over 0, or trainer.held_out is too small")
    results: list[dict[str, Any]] = []
    for folder in [Path(name) for name in drafters] or [config.drafter_folder]:
        module = load_drafter(folder, head, target.dtype, target.device)
        reader = FeatureReader(target, head, module.config.target_layer_ids)
        found: dict[int, list[Tensor]] = {}
        for number, sample in enumerate(samples):
            batch = make_batch(corpus, [sample], config.trainer, torch.Generator().manual_seed(number)).to(target.device)
            anchors = batch.anchors[batch.is_real & (batch.anchors + module.config.block_size < batch.lengths)]
            batch.anchors = anchors.unsqueeze(0)
            for width, overlap in _overlaps(module, reader, head, batch).items() if len(anchors) else ():
                found.setdefault(width, []).append(overlap)
        reader.close()
        results += [_row(folder, width, torch.cat(parts)) for width, parts in found.items()]
    write_json(config.out / RESULTS, results)
    progress(_table(results))
    return results


@torch.no_grad()
def _overlaps(module: Module, reader: FeatureReader, head: TargetHead, batch: Batch) -> dict[int, Tensor]:
    """Overlap of one sequence's whole blocks, by width."""
    places = batch.anchors[0].unsqueeze(1) + torch.arange(module.config.block_size, device=batch.anchors.device)
    taps, hidden = reader.read(batch)
    drafted = draft(module, batch, taps, batch.tokens[0][places])
    ids = module.draft_target_ids
    logits = _logits(module, drafted)
    law = _target_law(hidden[0][places], head)
    law = law if ids is None else law[..., ids]
    values, order = logits.sort(dim=-1, descending=True)
    law = law.gather(-1, order)
    widths = [*(width for width in WIDTHS if width < values.shape[-1]), values.shape[-1]]
    return {width: torch.minimum(values[..., :width].softmax(-1), law[..., :width]).sum(-1).cpu() for width in widths}


def _logits(module: Module, drafted: Drafted) -> Tensor:
    """What the draft law is the softmax of [R, γ, Vd]: base logits and the Markov bias."""
    logits = module.base_logits(drafted.hidden).float()
    if drafted.latents is None or drafted.w2 is None:
        return logits
    return logits + drafted.latents.float() @ drafted.w2.float().T


def _target_law(hidden: Tensor, head: TargetHead) -> Tensor:
    logits = (hidden @ head.lm_head.T).float()
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return logits.softmax(-1)


def _row(folder: Path, width: int, overlap: Tensor) -> dict[str, Any]:
    """One line of the results; the length is what token-wise acceptance would give."""
    length = 1.0 + float(overlap.cumprod(1).sum(1).mean())
    return {
        "drafter": str(folder),
        "width": width,
        "acceptance_length": length,
        "overlap": overlap.mean(0).tolist(),
        "num_blocks": len(overlap),
    }


def _table(results: Sequence[dict[str, Any]]) -> str:
    lines = ["| drafter | width | tokens a round | mean overlap |", "| --- | --- | --- | --- |"]
    for row in results:
        mean = sum(row["overlap"]) / len(row["overlap"])
        lines.append(f"| {row['drafter']} | {row['width']} | {row['acceptance_length']:.3f} | {mean:.4f} |")
    return "\n".join(lines)
