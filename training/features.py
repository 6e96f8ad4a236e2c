"""What the frozen target says about a batch: taps for the drafter's context, and the hidden states its laws come from.

::

    tokens   [B, L] int64    right-padded; a causal model needs no mask for that
    taps     [B, L, m * d]   outputs of the tapped layers (-1: the embeddings)
    hidden   [B, L, d]       after the final norm, ready for the output head
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dspark.errors import ConfigError
from dspark.training.batches import Batch
from dspark.workers.drafter.target_head import TargetHead
from dspark.workers.verifier.attention import ATTENTION_NAME
from dspark.workers.verifier.targets import Target

CHECK_TOKENS = 8
TOLERANCE = 2e-2  # relative, of logits in bf16


class FeatureReader:
    """Runs the target over batches, with transformers' own fused attention from now on; holds no state between them."""

    def __init__(self, target: Target, head: TargetHead, taps: tuple[int, ...]) -> None:
        wrong = [tap for tap in taps if not -1 <= tap < target.num_layers]
        if wrong:
            raise ConfigError(f"drafter.taps: {wrong[0]} is no layer of this target; it has layers 0 to {target.num_layers - 1}, and -1")
        self.target = target
        self.taps = taps
        target.model.set_attn_implementation("sdpa")
        self._check_head(head)

    def close(self) -> None:
        """Give the target its paged attention back."""
        self.target.model.set_attn_implementation(ATTENTION_NAME)

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(taps, hidden) of a batch, in the target's dtype."""
        return self.run(batch.tokens)

    @torch.no_grad()
    def run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(taps, hidden) of right-padded tokens [B, L]."""
        found: dict[int, Tensor] = {}
        with self._hooks(found):
            output = self.target.model.get_decoder()(tokens, use_cache=False)  # type: ignore[no-untyped-call]
        return torch.cat([found[tap] for tap in self.taps], dim=-1), output.last_hidden_state

    @contextmanager
    def _hooks(self, found: dict[int, Tensor]) -> Iterator[None]:
        layers = self.target.decoder_layers()

        def keep_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[-1] = args[0] if args else kwargs["hidden_states"]

        def keep_output(tap: int) -> Any:
            def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
                found[tap] = output if isinstance(output, Tensor) else output[0]

            return hook

        handles = [
            layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
            if tap == -1
            else layers[tap].register_forward_hook(keep_output(tap))
            for tap in self.taps
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _check_head(self, head: TargetHead) -> None:
        """The laws trained on are the target's own: hidden states through ``head`` must give its logits."""
        tokens = torch.arange(CHECK_TOKENS, device=self.target.device).unsqueeze(0)
        _, hidden = self.run(tokens)
        expected = self.target.model(tokens, use_cache=False).logits.float()
        logits = (hidden @ head.lm_head.T).float()
        if head.softcap is not None:
            logits = torch.tanh(logits / head.softcap) * head.softcap
        error = float((logits - expected).norm() / expected.norm())
        if not error <= TOLERANCE:
            raise ConfigError(
                f"{type(self.target.model).__name__}: its logits are not its output head times its last hidden states"
                f" (they differ by {error:.2g}), so drafters for it cannot be trained"
            )
