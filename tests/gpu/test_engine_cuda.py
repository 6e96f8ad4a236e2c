"""The engine on a GPU, from CUDA graphs: tiny models in fp32 give the text that a CPU gives, real weights nearly always the best token.

``DSPARK_CACHE`` names the folder with the prepared embedded model; without it the tests of real weights are skipped.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers.engines import greedy, make_engine, run, teacher_forced_logits, tiny_target

from dspark.config import EngineConfig
from dspark.kernels.graphs import CudaGraphs
from dspark.workers.build import load_engine
from dspark.workers.drafter.ngram import NgramDrafter
from dspark.workers.verifier.runner import GraphOptions
from dspark.workers.verifier.targets import Target, as_target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPTS = {f"r{i}": [3 + (7 * i + j) % 150 for j in range(3 + 9 * i)] for i in range(8)}
CACHE = os.environ.get("DSPARK_CACHE")
AGREEMENT = 0.97  # of tokens with the best of a forward of another shape, in bf16


def on_gpu(name: str) -> Target:
    return as_target(tiny_target(name).model.to("cuda"), name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("with_drafts", [False, True])
def test_graphs_eager_and_cpu_agree_in_fp32(name: str, with_drafts: bool) -> None:
    requests = [greedy(request, prompt, 24) for request, prompt in PROMPTS.items()]
    wanted = {request: result.tokens for request, result in run(make_engine(tiny_target(name), speculation="off"), requests).items()}
    target = on_gpu(name)
    graphs = GraphOptions(CudaGraphs(), max_tokens=32, max_rows=32, max_model_len=256, longest=6, with_trees=True)
    for options in (None, graphs):
        engine = make_engine(target, NgramDrafter() if with_drafts else None, graphs=options)
        assert {request: result.tokens for request, result in run(engine, requests).items()} == wanted


@pytest.mark.skipif(CACHE is None, reason="DSPARK_CACHE is not set")
@pytest.mark.parametrize("speculation", ["off", "static:5", "adaptive"])
def test_real_weights_agree_with_teacher_forcing(speculation: str) -> None:
    loaded = load_engine(EngineConfig(speculation=speculation, max_num_seqs=32, profile=speculation == "adaptive", profile_cache=False))
    try:
        prompts = [
            f"Write a short story about a {thing}." for thing in ("river", "clock", "teacher", "dog", "boat", "train", "king", "cat")
        ]
        requests = [greedy(f"r{i}", loaded.tokenizer.encode(prompt), 64) for i, prompt in enumerate(prompts)]
        results = run(loaded.engine, requests)
        agreeing: list[bool] = []
        for request in requests:
            tokens = results[request.id].tokens
            best = _best(loaded.engine.target, request.prompt_token_ids, tokens)
            agreeing += [token == other for token, other in zip(tokens, best, strict=True)]
        assert sum(agreeing) >= AGREEMENT * len(agreeing)
    finally:
        loaded.engine.close()


def _best(target: Target, prompt: tuple[int, ...], output: list[int]) -> list[int]:
    best: list[int] = teacher_forced_logits(target, prompt, [output]).argmax(-1)[0].tolist()
    return best
