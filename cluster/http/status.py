"""GET /status: the cluster in one JSON object, for ``dspark status`` and for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import dspark
from dspark.cluster.http.metering import Family
from dspark.cluster.http.service import Service
from dspark.router.outlook import TYPICAL_PROMPT_TOKENS
from dspark.router.predict import NOTHING_SENT, predicted_tpot, predicted_ttft
from dspark.router.scaling import Decision
from dspark.types import ReplicaView
from dspark.workers.wire.codec import Status

SHOWN: Final = ("drafter", "speculation", "dtype", "device", "tensor_parallel", "expert_parallel")  # effective settings of a verifier


@dataclass(frozen=True, slots=True)
class DraftWorkerStatus:
    """A draft worker in the status.

    ``verifiers`` are connected to it; ``busy`` is the share of the time that it drafts, None while nobody knows.
    """

    id: str
    state: str
    verifiers: int
    requests: int
    blocks: int
    free_blocks: int
    busy: float | None


@dataclass(frozen=True, slots=True)
class Around:
    """What a router knows from others: metrics of all routers together, how many they are, scaling's last word, draft workers."""

    families: Sequence[Family]
    num_routers: int
    decision: Decision | None
    draft_workers: Sequence[DraftWorkerStatus]


def cluster_status(service: Service, around: Around) -> dict[str, Any]:
    """Everything that is known."""
    families, decision = around.families, around.decision
    fleet = service.dispatcher.fleet
    statuses = fleet.statuses
    healthy = sum(status.healthy for status in statuses)
    by_replica: dict[tuple[str, ...], float] = {
        (labels["replica"], labels["met"]): value for labels, value in _series(families, "dspark_replica_budget_requests_total")
    }
    in_flight = sum(value for _, value in _series(families, "dspark_in_flight"))
    return {
        "status": "draining" if service.dispatcher.is_draining else "ok" if healthy else "no verifier makes progress",
        "model": service.model_name,
        "version": dspark.__version__,
        "max_model_len": service.max_model_len,
        "routers": {"count": around.num_routers, "in_flight": int(in_flight)},
        "verifiers": [
            _verifier(status, fleet.described(status.view.id)) | {"budgets": _kept(by_replica, status.view.id)}
            for status in sorted(statuses, key=lambda s: s.view.id)
        ],
        "draft_workers": [dataclasses.asdict(worker) for worker in around.draft_workers],
        "scaling": None if decision is None else _scaling(decision),
        "service_classes": _classes(service, families),
    }


def _verifier(status: Status, described: Mapping[str, object]) -> dict[str, Any]:
    view, stats = status.view, status.stats
    return {
        "id": view.id,
        "address": view.address,
        "state": "draining" if view.draining else "ok" if status.healthy else "no progress",
        "age_s": round(view.age_s, 3),
        "settings": {name: described[name] for name in SHOWN if name in described},
        "requests": {"running": view.running, "waiting": view.queued, "places": view.max_running, "queued_tokens": view.queued_tokens},
        "kv": {"blocks": view.num_blocks, "free_blocks": view.free_blocks},
        "generated_tokens": int(stats.get("generation_tokens_total", 0)),
        "tokens_per_round": round(view.tokens_per_round, 3),
        "acceptance": _acceptance(stats),
        "speculation": {"state": view.speculation.value, "limit": view.speculation_limit},
        "predicted": _predicted(view),
    }


def _acceptance(stats: Mapping[str, float]) -> dict[str, float | None]:
    """Of the verifier's life: accepted / verified drafted tokens, and tokens a round that verified drafts."""
    drafted, rounds = stats.get("draft_tokens_total", 0.0), stats.get("drafted_rounds_total", 0.0)
    accepted = stats.get("accepted_tokens_total", 0.0)
    return {"rate": round(accepted / drafted, 4) if drafted else None, "length": round(1.0 + accepted / rounds, 3) if rounds else None}


def _predicted(view: ReplicaView) -> dict[str, float] | None:
    """What one more request would see; None without a cost table."""
    if not view.step_costs:
        return None
    ttft_s = predicted_ttft(view, TYPICAL_PROMPT_TOKENS, 0, NOTHING_SENT)
    return {"ttft_ms": round(1e3 * ttft_s, 1), "tpot_ms": round(1e3 * predicted_tpot(view, view.running + view.queued + 1), 2)}


def _scaling(decision: Decision) -> dict[str, Any]:
    return {
        "state": decision.state.value,
        "wanted_verifiers": decision.wanted,
        "speculation_limit": decision.speculation_limit,
        "budgets_met": decision.met,
        "reason": decision.reason,
    }


def _classes(service: Service, families: Sequence[Family]) -> list[dict[str, Any]]:
    """Each class, and requests of no class that had a budget, with what was met since the start of the routers."""
    counts: dict[tuple[str, ...], float] = {
        (labels["service_class"], labels["budget"], labels["met"]): value
        for labels, value in _series(families, "dspark_budget_requests_total")
    }
    late = {labels["service_class"]: value for labels, value in _series(families, "dspark_late_rejections_total")}
    good = {labels["service_class"]: value for labels, value in _series(families, "dspark_goodput_requests_total")}
    names = dict.fromkeys([*service.classes.by_name, *(name for name, _, _ in counts)])
    shown = []
    for name in names:
        offered = service.classes.by_name.get(name)
        shown.append(
            {
                "name": name or None,
                "is_default": bool(name) and name == service.classes.default,
                "ttft_ms": offered.ttft_ms if offered else None,
                "tpot_ms": offered.tpot_ms if offered else None,
                "ttft": _kept(counts, name, "ttft"),
                "tpot": _kept(counts, name, "tpot"),
                "goodput_requests": int(good.get(name, 0)),
                "late_rejections": int(late.get(name, 0)),
            }
        )
    return shown


def _kept(counts: Mapping[Any, float], *name: str) -> dict[str, Any]:
    met, missed = counts.get((*name, "true"), 0.0), counts.get((*name, "false"), 0.0)
    return {"met": int(met), "missed": int(missed), "share": round(met / (met + missed), 4) if met + missed else None}


def _series(families: Sequence[Family], sample_name: str) -> Iterable[tuple[dict[str, str], float]]:
    """(labels, value) of every series of one name."""
    return [(labels, value) for _, _, _, samples in families for name, labels, value in samples if name == sample_name]
