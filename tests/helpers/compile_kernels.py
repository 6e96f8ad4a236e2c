"""Compile every kernel for an NVIDIA H100 on a machine without one: ``python compile_kernels.py``; fails if one does not compile.

The interpreter accepts much that the compiler does not. Nothing is launched: arguments lie on the CPU, only their types count.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dspark.bench.kernel_cases import SMALL, Maker, all_cases, sampling_rows
from dspark.kernels import draft_rows, edit_logits, group_best, kv_store, ragged_attention, rotary, sampling, small_linear, step_end

DIALECT = GPUTarget("cuda", 90, 32)


class _Device:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return DIALECT


def main() -> None:
    """Run every case of the benchmark with launches replaced by compilations."""
    compiled: set[str] = set()

    def compile_only(self: Any, grid: Any) -> Any:
        def run(*args: Any, **options: Any) -> None:
            self.run(*args, grid=grid, warmup=True, **options)
            compiled.add(self.__name__)

        return run

    triton.runtime.driver.set_active(_Device())
    JITFunction.__getitem__ = compile_only
    ragged_attention._num_processors = lambda device: 132
    for dtype in (torch.bfloat16, torch.float32):
        for module in (group_best, kv_store, ragged_attention, small_linear):
            module.launches_early = lambda device, is_early=dtype == torch.bfloat16: is_early  # type: ignore[attr-defined]
        maker = Maker(torch.device("cpu"), dtype)
        for case in all_cases(maker, SMALL):
            case.make(0).ours()
        for wide in (small_linear.FEW_ROWS_WIDTH, 2 * small_linear.FEW_ROWS_WIDTH):
            small_linear.launch(maker.normal(0, 2, wide), maker.normal(0, 32, wide))
        starts = [torch.zeros(*shape, dtype=torch.int64) for shape in ((2,), (2, 7), (2, 8), (2, 8))]
        fields = (torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int64), *(torch.zeros(16, dtype=torch.int32),) * 2)
        draft_rows.launch_place(draft_rows.StepRows(*fields), (starts[0], starts[1], starts[2], starts[3]), 2, 8)
        rotary.launch_cos_sin(fields[0], torch.ones(8), 1.0, dtype)
        step_end.launch(fields[0], fields[0], fields[0], fields[1], torch.zeros(16, dtype=torch.bool))
        accepted = torch.zeros(2, dtype=torch.int32)
        step_end.launch_chains(starts[1], accepted, accepted, accepted, fields[0], torch.zeros(16, dtype=torch.bool))
        edit_logits.launch_count(starts[1], accepted, accepted, accepted, torch.zeros(2, 64, dtype=torch.int32))
        logits, rows = maker.normal(0, 2, 64), sampling_rows(maker, 2, (1.0, 5, 0.9))
        sampling.write_laws(logits, rows, sampling.settle(logits, rows))
    print(" ".join(sorted(compiled)))


if __name__ == "__main__":
    main()
