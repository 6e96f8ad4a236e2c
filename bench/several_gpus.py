"""``dspark bench gpus``: what several GPUs give, in one call, without Ray and without a network; on CPUs the same over gloo.

``transport``  bandwidth between two processes by size, and its share of a plain copy from GPU to GPU
``tensor``     a verifier on 1, 2, 4 … ranks: teacher-forced agreement with one rank, time of a decode step
``experts``    the same for experts spread over ranks, on a random model of Qwen3-MoE's shape
``kv``         a request's KV from one verifier to another: over gRPC, and through a pair
``drafting``   a verifier and a draft worker on two devices, against one verifier that drafts for itself, and against two

A part that needs more devices than there are says so; one that fails is reported, and the others go on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from dspark.bench.cohorts import draft_worker
from dspark.bench.gpu_child import Child
from dspark.bench.machine import describe_machine, source_commit
from dspark.bench.metrics import median, percentile
from dspark.bench.tables import Column, Table
from dspark.errors import ConfigError

KIB: Final = 1024
SIZES: Final = tuple(64 * KIB * 4**step for step in range(7))  # 64 KiB to 256 MiB
RANK_COUNTS: Final = (1, 2, 4, 8)
START_S: Final = 900.0
RANDOM: Final = "random "  # how the name of a random model begins
TEXTS: Final = 8  # that ranks are forced through
# A dense and a mixture model of Qwen3's shape: large is Qwen3-8B's and Qwen3-30B-A3B's layers, fewer of them.
SMALL: Final = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 16}
DENSE: Final = {
    "cpu": SMALL | {"num_key_value_heads": 8, "vocab_size": 512},
    "cuda": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 8, "num_attention_heads": 32, "head_dim": 128}
    | {"num_key_value_heads": 8, "vocab_size": 32768},
}
MIXTURE: Final = {
    "cpu": SMALL | {"num_key_value_heads": 8, "vocab_size": 512, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "cuda": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 8, "num_attention_heads": 32, "head_dim": 128}
    | {"num_key_value_heads": 4, "vocab_size": 32768, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GpusPlan:
    """A whole run on ``count`` devices of ``kind`` cpu or cuda. ``model`` None: random ones for ranks, else the embedded model.

    ``streams`` a device, ``tokens`` new ones a request, ``kv_tokens`` of the request whose KV moves.
    """

    kind: str
    count: int
    parts: tuple[str, ...]
    model: str | None
    drafter: str
    speculation: str
    dtype: str
    streams: tuple[int, ...]
    tokens: int
    requests: int
    kv_tokens: int
    repeats: int
    prompts: Path
    sets: tuple[str, ...]
    threads: int | None = None
    sizes: tuple[int, ...] = SIZES

    def device(self, index: int) -> str:
        """The device of a process that uses one."""
        return "cpu" if self.kind == "cpu" else f"cuda:{index}"

    def llm(self, model: str | None, **settings: Any) -> Record:
        """Settings of an engine."""
        return {"model": model, "dtype": self.dtype} | settings

    @property
    def work(self) -> Record:
        """What is decoded."""
        return {"prompts": str(self.prompts), "sets": list(self.sets), "tokens": self.tokens, "repeats": self.repeats}


class NotHere(Exception):
    """A part, or a row of it, cannot run here; why."""


def devices(kind: str, ranks: int | None) -> tuple[str, int]:
    """The kind of device and how many of them are used; ConfigError if there are not so many."""
    import torch

    visible = torch.cuda.device_count()
    kind = ("cuda" if visible else "cpu") if kind == "auto" else kind
    if kind == "cuda" and not visible:
        raise ConfigError("--devices cuda: no GPU is visible")
    if kind == "cuda" and ranks is not None and ranks > visible:
        raise ConfigError(f"--ranks {ranks}: {visible} GPUs are visible")
    return kind, ranks or (visible if kind == "cuda" else 2)


def run_gpus(plan: GpusPlan, out: TextIO | None) -> int:
    """Run the parts, print their rows, write JSON lines; how many parts failed."""
    origin = {"machine": describe_machine(plan.dtype), "commit": source_commit(), "devices": f"{plan.count} x {plan.kind}"}
    backend = "NCCL" if plan.kind == "cuda" else "gloo on CPUs"
    print(f"{plan.count} devices ({plan.kind}), {backend}: {origin['machine']}")
    failed = []
    for name in plan.parts:
        part = PARTS[name]
        table = Table(part.columns)
        print(f"\n== {name}: {part.title}")
        try:
            for record in part.run(plan):
                if "skipped" in record:
                    print(f"{record['what']}: not run: {record['skipped']}")
                else:
                    table.row(*part.cells(record))
                _write(out, {"kind": "several_gpus", "part": name, "backend": backend} | record | origin)
        except NotHere as reason:
            print(f"not run: {reason}")
            _write(out, {"kind": "several_gpus", "part": name, "skipped": str(reason)} | origin)
        except Exception as error:  # noqa: BLE001 - the other parts are measured all the same
            failed.append(name)
            print(f"FAILED: {error}")
            _write(out, {"kind": "several_gpus", "part": name, "failed": str(error)} | origin)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return len(failed)


def _write(out: TextIO | None, record: Record) -> None:
    if out is not None:
        print(json.dumps(record), file=out, flush=True)


def _needs(plan: GpusPlan, count: int) -> None:
    if plan.count < count:
        raise NotHere(f"needs {count} devices")


def _transport(plan: GpusPlan) -> Iterator[Record]:
    _needs(plan, 2)
    from dspark.workers.wire.pair import open_store

    link: dict[int, Record] = {}
    if plan.kind == "cuda":
        with Child("peer_copy", source="cuda:0", target="cuda:1", sizes=plan.sizes, repeats=plan.repeats) as child:
            link = {size: child.hear() for size in plan.sizes}
    store, address = open_store("127.0.0.1")
    settings = {"store": address, "sizes": plan.sizes, "repeats": plan.repeats}
    with Child("pair", rank=0, device=plan.device(0), **settings) as sender, Child("pair", rank=1, device=plan.device(1), **settings):
        for size in plan.sizes:
            told = sender.hear()
            gb_per_s = size / told["seconds"] / 1e9
            copy_gb_per_s = size / link[size]["seconds"] / 1e9 if link else None
            yield {
                "size_bytes": size,
                "ms": 1e3 * told["seconds"],
                "gb_per_s": gb_per_s,
                "copy_gb_per_s": copy_gb_per_s,
                "share_of_link": gb_per_s / copy_gb_per_s if copy_gb_per_s else None,
                "direct_copy": link[size]["direct"] if link else None,
            }
    del store


def _tensor(plan: GpusPlan) -> Iterator[Record]:
    with _model(plan, plan.model, "Qwen3", DENSE[plan.kind]) as (folder, name):
        yield from _on_ranks(plan, folder, name, [(count, 1) for count in RANK_COUNTS])


def _experts(plan: GpusPlan) -> Iterator[Record]:
    with _model(plan, None, "Qwen3Moe", MIXTURE[plan.kind]) as (folder, name):
        yield from _on_ranks(plan, folder, name, [(1, count) for count in RANK_COUNTS])


def _on_ranks(plan: GpusPlan, folder: str, name: str, layouts: Sequence[tuple[int, int]]) -> Iterator[Record]:
    """One verifier after another; each is forced through the text of the first."""
    from dspark.workers.verifier.parallel.loading import check_splits

    texts = None
    room = 2 * max(plan.streams) * (1200 + plan.tokens)
    for tensor, expert in layouts:
        count = tensor * expert
        what: Record = {"what": f"{count} ranks", "tensor_parallel": tensor, "expert_parallel": expert, "model": name}
        try:
            _needs(plan, count)
            check_splits(folder, None, tensor, expert)
        except (NotHere, ConfigError) as reason:
            yield what | {"skipped": str(reason)}
            continue
        llm = plan.llm(folder, device=plan.kind, tensor_parallel=tensor, expert_parallel=expert, kv_tokens=room)
        work = plan.work | {"streams": plan.streams, "texts": TEXTS, "noise": name.startswith(RANDOM)}
        with Child("ranks", llm=llm, threads=plan.threads, work=work, texts=texts) as child:
            told = child.hear()
        texts = texts or told["texts"]
        yield what | {
            "agreement": told["agreed"] / told["forced"],
            "forced_tokens": told["forced"],
            "step_ms": told["step_ms"],
            "tokens_per_s_per_device": {streams: 1e3 * int(streams) / ms / count for streams, ms in told["step_ms"].items()},
            "expert_load_imbalance": told["imbalance"],
        }


def _kv(plan: GpusPlan) -> Iterator[Record]:
    _needs(plan, 2)
    salts = {transport: [f"{transport} {i}" for i in range(plan.repeats + 1)] for transport in ("grpc", "collective")}
    room = (plan.kv_tokens + 64) * sum(map(len, salts.values()))
    engines = [plan.llm(plan.model, device=plan.device(i), kv_tokens=room, max_num_seqs=1) for i in range(2)]
    shared = {"threads": plan.threads, "tokens": plan.kv_tokens}
    with Child("kv_giver", llm=engines[0], salts=[s for own in salts.values() for s in own], **shared) as giver:
        address = giver.hear()["address"]
        with Child("kv_taker", llm=engines[1], salts=salts, address=address, **shared) as taker:
            for transport, own in salts.items():
                told = [taker.hear() for _ in own]
                seconds = median([one["seconds"] for one in told[1:]])
                yield {
                    "transport": transport,
                    "tokens": plan.kv_tokens,
                    "bytes": told[0]["num_bytes"],
                    "first_s": told[0]["seconds"],
                    "seconds": seconds,
                    "gb_per_s": told[0]["num_bytes"] / seconds / 1e9,
                }
        giver.tell(end=True)


def _drafting(plan: GpusPlan) -> Iterator[Record]:
    """Each arrangement gets ``streams`` for every device that it takes, draft devices included."""
    for name, verifiers, workers in (("disaggregated", 1, 1), ("colocated", 2, 0), ("colocated", 1, 0)):
        count = verifiers + workers
        what: Record = {"what": f"{name} on {count} devices", "topology": name, "verifiers": verifiers, "draft_workers": workers}
        try:
            _needs(plan, count)
        except NotHere as reason:
            yield what | {"skipped": str(reason)}
            continue
        for streams, told in _serve(plan, verifiers, workers):
            yield what | {"num_devices": count, "streams": streams} | _summary(told, count)


def _serve(plan: GpusPlan, verifiers: int, workers: int) -> Iterator[tuple[int, list[Record]]]:
    """Streams of one arrangement, and what each verifier of it measured, all under load at the same time."""
    shared = {"drafter": plan.drafter, "speculation": plan.speculation}
    levels = [streams * (verifiers + workers) for streams in plan.streams]
    with ExitStack() as stack:
        worker = None
        if workers:
            most = str(max(levels))
            flags = ["--device", plan.device(verifiers), "--drafter", plan.drafter, "--dtype", plan.dtype, "--max-num-seqs", most]
            flags += ["--threads", str(plan.threads)] if plan.threads else []
            worker = stack.enter_context(draft_worker([*([plan.model] if plan.model else []), *flags], START_S))
        work = plan.work | {"levels": [(streams // verifiers, max(plan.requests, streams) // verifiers) for streams in levels]}
        children = []
        for index in range(verifiers):
            llm = plan.llm(plan.model, device=plan.device(index), **shared)
            children.append(stack.enter_context(Child("drafts", llm=llm, threads=plan.threads, work=work, worker=worker)))
        for streams in levels:
            for child in children:
                child.hear()
            for child in children:
                child.tell(go=True)
            yield streams, [child.hear() for child in children]


def _summary(told: Sequence[Record], num_devices: int) -> Record:
    seconds = max(one["seconds"] for one in told)
    rate = sum(one["tokens"] for one in told) / seconds
    ttft, tpot = ([value for one in told for value in one[name]] for name in ("ttft_s", "tpot_s"))
    rounds = sum(one["drafted_rounds_total"] for one in told)
    return {
        "tokens_per_s": rate,
        "tokens_per_s_per_device": rate / num_devices,
        "ttft_p50_ms": 1e3 * percentile(ttft, 50),
        "tpot_p50_ms": 1e3 * percentile(tpot, 50) if tpot else None,
        "accepted_length": 1.0 + sum(one["accepted_tokens_total"] for one in told) / rounds if rounds else None,
    }


@contextmanager
def _model(plan: GpusPlan, given: str | None, family: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A model folder and its name: the one that is given, or a random one that is written for a while."""
    if given is not None:
        yield given, given
        return
    with tempfile.TemporaryDirectory(prefix="dspark-") as folder:
        with Child("random_model", folder=folder, family=family, config=config, dtype=plan.dtype, device=plan.kind) as child:
            size = child.hear()["parameters"] / 1e9
        yield folder, f"{RANDOM}{family}, {config['num_hidden_layers']} layers, {size:.2g} B"


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to measure: what its rows are called and made of."""

    title: str
    run: Callable[[GpusPlan], Iterator[Record]]
    columns: tuple[Column, ...]
    cells: Callable[[Record], Sequence[object]]


def _rank_cells(record: Record) -> Sequence[object]:
    steps = ", ".join(f"{streams}: {ms:.2f}" for streams, ms in record["step_ms"].items())
    rates = ", ".join(f"{streams}: {rate:,.0f}" for streams, rate in record["tokens_per_s_per_device"].items())
    agreement = f"{100 * record['agreement']:.1f} %"
    return (record["what"], agreement, record["forced_tokens"], steps, rates, record["expert_load_imbalance"], record["model"])


def _transport_cells(record: Record) -> Sequence[object]:
    share = record["share_of_link"]
    return (
        f"{record['size_bytes'] // KIB} KiB",
        f"{record['ms']:.3f}",
        record["gb_per_s"],
        record["copy_gb_per_s"],
        None if share is None else f"{100 * share:.0f} %",
    )


_RANK_COLUMNS: Final = (
    Column("ranks", 8, is_text=True),
    Column("agreement", 9),
    Column("of tokens", 9),
    Column("streams: ms a step", 24, is_text=True),
    Column("tok/s a device", 20, is_text=True),
    Column("imbalance", 9),
    Column("model", 20, is_text=True),
)
PARTS: Final[Mapping[str, Part]] = {
    "transport": Part(
        "bytes between two processes",
        _transport,
        (Column("size", 11), Column("ms", 8), Column("GB/s", 8), Column("copy GB/s", 9), Column("share", 6)),
        _transport_cells,
    ),
    "tensor": Part("a target split over ranks", _tensor, _RANK_COLUMNS, _rank_cells),
    "experts": Part("experts spread over ranks", _experts, _RANK_COLUMNS, _rank_cells),
    "kv": Part(
        "a request's KV from one verifier to another",
        _kv,
        (Column("transport", 10, True), Column("tokens", 7), Column("MiB", 8), Column("first s", 8), Column("s", 8), Column("GB/s", 8)),
        lambda r: (r["transport"], r["tokens"], r["bytes"] / KIB**2, r["first_s"], f"{r['seconds']:.4f}", f"{r['gb_per_s']:.3f}"),
    ),
    "drafting": Part(
        "where drafts are made, by device",
        _drafting,
        (
            Column("topology", 14, is_text=True),
            Column("devices", 7),
            Column("streams", 7),
            Column("tok/s", 9),
            Column("tok/s a device", 14),
            Column("TTFT p50 ms", 11),
            Column("TPOT p50 ms", 11),
            Column("acc.len", 7),
        ),
        lambda r: (
            *(r[name] for name in ("topology", "num_devices", "streams", "tokens_per_s", "tokens_per_s_per_device")),
            *(r[name] for name in ("ttft_p50_ms", "tpot_p50_ms", "accepted_length")),
        ),
    ),
}
