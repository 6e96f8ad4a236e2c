"""What ``dspark bench kernels`` runs: every kernel at the shapes that serving gives it, with what each call must move and compute.

Shapes are those of Qwen3-8B: hidden 4096, 32 query and 8 KV heads of 128, inner width 12288, 36 layers, 151,936 ids, blocks of 16
tokens. On a CPU everything is small, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dspark.kernels.chain_judge import Chains
    from dspark.kernels.sampling import SamplingRows

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Calls:
    """One set of inputs: our kernel (None where there is none for the device), its reference, and torch's own equivalent if any."""

    ours: Call
    reference: Call
    own: Call | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at a shape. ``make(seed)`` makes inputs afresh; ``waits``: its reference reads results back, so no graph can hold it."""

    kernel: str
    shape: str
    num_bytes: int  # that must be read and written
    make: Callable[[int], Calls]
    num_flops: int = 0  # of matrix products
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model's shapes."""

    hidden: int = 4096
    inner: int = 12288
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 36
    vocab: int = 151_936
    rank: int = 256
    block: int = 16
    candidates: int = 512
    tokens: tuple[int, ...] = (1, 64, 2048)
    few_tokens: tuple[int, ...] = (1, 8, 16)
    requests: tuple[int, ...] = (1, 64)
    # (rows, new tokens of each, context of each)
    attention: tuple[tuple[int, int, int], ...] = field(
        default=(*((rows, 1, context) for context in (384, 4096) for rows in (1, 64, 256)), (64, 8, 384), (64, 8, 4096), (1, 2048, 2048))
    )


SMALL = Sizes(64, 96, 4, 2, 16, 2, 512, 8, 4, 32, (1, 8), (1, 3), (1, 3), ((1, 1, 24), (4, 1, 24), (3, 4, 24), (1, 16, 16)))


@dataclass(frozen=True, slots=True)
class Maker:
    """Random inputs on a device in a dtype."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, seed: int, *shape: int) -> Tensor:
        import torch

        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)

    def full(self, value: float, count: int, dtype: torch.dtype) -> Tensor:
        import torch

        return torch.full((count,), value, dtype=dtype, device=self.device)


def all_cases(maker: Maker, sizes: Sizes) -> Iterator[Case]:
    """Every kernel at every shape."""
    for count in sizes.tokens:
        yield from layer_cases(maker, sizes, count)
        yield from store_cases(maker, sizes, count)
    for count in sizes.few_tokens:
        yield from small_linear_cases(maker, sizes, count)
    yield tap_case(maker, sizes)
    for rows, length, context in sizes.attention:
        yield attention_case(maker, sizes, rows, length, context)
    yield transfer_case(maker, sizes)
    for requests in sizes.requests:
        yield block_start_case(maker, requests)
        yield candidates_case(maker, sizes, requests)
        yield markov_case(maker, sizes, requests)
        for name, temperature, top_k, top_p in (
            ("greedy", 0.0, 0, 1.0),
            ("T 1", 1.0, 0, 1.0),
            ("top-k 50", 1.0, 50, 1.0),
            ("top-p 0.9", 1.0, 0, 0.9),
        ):
            yield sampling_case(maker, sizes, requests, name, (temperature, top_k, top_p))
        yield judge_case(maker, sizes, requests)
        yield edit_case(maker, sizes, requests)


def layer_cases(maker: Maker, sizes: Sizes, count: int) -> Iterator[Case]:
    """Norm with residual, rotary with head norms, gate: what a layer does around its products."""
    import torch.nn.functional as F

    from dspark.kernels import rms_norm, rotary, swiglu

    itemsize, merged = maker.dtype.itemsize, sizes.heads + 2 * sizes.kv_heads
    turned = (sizes.heads + sizes.kv_heads) * sizes.head_dim

    def norm(seed: int) -> Calls:
        x, residual, weight = (maker.normal(seed, *shape) for shape in ((count, sizes.hidden), (count, sizes.hidden), (sizes.hidden,)))
        args = (x, residual, weight, 1e-6, 0.0)
        return Calls(
            partial(rms_norm.launch, *args),
            partial(rms_norm.reference, *args),
            lambda: F.rms_norm(x + residual, weight.shape, weight, 1e-6),
        )

    def turn(seed: int) -> Calls:
        angles = maker.normal(seed, count, sizes.head_dim)
        norms = rotary.HeadNorms(maker.normal(seed, sizes.head_dim), maker.normal(seed, sizes.head_dim), 1e-6)
        args = (maker.normal(seed, count, merged, sizes.head_dim), angles.cos(), angles.sin(), sizes.heads, sizes.kv_heads, norms)
        return Calls(partial(rotary.launch, *args), partial(rotary.reference, *args))

    def gate(seed: int) -> Calls:
        x = maker.normal(seed, count, 2 * sizes.inner)
        return Calls(partial(swiglu.launch, x), partial(swiglu.reference, x))

    yield Case("rms_norm + residual", f"{count} x {sizes.hidden}", 4 * count * sizes.hidden * itemsize, norm)
    yield Case("rotary + head norms", f"{count} x {sizes.heads + sizes.kv_heads} heads", 2 * count * turned * itemsize, turn)
    yield Case("swiglu", f"{count} x {sizes.inner}", 3 * count * sizes.inner * itemsize, gate)


def store_cases(maker: Maker, sizes: Sizes, count: int) -> Iterator[Case]:
    """Keys and values to their slots, alone and with the rotary in front."""
    import torch

    from dspark.kernels import kv_store, rotary

    itemsize, kept = maker.dtype.itemsize, sizes.kv_heads * sizes.head_dim
    merged = sizes.heads + 2 * sizes.kv_heads

    def store(seed: int) -> Calls:
        heads = maker.normal(seed, count, 2 * sizes.kv_heads, sizes.head_dim)
        key, value = heads[:, : sizes.kv_heads], heads[:, sizes.kv_heads :]
        keys, values = (torch.zeros(2 * count, *key.shape[1:], dtype=maker.dtype, device=maker.device) for _ in range(2))
        slots = torch.arange(count, device=maker.device) * 2

        def plain() -> None:
            keys.index_copy_(0, slots, key)
            values.index_copy_(0, slots, value)

        return Calls(partial(kv_store.launch, key, value, keys, values, slots), plain)

    def turn_and_store(seed: int) -> Calls:
        angles = maker.normal(seed, count, sizes.head_dim)
        norms = rotary.HeadNorms(maker.normal(seed, sizes.head_dim), maker.normal(seed, sizes.head_dim), 1e-6)
        heads = maker.normal(seed, count, merged, sizes.head_dim)
        new = kv_store.Projected(heads, angles.cos(), angles.sin(), sizes.heads, sizes.kv_heads, norms)
        keys, values = (torch.zeros(2 * count, sizes.kv_heads, sizes.head_dim, dtype=maker.dtype, device=maker.device) for _ in range(2))
        slots = torch.arange(count, device=maker.device) * 2

        def plain() -> None:
            turned = rotary.reference(heads, new.cos, new.sin, sizes.heads, sizes.kv_heads, norms)
            keys.index_copy_(0, slots, turned[:, sizes.heads :])
            values.index_copy_(0, slots, heads[:, sizes.heads + sizes.kv_heads :])

        return Calls(partial(kv_store.launch_rotating, new, keys, values, slots), plain)

    yield Case("rotary + kv_store", f"{count} x {merged} heads", 2 * count * merged * sizes.head_dim * itemsize, turn_and_store)
    yield Case("kv_store", f"{count} tokens", 4 * count * kept * itemsize, store)


def small_linear_cases(maker: Maker, sizes: Sizes, count: int) -> Iterator[Case]:
    """The products of a layer for few tokens, with norm, gate and residual in the same launch; torch's own is the bare product."""
    import torch.nn.functional as F

    from dspark.kernels import small_linear

    def make(seed: int, inputs: int, outputs: int, is_gated: bool) -> Calls:
        x, weight = maker.normal(seed, count, inputs), maker.normal(seed + 1, outputs * (1 + is_gated), inputs) / inputs**0.5
        norm = (maker.normal(seed, inputs), 1e-6) if is_gated else None
        args = (x, weight, None, norm, None if is_gated else maker.normal(seed, count, outputs), is_gated)
        return Calls(partial(small_linear.launch, *args), partial(small_linear.reference, *args), lambda: F.linear(x, weight))

    hidden, inner = sizes.hidden, sizes.inner
    for name, inputs, outputs, is_gated in (("norm, gate", hidden, inner, True), ("residual", inner, hidden, False)):
        size = inputs * outputs * (1 + is_gated)
        moved = (size + count * (inputs + outputs * (2 - is_gated))) * maker.dtype.itemsize
        make_case = partial(make, inputs=inputs, outputs=outputs, is_gated=is_gated)
        yield Case("small_linear", f"{count} x {inputs} to {outputs}, {name}", moved, make_case, num_flops=2 * count * size)


def tap_case(maker: Maker, sizes: Sizes) -> Case:
    """Features of every other token from five taps."""
    import torch

    from dspark.kernels import tap_projection

    tokens, num_taps = sizes.tokens[-1] // 4, 5
    chosen = tokens // 2

    def make(seed: int) -> Calls:
        taps = [maker.normal(seed + tap, tokens, sizes.hidden) for tap in range(num_taps)]
        rows = torch.arange(chosen, device=maker.device) * 2
        return Calls(
            partial(tap_projection.launch, taps, rows), partial(tap_projection.reference, taps, rows), lambda: torch.cat(taps, -1)[rows]
        )

    return Case("gather_taps", f"{chosen} of {tokens}, {num_taps} taps", 2 * chosen * num_taps * sizes.hidden * maker.dtype.itemsize, make)


def attention_case(maker: Maker, sizes: Sizes, rows: int, length: int, context: int) -> Case:
    """Rows of equal shape; torch's own is scaled_dot_product_attention over keys and values that lie ready, which pages do not."""
    import torch
    import torch.nn.functional as F

    from dspark.kernels import ragged_attention as kernel
    from dspark.kernels.paged_attention import AttentionRow, AttentionShape, PagedBatch, paged_attention

    heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.head_dim
    blocks = -(-context // sizes.block)

    def make(seed: int) -> Calls:
        order = torch.randperm(rows * blocks, generator=torch.Generator().manual_seed(seed)).view(rows, blocks)
        described = [AttentionRow(r * length, length, context, table) for r, table in enumerate(order.tolist())]
        query = maker.normal(seed, rows * length, heads, dim)
        keys, values = (maker.normal(seed + i, rows * blocks * sizes.block, kv_heads, dim) for i in (1, 2))
        shape = AttentionShape(dim**-0.5)
        batch = replace(kernel.RaggedBatch.plan(described, sizes.block, maker.device), is_given=True)
        groups = PagedBatch.plan(described, sizes.block, maker.device)
        at = order.to(maker.device)
        dense = [pool.view(rows * blocks, sizes.block, kv_heads, dim)[at].flatten(1, 2)[:, :context] for pool in (keys, values)]
        asked, ready_keys, ready_values = (part.transpose(1, 2) for part in (query.view(rows, length, heads, dim), *dense))
        is_whole = length == context
        seen = (
            None if length == 1 or is_whole else torch.ones(length, context, dtype=torch.bool, device=maker.device).tril(context - length)
        )
        return Calls(
            partial(kernel.launch, query, keys, values, batch, shape),
            partial(paged_attention, query, keys, values, groups, shape),
            lambda: F.scaled_dot_product_attention(asked, ready_keys, ready_values, seen, is_causal=is_whole, enable_gqa=True),
        )

    pairs = rows * (length * (context - length) + length * (length + 1) // 2)
    moved = (2 * rows * context * kv_heads + 2 * rows * length * heads) * dim * maker.dtype.itemsize
    kind = "decode" if length == 1 else "prefill" if length == context else "verify"
    return Case("attention", f"{kind} {rows} x {length}, context {context}", moved, make, num_flops=4 * pairs * heads * dim)


def transfer_case(maker: Maker, sizes: Sizes) -> Case:
    """The KV of a prompt of 64 blocks, all layers."""
    import torch

    from dspark.kernels import block_transfer

    count = 64
    held = sizes.block * sizes.kv_heads * sizes.head_dim

    def make(seed: int) -> Calls:
        pools = [maker.normal(seed + i, 2 * count * sizes.block, sizes.kv_heads, sizes.head_dim) for i in range(2 * sizes.layers)]
        blocks = torch.randperm(2 * count, generator=torch.Generator().manual_seed(seed))[:count].to(maker.device)
        packed = pools[0].new_zeros(count, block_transfer.row_width(pools, sizes.block))
        args = (pools, blocks, sizes.block, packed, True)
        rows = [pool.view(2 * count, held) for pool in pools]
        return Calls(
            partial(block_transfer.launch, *args),
            partial(block_transfer.reference, *args),
            lambda: torch.cat([row.index_select(0, blocks) for row in rows], dim=1),
        )

    return Case(
        "pack_blocks", f"{count} blocks, {sizes.layers} layers", 4 * sizes.layers * count * held * maker.dtype.itemsize, make, waits=True
    )


def block_start_case(maker: Maker, requests: int) -> Case:
    """Where blocks of 7 begin behind a step of as many verified drafts, and their outcome as one tensor."""
    import torch

    from dspark.kernels import draft_rows as kernel

    depth = 7

    def make(seed: int) -> Calls:
        generator = torch.Generator().manual_seed(seed)
        count = requests * (depth + 1)

        def numbers(high: int, *shape: int) -> Tensor:
            return torch.randint(0, high, shape, generator=generator).to(maker.device)

        first_rows, starts = (torch.arange(requests, device=maker.device) * width for width in (depth + 1, 16))
        matched = numbers(2, count) > 0
        step = kernel.StepEnd(numbers(1000, count), matched, first_rows, maker.full(depth, requests, torch.int64), depth)
        paging = kernel.Paging(starts.to(torch.int32), numbers(64, 16 * requests).to(torch.int32), 16, depth + 1, depth)
        bases, tokens = 1 + numbers(100, requests), numbers(1000, requests, depth)
        confidence, margin = maker.normal(seed, requests, depth).float(), maker.normal(seed + 1, requests, depth).float()

        def ours() -> object:
            start = kernel.launch_begin(step.own, bases, paging, step)
            return kernel.launch_pack(tokens, confidence, margin, start.anchors, start.positions)

        def plain() -> object:
            start = kernel.reference_after(step, bases, paging)
            return kernel.reference_pack(tokens, confidence, margin, start.anchors, start.positions)

        return Calls(ours, plain)

    return Case("draft_rows", f"{requests} blocks of {depth}", requests * (depth + 1) * 80, make)


def candidates_case(maker: Maker, sizes: Sizes, requests: int) -> Case:
    """The candidates of blocks of five tokens."""
    from dspark.kernels import group_best as kernel

    count = 5 * requests

    def make(seed: int) -> Calls:
        args = (maker.normal(seed, count, sizes.vocab), sizes.candidates)
        return Calls(partial(kernel.launch, *args), partial(kernel.reference, *args))

    moved = count * (sizes.vocab * maker.dtype.itemsize + sizes.candidates * (maker.dtype.itemsize + 8))
    return Case("best_of_groups", f"{count} x {sizes.vocab} to {sizes.candidates}", moved, make)


def markov_case(maker: Maker, sizes: Sizes, requests: int) -> Case:
    """A block of five tokens: bias of the candidates, law of 64, draw, confidence."""
    import torch

    from dspark.kernels import markov_sample as kernel

    length, count = 5, sizes.candidates

    def make(seed: int) -> Calls:
        w1, w2 = (maker.normal(seed + i, sizes.vocab, sizes.rank) for i in range(2))
        head = kernel.ConfidenceWeights(maker.normal(seed, 1, sizes.hidden + sizes.rank), maker.normal(seed, 1), None)
        rows = kernel.BlockRows(
            anchors=torch.arange(requests, device=maker.device),
            temperature=maker.full(1.0, requests, torch.float32),
            seeds=torch.arange(requests, device=maker.device),
            base_lens=maker.full(100, requests, torch.int64),
            coupled=maker.full(0, requests, torch.bool),
        )
        generator = torch.Generator(maker.device).manual_seed(seed)
        ids = torch.randint(sizes.vocab, (requests, length, count), generator=generator, device=maker.device)
        base, hidden = maker.normal(seed, requests, length, count), maker.normal(seed, requests, length, sizes.hidden)
        args = (base, ids, hidden, rows, kernel.BlockHeads(w1, w2, None, head), 64)
        return Calls(partial(kernel.launch, *args), partial(kernel.reference, *args))

    moved = requests * length * (count * (sizes.rank + 1) + sizes.hidden) * maker.dtype.itemsize
    return Case("markov_sample", f"{requests} x {length} of {count} candidates", moved, make)


def sampling_rows(maker: Maker, count: int, asked: tuple[float, int, float]) -> SamplingRows:
    """``count`` rows that ask for the same (temperature, top_k, top_p)."""
    import torch

    from dspark.kernels.sampling import SamplingRows

    return SamplingRows(
        temperature=maker.full(asked[0], count, torch.float32),
        top_k=maker.full(asked[1], count, torch.int32),
        top_p=maker.full(asked[2], count, torch.float64),
        min_p=maker.full(0.0, count, torch.float64),
        seeds=torch.arange(count, device=maker.device),
        positions=torch.arange(count, device=maker.device),
    )


def sampling_case(maker: Maker, sizes: Sizes, count: int, name: str, asked: tuple[float, int, float]) -> Case:
    """A token a row; torch's own is argmax, or a draw from the softmax of what topk or a sort leaves."""
    import torch

    from dspark.kernels import sampling as kernel

    def make(seed: int) -> Calls:
        logits = maker.normal(seed, count, sizes.vocab) * 3
        rows = sampling_rows(maker, count, asked)

        def own() -> Tensor:
            if asked[0] == 0.0:
                return logits.argmax(-1)
            if asked[1]:
                values, ids = logits.float().topk(min(asked[1], sizes.vocab), dim=-1)
                return ids.gather(1, _drawn(torch.softmax(values, -1)))
            probs = torch.softmax(logits.float(), -1)
            if asked[2] == 1.0:
                return _drawn(probs)
            probs, ids = probs.sort(dim=-1, descending=True)
            return ids.gather(1, _drawn(probs.masked_fill(probs.cumsum(-1) - probs > asked[2], 0.0)))

        return Calls(partial(kernel.settle, logits, rows), partial(kernel.sample_reference, logits, rows), own)

    return Case("sample", f"{count} x {sizes.vocab}, {name}", count * sizes.vocab * maker.dtype.itemsize, make)


def _drawn(probs: Tensor) -> Tensor:
    """A column a row [N, 1]: what torch.multinomial does, without its check that waits for the device."""
    import torch

    return (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)


def judge_case(maker: Maker, sizes: Sizes, requests: int) -> Case:
    """Chains of five drafts under the ratio rule at temperature 1, laws of 64 ids."""
    from dspark.kernels import chain_judge as kernel

    length = 5

    def make(seed: int) -> Calls:
        logits = maker.normal(seed, requests * (length + 1), sizes.vocab) * 3
        rows = sampling_rows(maker, requests * (length + 1), (1.0, 0, 1.0))
        args = (logits, rows, _chains(maker, logits, requests, length))
        return Calls(partial(kernel.launch, *args), partial(kernel.reference, *args))

    moved = requests * (length + 1) * sizes.vocab * maker.dtype.itemsize
    return Case("judge_chains", f"{requests} x {length}, ratio", moved, make, waits=True)


def edit_case(maker: Maker, sizes: Sizes, requests: int) -> Case:
    """Bias, penalties and a mask over the rows of chains of five drafts."""
    import torch

    from dspark.kernels import edit_logits as kernel

    length, width = 5, 16

    def make(seed: int) -> Calls:
        count = requests * (length + 1)
        logits, ids = maker.normal(seed, count, sizes.vocab), maker.normal(seed + 1, requests, width)
        numbers = torch.arange(count, dtype=torch.int32, device=maker.device)
        starts = torch.arange(requests + 1, dtype=torch.int32, device=maker.device) * width
        listed = torch.arange(requests * width, dtype=torch.int32, device=maker.device) % sizes.vocab
        rows = kernel.EditRows(numbers // (length + 1), numbers % (length + 1), numbers.long())
        repetition, presence, frequency = (maker.full(scale, requests, torch.float32) for scale in (1.1, 0.5, 0.2))
        places, never = torch.arange(requests, dtype=torch.int32, device=maker.device), maker.full(1 << 20, requests, torch.int64)
        values = ids.float().flatten()
        edits = kernel.Edits(places, repetition, presence, frequency, starts, listed, values, starts, listed, never)
        drafts = torch.arange(requests * length, device=maker.device).view(requests, length) % sizes.vocab
        counts = torch.zeros(requests, sizes.vocab, dtype=torch.int32, device=maker.device)
        args = (logits, rows, edits, drafts, counts, torch.zeros_like(logits, dtype=torch.float32))
        return Calls(partial(kernel.launch, *args), partial(kernel.reference, *args))

    moved = requests * (length + 1) * sizes.vocab * (maker.dtype.itemsize + 16)
    return Case("edit_logits", f"{requests} x {length + 1} rows", moved, make, waits=True)


def _chains(maker: Maker, logits: Tensor, requests: int, length: int) -> Chains:
    """Drafts that the target's own 64 best ids were softened for."""
    import torch

    from dspark.kernels.chain_judge import RATIO, Chains

    values, ids = logits.view(requests, length + 1, -1)[:, :length].float().topk(64, dim=-1)
    return Chains(
        rules=maker.full(RATIO, requests, torch.int32),
        first_rows=torch.arange(requests, dtype=torch.int32, device=maker.device) * (length + 1),
        counts=maker.full(length, requests, torch.int32),
        seeds=torch.arange(requests, device=maker.device),
        base_lens=maker.full(100, requests, torch.int64),
        drafts=ids[:, :, 0].contiguous(),
        law_ids=ids.contiguous(),
        law_probs=torch.softmax(values / 1.2, -1),
    )
