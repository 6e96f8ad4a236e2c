"""DSpark's drafting equations written down once more, naively: one request, one position and one head at a time, in fp64.

Shares no code with the drafter; takes its weights by their checkpoint names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    mask_token_id: int
    eps: float = 1e-6
    theta: float = 10000.0
    head_type: str = "vanilla"
    with_markov: bool = True
    sample_from_anchor: bool = True
    gemma: bool = False
    window: int | None = None
    window_from_anchor: bool = False
    causal: bool = False


def rms(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps) * weight


def rope(x: Tensor, position: int, theta: float) -> Tensor:
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position / theta ** (2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def heads_of(x: Tensor, dim: int) -> list[Tensor]:
    return [x[i : i + dim] for i in range(0, len(x), dim)]


def mlp(x: Tensor, w: Mapping[str, Tensor], prefix: str, gemma: bool) -> Tensor:
    gate = w[prefix + "gate_proj.weight"] @ x
    if gemma:
        act = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        act = gate / (1 + torch.exp(-gate))
    return w[prefix + "down_proj.weight"] @ (act * (w[prefix + "up_proj.weight"] @ x))


def sees(s: Sizes, anchor: int, query: int, key: int) -> bool:
    """Whether a block query at position ``query`` sees the key at ``key``; below ``anchor`` lies the context."""
    if key >= anchor and s.causal and key > query:
        return False
    if s.window is None:
        return True
    if s.window_from_anchor:
        return key >= anchor - s.window
    return key > query - s.window


def hidden_states(w: Mapping[str, Tensor], s: Sizes, embed: Tensor, taps: Tensor, anchor_token: int) -> list[Tensor]:
    """h of every block input, for a context of len(taps) positions."""
    a = len(taps)
    ctx = [rms(w["fc.weight"] @ t, w["hidden_norm.weight"], s.eps) for t in taps]
    num_slots = s.block_size if s.sample_from_anchor else s.block_size + 1
    xs = [embed[anchor_token]] + [embed[s.mask_token_id]] * (num_slots - 1)
    for layer in range(s.num_layers):
        p = f"layers.{layer}."
        inputs = [rms(x, w[p + "input_layernorm.weight"], s.eps) for x in xs]
        keys, values, queries = [], [], []
        for position, y in enumerate([*ctx, *inputs]):
            raw = heads_of(w[p + "self_attn.k_proj.weight"] @ y, s.head_dim)
            keys.append([rope(rms(k, w[p + "self_attn.k_norm.weight"], s.eps), position, s.theta) for k in raw])
            value = heads_of(w[p + "self_attn.v_proj.weight"] @ y, s.head_dim)
            values.append([rms(v, 1.0, s.eps) for v in value] if s.gemma else value)
            if position >= a:
                raw = heads_of(w[p + "self_attn.q_proj.weight"] @ y, s.head_dim)
                queries.append([rope(rms(q, w[p + "self_attn.q_norm.weight"], s.eps), position, s.theta) for q in raw])
        scale = 1.0 if s.gemma else 1 / math.sqrt(s.head_dim)
        for i, query in enumerate(queries):
            visible = [j for j in range(a + num_slots) if sees(s, a, a + i, j)]
            outs = []
            for head, q in enumerate(query):
                g = head // (s.num_heads // s.num_kv_heads)
                weights = torch.softmax(torch.stack([q @ keys[j][g] * scale for j in visible]), dim=0)
                outs.append(torch.stack([weights[n] * values[j][g] for n, j in enumerate(visible)]).sum(0))
            attended = w[p + "self_attn.o_proj.weight"] @ torch.cat(outs)
            if s.gemma:
                x = xs[i] + rms(attended, w[p + "post_attention_layernorm.weight"], s.eps)
                f = mlp(rms(x, w[p + "pre_feedforward_layernorm.weight"], s.eps), w, p + "mlp.", gemma=True)
                xs[i] = (x + rms(f, w[p + "post_feedforward_layernorm.weight"], s.eps)) * w[p + "layer_scalar"]
            else:
                x = xs[i] + attended
                xs[i] = x + mlp(rms(x, w[p + "post_attention_layernorm.weight"], s.eps), w, p + "mlp.", gemma=False)
    out = [rms(x, w["norm.weight"], s.eps) for x in xs]
    return out if s.sample_from_anchor else out[1:]


def laws_and_confidence(
    w: Mapping[str, Tensor], s: Sizes, lm_head: Tensor, hidden: Sequence[Tensor], anchor_token: int, tokens: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """(U_k, U_k + B_k, c_k) for k = 1 .. len(tokens), given the tokens drawn."""
    base, biased, confidence = [], [], []
    state = torch.zeros(w["markov_head.markov_w1.weight"].shape[1], dtype=torch.float64)
    for h, before in zip(hidden, [anchor_token, *tokens[:-1]], strict=False):
        e = w["markov_head.markov_w1.weight"][before]
        if s.head_type == "vanilla":
            latent = e
        elif s.head_type == "gated":
            z = w["markov_head.gate_proj.weight"] @ torch.cat([h, e]) + w["markov_head.gate_proj.bias"]
            latent = e / (1 + torch.exp(-z))
        else:
            z = w["markov_head.joint_proj.weight"] @ torch.cat([state, e, h]) + w["markov_head.joint_proj.bias"]
            r = len(e)
            gate = 1 / (1 + torch.exp(-z[:r]))
            state = gate * state + (1 - gate) * torch.tanh(z[r : 2 * r])
            latent = torch.tanh(z[2 * r :])
        u = lm_head @ h
        base.append(u)
        biased.append(u + w["markov_head.markov_w2.weight"] @ latent)
        features = torch.cat([h, e]) if s.with_markov else h
        logit = float(w["confidence_head.proj.weight"][0] @ features + w["confidence_head.proj.bias"][0])
        confidence.append(1 / (1 + math.exp(-logit)))
    return base, biased, confidence
