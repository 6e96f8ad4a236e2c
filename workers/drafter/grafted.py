"""What every drafter module shares with its target: the embedding and the output head, neither parameters nor saved."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.workers.drafter.calibration import default_signals
from dspark.workers.drafter.layers import RMSNorm
from dspark.workers.drafter.module_config import ModuleConfig
from dspark.workers.drafter.target_head import TargetHead


class FeatureProjection(nn.Module):
    """From taps to context features: the part of a drafter that runs beside the target, wherever the rest does."""

    def __init__(self, config: ModuleConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * d, d, bias=False)
        # An EAGLE-3 layer normalises features itself.
        self.hidden_norm = None if config.is_autoregressive else RMSNorm(d, config.rms_norm_eps)
        self.signals = default_signals(config.has_confidence)  # how the drafter's trees are to be read

    def project(self, taps: Tensor) -> Tensor:
        """Context features [N, d] of concatenated taps [N, m * d]."""
        features = self.fc(taps.to(self.fc.weight.dtype))
        return cast(Tensor, features if self.hidden_norm is None else self.hidden_norm(features))


class GraftedModule(FeatureProjection):
    """The projection of the target's taps, and the target's own ends."""

    def __init__(self, config: ModuleConfig, head: TargetHead) -> None:
        super().__init__(config)
        # Plain attributes: the tensors belong to the target. Detached: a Parameter would become one of this module's.
        self._shared = head
        self._lm_head = head.lm_head.detach()
        self._target_ids: Tensor | None = None

    def use_draft_vocabulary(self, target_ids: Tensor | None, lm_head: Tensor | None) -> None:
        """Predict only ``target_ids`` [Vd] (None: all), with rows of the target's head, or with an own ``lm_head`` [Vd, d]."""
        self._target_ids = target_ids
        rows = self._shared.lm_head if target_ids is None else self._shared.lm_head[target_ids]
        self._lm_head = rows.detach() if lm_head is None else lm_head

    @property
    def num_target_layers(self) -> int:
        """Layers of the target it drafts for."""
        return self._shared.num_layers

    @property
    def softcap(self) -> float | None:
        """What the target caps its logits with."""
        return self._shared.softcap

    @property
    def draft_lm_head(self) -> Tensor:
        """The output head in use [Vd, d]."""
        return self._lm_head

    @property
    def draft_target_ids(self) -> Tensor | None:
        """Target ids of the draft vocabulary [Vd], strictly increasing; None when it is the whole vocabulary."""
        return self._target_ids

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embeddings of tokens [...]: [..., d], in the module's dtype."""
        x = F.embedding(tokens, self._shared.embed).to(self.fc.weight.dtype)
        return x if self._shared.embed_scale == 1.0 else x * torch.tensor(self._shared.embed_scale, dtype=x.dtype).item()

    def base_logits(self, hidden: Tensor) -> Tensor:
        """U [..., Vd] of hidden [..., d]."""
        # On one flat axis: with a slice of a block torch would copy the whole head once for every request.
        flat = hidden.to(self._lm_head.dtype).flatten(0, -2)
        logits = F.linear(flat, self._lm_head).view(*hidden.shape[:-1], -1)
        cap = self._shared.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
