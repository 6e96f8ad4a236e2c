"""Sequential heads (DSpark section 3.1) and the confidence head (section 3.2).

::

    previous   [R] or [R, γ] int64   x_{k-1}; x_0 is the anchor
    hidden     [R, d] or [R, γ, d]   h_k
    latent     [R, r]                what W2 turns into the bias B_k
    state      [R, r]                of the RNN head; the others carry none
    candidates [R, K] int64          draft vocabulary ids to compute the bias of; None: all of them
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.workers.drafter.module_config import HeadType, ModuleConfig


class MarkovHead(nn.Module):
    """The bias of position k given the token before it: vanilla, gated or RNN.

    W1 is indexed by ids of the target's vocabulary, W2 gives logits over the draft vocabulary.
    """

    def __init__(self, config: ModuleConfig) -> None:
        super().__init__()
        rank, d = config.markov_rank, config.hidden_size
        self.rank = rank
        self.head_type = config.head_type
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if self.head_type is HeadType.GATED:
            self.gate_proj = nn.Linear(d + rank, rank)
        if self.head_type is HeadType.RNN:
            self.joint_proj = nn.Linear(2 * rank + d, 3 * rank)

    def start(self, num_rows: int) -> Tensor:
        """The state before the first position."""
        return self.markov_w1.weight.new_zeros(num_rows, self.rank)

    def step(self, state: Tensor, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(state, latent) after position k, given W1[x_{k-1}] and h_k."""
        if self.head_type is HeadType.RNN:
            gate, candidate, output = self.joint_proj(torch.cat((state, embedded, hidden), dim=-1)).chunk(3, dim=-1)
            gate = torch.sigmoid(gate)
            return gate * state + (1.0 - gate) * torch.tanh(candidate), torch.tanh(output)
        if self.head_type is HeadType.GATED:
            embedded = torch.sigmoid(self.gate_proj(torch.cat((hidden, embedded), dim=-1))) * embedded
        return state, embedded

    def bias(self, latent: Tensor, candidates: Tensor | None) -> Tensor:
        """B_k [R, draft vocabulary], or [R, K] at the candidates."""
        if candidates is None:
            return F.linear(latent, self.markov_w2.weight)
        rows = F.embedding(candidates, self.markov_w2.weight)
        return torch.bmm(latent.unsqueeze(1), rows.transpose(1, 2)).squeeze(1)

    def branch_bias(self, latents: Tensor, candidates: Tensor | None) -> Tensor:
        """B_k after B nodes of each request [R, B, draft vocabulary], or [R, B, K] at the request's candidates; latents [R, B, r]."""
        if candidates is None:
            return F.linear(latents, self.markov_w2.weight)
        return torch.bmm(latents, F.embedding(candidates, self.markov_w2.weight).transpose(1, 2))

    def block_latents(self, previous: Tensor, hidden: Tensor) -> Tensor:
        """Latents of a whole block [R, γ, r] for known tokens ``previous`` [R, γ]: the form that training uses."""
        embedded = self.markov_w1(previous)
        state = self.start(previous.shape[0])
        latents = []
        for k in range(previous.shape[1]):
            state, latent = self.step(state, embedded[:, k], hidden[:, k])
            latents.append(latent)
        return torch.stack(latents, dim=1)

    def block_bias(self, previous: Tensor, hidden: Tensor) -> Tensor:
        """B_1 .. B_γ [R, γ, draft vocabulary] of known tokens ``previous`` [R, γ]."""
        return F.linear(self.block_latents(previous, hidden), self.markov_w2.weight)


class ConfidenceHead(nn.Module):
    """c_k = σ(w · [h_k; W1[x_{k-1}]] + b), without the second part where the checkpoint has none."""

    def __init__(self, config: ModuleConfig) -> None:
        super().__init__()
        self.with_markov = config.confidence_with_markov
        self.proj = nn.Linear(config.hidden_size + (config.markov_rank if self.with_markov else 0), 1)

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """Logits of c [...] from hidden [..., d] and W1[x_{k-1}] [..., r]; sigmoid is the caller's."""
        features = torch.cat((hidden, embedded), dim=-1) if self.with_markov and embedded is not None else hidden
        return F.linear(features, self.proj.weight, self.proj.bias).squeeze(-1).to(torch.float32)
