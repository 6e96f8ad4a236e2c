"""Every kernel compiles for a GPU, on machines without one: the interpreter accepts much that the compiler does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = (
    "accept add_and_mask angles attend begin best_of_groups copy_blocks count_tokens draw_block draw_residual gate gather_taps multiply"
    " multiply_at_once normalise note_best note_chains pack penalise place rotate rotate_store settle store_kv write_laws"
)
ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests/helpers/compile_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert set(KERNELS.split()) <= set(done.stdout.split())
