"""Run work that uses OpenMP on a thread that ends with it.

libgomp gives every thread that enters a parallel region a team of its own and keeps it as long as that thread lives. With
more team threads in the process than cores it stops spinning between regions, and each of the hundreds of regions of a
forward then pays for a wake-up: measured on two cores, SmolLM2-135M, one row, bf16: 44 ms a step in a second thread beside
an idle team of the first, 36 ms without. So whoever loads an engine does it here, and the engine's thread has the only team.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def call_in_own_thread(function: Callable[[], T]) -> T:
    """The result of ``function``, or its exception, from a fresh thread that has ended when this returns."""
    with ThreadPoolExecutor(1, thread_name_prefix="own-thread") as pool:
        return pool.submit(function).result()
