"""Service classes: named latency budgets and priorities that an operator offers, and what they mean for one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dspark.config import ServiceClass
from dspark.errors import BadRequest
from dspark.types import LatencyBudget


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request is promised. ``service_class`` is empty for requests of no class."""

    service_class: str
    budget: LatencyBudget
    priority: int
    reject_when_late: bool


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a cluster; requests that name none are of ``default``, if there is one."""

    by_name: Mapping[str, ServiceClass]
    default: str | None = None

    def terms(self, name: str | None, own: LatencyBudget, priority: int | None) -> Terms:
        """What a request gets; its own budget and priority win over its class field by field.

        ``BadRequest`` names ``service_class`` if there is no such class.
        """
        chosen = self.default if name is None else name
        if chosen is None:
            return Terms("", own, priority or 0, False)
        if chosen not in self.by_name:
            known = ", ".join(self.by_name) or "none"
            raise BadRequest(f"there is no service class {chosen!r}; known are: {known}", "service_class", "unknown_service_class")
        offered = self.by_name[chosen]
        budget = LatencyBudget(
            offered.ttft_ms if own.ttft_ms is None else own.ttft_ms,
            offered.tpot_ms if own.tpot_ms is None else own.tpot_ms,
        )
        return Terms(chosen, budget, offered.priority if priority is None else priority, offered.reject_when_late)
