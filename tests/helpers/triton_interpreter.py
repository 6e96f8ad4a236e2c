"""Triton's interpreter on machines without a GPU, for tests of kernels."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch


def use_interpreter() -> None:
    """Let kernels run on the CPU, slowly, where there is no GPU; call it before triton is imported."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and when a kernel is defined


def mend_interpreter() -> None:
    """Triton 3.6 turns bounds of loops into integers in a way that numpy 2.4 refuses (arrays of one element)."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
