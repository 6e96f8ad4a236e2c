"""From a drafter's module to the drafter of a verifier."""

from __future__ import annotations

from dspark.types import BlockTables, Drafter
from dspark.workers.drafter.dspark_module import DSparkModule
from dspark.workers.drafter.eagle3_local import Eagle3Drafter
from dspark.workers.drafter.eagle3_module import Eagle3Module
from dspark.workers.drafter.local import LocalDrafter

LAW_WIDTH = 256  # ids that support a law which goes through the host or to other machines


def graft(module: DSparkModule | Eagle3Module, tables: BlockTables, law_width: int) -> Drafter:
    """The drafter that drives ``module``."""
    if isinstance(module, Eagle3Module):
        return Eagle3Drafter(module, tables, law_width)
    return LocalDrafter(module, tables, law_width)
