"""Linear layers for few rows in bf16 on a GPU: within one percent of fp64, at the shapes of real models. ``-s`` prints their speed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from dspark.kernels.small_linear import reference, small_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SHAPES = {"smollm2": (576, 1536, 960), "qwen3-8b": (4096, 12288, 6144)}


def _microseconds(run: Callable[[], object]) -> float:
    graph = torch.cuda.CUDAGraph()
    run()
    with torch.cuda.graph(graph):
        for _ in range(20):
            run()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / 20


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("rows", [1, 6, 16])
def test_products_are_within_one_percent_of_fp64(model: str, rows: int) -> None:
    width, inner, merged = SHAPES[model]
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x, middle = torch.randn(rows, width, **options), torch.randn(rows, inner, **options)
    norm = (torch.rand(width, **options) + 0.5, 1e-5)
    layers = {
        "qkv": (x, torch.randn(merged, width, **options) / width**0.5, {"norm": norm}),
        "out": (x, torch.randn(width, width, **options) / width**0.5, {"residual": x}),
        "gate up": (x, torch.randn(2 * inner, width, **options) / width**0.5, {"norm": norm, "is_gated": True}),
        "down": (middle, torch.randn(width, inner, **options) / inner**0.5, {"residual": x}),
    }
    for name, (given, weight, parts) in layers.items():
        exact = {key: (part[0].double(), part[1]) if key == "norm" else part for key, part in parts.items()}
        exact |= {"residual": parts["residual"].double()} if "residual" in parts else {}
        expected = reference(given.double(), weight.double(), **exact)  # type: ignore[arg-type]
        actual = small_linear(given, weight, **parts)  # type: ignore[arg-type]
        assert (actual.double() - expected).norm() / expected.norm() < 1e-2
        ours, theirs = (_microseconds(partial(run, given, weight, **parts)) for run in (small_linear, reference))
        print(f"{model} {rows} rows {name}: {ours:.1f} us ({weight.nbytes / ours / 1e6:.2f} TB/s), torch {theirs:.1f} us")
