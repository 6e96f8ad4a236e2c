# mypy: ignore-errors
"""What kernels say so that a chain of short ones overlaps: programmatic dependent launch, on Hopper and later.

A kernel that is launched so may begin as soon as all programs of the one before it have called ``begin_early``. Until it has called
``wait_for_earlier`` it may read what no earlier kernel of the stream writes (weights), and write nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin_early(IS_CHAINED: tl.constexpr):
    """Let the next kernel begin."""
    if IS_CHAINED:
        gdc_launch_dependents()


@triton.jit
def wait_for_earlier(IS_CHAINED: tl.constexpr):
    """Wait until all earlier kernels have ended and their results can be read."""
    if IS_CHAINED:
        gdc_wait()
