"""How honest the tree builder's estimates are, on real prompts with the shipped drafter (``-s`` prints the table)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.engines import make_engine, run
from torch import Tensor

from dspark.deploy.default_model import default_cache, default_drafter, prepare
from dspark.sampling import AcceptanceRule, SamplingParams
from dspark.types import DraftTree, Request
from dspark.workers.blocks import BlockPool
from dspark.workers.build import target_head
from dspark.workers.drafter.dialects import load_drafter
from dspark.workers.drafter.local import LocalDrafter
from dspark.workers.verifier.engine import Engine
from dspark.workers.verifier.judge import JudgeItem, Verdict, judge
from dspark.workers.verifier.targets import as_target, load_model, load_tokenizer

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    "ratio": SamplingParams(acceptance=AcceptanceRule.RATIO, max_tokens=40, ignore_eos=True),
    "coupled": SamplingParams(acceptance=AcceptanceRule.COUPLED, max_tokens=40, ignore_eos=True),
}
CANDIDATES = 4
Seen = dict[int, list[tuple[float, bool]]]


@pytest.fixture(scope="module")
def smollm() -> tuple[Engine, list[tuple[int, ...]]]:
    """The embedded model with its drafter, every node verified, and 24 real prompts."""
    folder, drafter_folder = str(prepare(default_cache(), print)), default_drafter()
    assert drafter_folder is not None
    target = as_target(load_model(folder, torch.bfloat16, torch.device("cpu")), folder)
    tokenizer, pool = load_tokenizer(folder), BlockPool(600)
    drafter = LocalDrafter(load_drafter(drafter_folder, target_head(target), torch.bfloat16, target.device), pool)
    prompts = []
    for name in ("chat", "code", "math"):
        lines = (Path(__file__).parents[2] / "bench" / "prompts" / f"{name}.jsonl").read_text().splitlines()
        for text in sorted((json.loads(line)["turns"][0] for line in lines), key=len)[:8]:
            ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
            prompts.append(tuple(ids))
    return make_engine(target, drafter, pool, max_batch_tokens=1024, speculation="tree:12"), prompts


def observe(tree: DraftTree, path: Sequence[int], seen: Seen) -> None:
    """Note confidence and outcome of every node whose parent stood, by its turn among its siblings."""
    stood = {-1, *path}
    turns: dict[int, int] = defaultdict(int)
    for node, parent in enumerate(tree.parents):
        if parent in stood:
            seen[turns[parent]].append((tree.confidence[node], node in stood))
        turns[parent] += 1


@pytest.mark.slow
@pytest.mark.parametrize("rule", SAMPLINGS)
def test_confidence_of_candidates_is_what_is_accepted(smollm: tuple[Engine, list[tuple[int, ...]]], rule: str) -> None:
    engine, prompts = smollm
    seen: Seen = defaultdict(list)

    def noting(logits: Tensor, items: Sequence[JudgeItem]) -> list[Verdict]:
        verdicts = judge(logits, items)
        for item, verdict in zip(items, verdicts, strict=True):
            if item.draft is not None:
                observe(item.draft, verdict.nodes, seen)
        return verdicts

    engine.judge = noting
    run(engine, [Request(str(i), prompt, SAMPLINGS[rule], noise_seed=i) for i, prompt in enumerate(prompts)])
    for turn in range(CANDIDATES):
        predicted, observed = (sum(column) / len(column) for column in zip(*seen[turn], strict=True))
        print(f"{rule} candidate {turn + 1}: predicted {predicted:.3f}, accepted {observed:.3f} of {len(seen[turn])}")
        assert predicted == pytest.approx(observed, abs=0.08 if turn == 0 else 0.04)
