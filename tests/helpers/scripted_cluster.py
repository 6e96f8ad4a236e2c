"""An application of scripted verifiers, for ``import_path``; Serve's processes import it, so it must be on their path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from helpers.scripted import ScriptedHost
from ray.serve import Application

from dspark.cluster.app import as_config, assemble
from dspark.cluster.verifier import Drafting, Ready
from dspark.config import EngineConfig

STEP_S = 0.01


class Host(ScriptedHost):
    def start(self) -> None:
        """The thread runs since construction."""


def load(config: EngineConfig, progress: Callable[[str], None], drafting: Drafting | None) -> Ready:
    """One token every ``STEP_S`` for each of ``max_num_seqs`` requests."""
    progress("loading nothing")
    host = Host(step_s=STEP_S, per_step=1, max_running=config.max_num_seqs, num_blocks=4096, vocab=1000)
    return Ready(host, "scripted", 2048, {})


def build(args: Mapping[str, Any]) -> Application:
    """As ``build_colocated``, with scripted verifiers."""
    return assemble(as_config(args, "colocated"), load)
