"""The engine that is assembled for a GPU, assembled on the CPU: graphs that compute anew, the drafter inside them, costs measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_model import save_tiny_drafter, save_tiny_model

from dspark.kernels.graphs import plain_calls
from dspark.llm import LLM
from dspark.sampling import SamplingParams
from dspark.workers import build
from dspark.workers.drafter.graph_local import GraphDrafter
from dspark.workers.verifier.memory import measure_reserve

PROMPTS = ["The first line", "and another one, which is longer", "x"]
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=7, max_tokens=40, ignore_eos=True),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny_model(folder / "model")
    return str(model), str(save_tiny_drafter(model, folder / "drafter"))


def settings(folders: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {
        "model": folders[0],
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_batch_tokens": 64,
        "kv_tokens": 2048,
        "profile_cache": False,
    } | more


@pytest.mark.parametrize("speculation", ["off", "static:3", "adaptive", "tree:5"])
def test_the_same_text_as_on_a_cpu(folders: tuple[str, str], speculation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = "none" if speculation == "off" else folders[1]
    with LLM(**settings(folders, drafter="none", speculation="off", profile=False)) as llm:
        wanted = [[out.token_ids for out in llm.generate(PROMPTS, sampling)] for sampling in SAMPLINGS]
    monkeypatch.setattr(build, "uses_graphs", lambda config, target: True)
    monkeypatch.setattr(build, "CudaGraphs", lambda warn: plain_calls)
    with LLM(
        **settings(
            folders, drafter=drafter, speculation=speculation, driver="overlapped", profile=speculation == "adaptive", graph_tokens=32
        )
    ) as llm:
        assert speculation == "off" or isinstance(llm.engine.drafter, GraphDrafter)
        assert [[out.token_ids for out in llm.generate(PROMPTS, sampling)] for sampling in SAMPLINGS] == wanted
        assert llm.engine.ahead.launched or speculation == "tree:5"
        assert speculation == "off" or llm.engine.counters.drafted


def test_ranks_replay_what_their_leader_does(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(**settings(folders, drafter="none", speculation="off", profile=False)) as llm:
        wanted = [[out.token_ids for out in llm.generate(PROMPTS, sampling)] for sampling in SAMPLINGS]
    monkeypatch.setattr(build, "uses_graphs", lambda config, target: True)
    monkeypatch.setattr(build, "CudaGraphs", lambda warn: plain_calls)
    parallel = {"tensor_parallel": 2, "driver": "overlapped", "profile": False, "graph_tokens": 32}
    with LLM(**settings(folders, drafter=folders[1], speculation="tree:5", **parallel)) as llm:
        replayed: list[int] = []
        graphs = llm.engine.runner._graphs
        assert graphs is not None
        replay = graphs.replay
        monkeypatch.setattr(graphs, "replay", lambda size, step: (replayed.append(size), replay(size, step))[1])
        assert [[out.token_ids for out in llm.generate(PROMPTS, sampling)] for sampling in SAMPLINGS] == wanted
        assert replayed
        assert llm.engine.counters.drafted
        assert not llm.engine.ahead.can_run  # the other ranks know no token that the host does not


class _Counting:
    """A probe that runs what it measures."""

    def free_bytes(self) -> int:
        return 0

    def peak_bytes(self, run: Callable[[], None]) -> int:
        run()
        return 1


def test_the_largest_steps_can_be_run(folders: tuple[str, str]) -> None:
    with LLM(**settings(folders, drafter="none", speculation="off", profile=False)) as llm:
        reserve = measure_reserve(llm.engine.target, _Counting(), 600, 100)
        assert reserve.step_bytes == 1
        assert reserve.graph_bytes == 1 + 100 * llm.engine.target.vocab_size * torch.float32.itemsize
