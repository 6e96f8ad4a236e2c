"""What the processes of ``dspark bench gpus`` do; each function is one job. Run as ``python -m`` by ``gpu_child.Child``."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dspark.bench.gpu_child import Talk, serve_one_job
from dspark.bench.metrics import median
from dspark.errors import DSparkError
from dspark.kv_blocks import TransferStats
from dspark.sampling import SamplingParams
from dspark.types import KVSource, Request

if TYPE_CHECKING:
    from dspark import LLM
    from dspark.bench.traffic import Job
    from dspark.workers.verifier.host import EngineHost
    from dspark.workers.verifier.kv_exchange import EngineExchange

TOKEN: Final = "bench"
BURST_BYTES: Final = 64 * 2**20  # small buffers are sent several times before the acknowledgement
LEASE_S: Final = 120.0


def pair(talk: Talk, rank: int, store: str, device: str, sizes: Sequence[int], repeats: int) -> None:
    """One end of a pair: rank 0 sends and times buffers of each size until they are acknowledged."""
    import torch

    from dspark.workers.wire.pair import PairGroup, reach_store

    group = PairGroup(reach_store(store), rank, "127.0.0.1", torch.device(device), LEASE_S)
    word = torch.zeros(16, dtype=torch.uint8, device=device)
    for size in sizes:
        buffer = torch.ones(size, dtype=torch.uint8, device=device)
        burst = max(1, min(16, BURST_BYTES // size))
        there, back = (group.send, group.receive) if rank == 0 else (group.receive, group.send)
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            for _ in range(burst):
                there(buffer)
            back(word)
            times.append((time.perf_counter() - began) / burst)
        if rank == 0:
            talk.say(size=size, seconds=median(times[1:]))
    talk.hear()


def peer_copy(talk: Talk, source: str, target: str, sizes: Sequence[int], repeats: int) -> None:
    """Plain copies from one GPU to another in one process: what the link between them gives."""
    import torch

    for size in sizes:
        one, other = (torch.zeros(size, dtype=torch.uint8, device=device) for device in (source, target))
        burst = max(1, min(16, BURST_BYTES // size))
        times = []
        for _ in range(repeats + 1):
            torch.cuda.synchronize(source)
            torch.cuda.synchronize(target)
            began = time.perf_counter()
            for _ in range(burst):
                other.copy_(one, non_blocking=True)
            torch.cuda.synchronize(source)
            torch.cuda.synchronize(target)
            times.append((time.perf_counter() - began) / burst)
        talk.say(size=size, seconds=median(times[1:]), direct=torch.cuda.can_device_access_peer(source, target))


def random_model(talk: Talk, folder: str, family: str, config: Mapping[str, Any], dtype: str, device: str) -> None:
    """Write a model of a transformers family with random weights. Its text is noise, its cost is not."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**config)
    with torch.device("cuda" if device == "cuda" else "cpu"):
        model = getattr(transformers, f"{family}ForCausalLM")(settings)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    talk.say(parameters=sum(p.numel() for p in model.parameters()))


def ranks(
    talk: Talk,
    llm: Mapping[str, Any],
    threads: int | None,
    work: Mapping[str, Any],
    texts: Sequence[tuple[list[int], list[int]]] | None,
) -> None:
    """A verifier over ranks: teacher-forced agreement with ``texts`` (None: its own greedy ones), and time of a decode step."""
    from dspark import LLM

    with LLM(**llm, threads=threads, drafter="none", speculation="off", profile=False, prefix_cache=False) as engine:
        prompts = _prompts(engine, work, max(work["texts"], *work["streams"]))
        if texts is None:
            few = prompts[: work["texts"]]
            outputs = engine.generate(few, _greedy(work["tokens"]))
            texts = [(list(prompt), list(output.token_ids)) for prompt, output in zip(few, outputs, strict=True)]
        agreed, forced = _agreement(engine, texts)
        steps = {str(streams): _step_ms(engine, prompts[:streams], work["tokens"], work["repeats"]) for streams in work["streams"]}
        imbalance = engine.stats().get("expert_load_imbalance")
        talk.say(texts=texts, agreed=agreed, forced=forced, step_ms=steps, imbalance=imbalance)


def kv_giver(talk: Talk, llm: Mapping[str, Any], threads: int | None, tokens: int, salts: Sequence[str]) -> None:
    """A verifier that has computed a request of some tokens once for each salt, and gives their KV until it is told to end."""
    host, exchange = _verifier(llm, threads)
    for salt in salts:
        _compute(host, _request(host, tokens, salt))

    async def give() -> None:
        from dspark.workers.wire.server import WireServer

        server = WireServer(host, "giver", "", TOKEN, exchange=exchange)
        talk.say(address=await server.start("127.0.0.1", with_pairs=True))
        await asyncio.to_thread(talk.hear)
        await server.stop()

    asyncio.run(give())
    host.close()


def kv_taker(
    talk: Talk, llm: Mapping[str, Any], threads: int | None, tokens: int, salts: Mapping[str, Sequence[str]], address: str
) -> None:
    """A verifier that fetches each salt's KV: those of ``grpc`` in messages, those of ``collective`` through a pair."""
    host, exchange = _verifier(llm, threads)
    host.start()

    async def take() -> None:
        from dspark.workers.wire.kv_client import KVFetcher

        for transport, own in salts.items():
            fetcher = KVFetcher(exchange, lease_s=LEASE_S, pair_host="127.0.0.1" if transport == "collective" else None)
            for salt in own:
                stats = await _fetch(fetcher, exchange, _request(host, tokens, salt), KVSource("giver", address, TOKEN))
                talk.say(transport=transport, **stats)
            await fetcher.close()

    asyncio.run(take())
    host.close()


def drafts(talk: Talk, llm: Mapping[str, Any], threads: int | None, work: Mapping[str, Any], worker: Sequence[str] | None) -> None:
    """A verifier under closed load, drafting beside its target or with the draft worker at (address, token).

    ``work`` has ``levels`` of (streams, requests); each begins when the parent says so.
    """
    from dspark import LLM
    from dspark.bench.http_client import Ask
    from dspark.bench.prompt_sets import load_set, take
    from dspark.bench.traffic import Job

    settings = {**llm, "threads": threads, "max_num_seqs": max(streams for streams, _ in work["levels"]), "prefix_cache": False}
    with LLM(**settings) if worker is None else LLM.with_draft_workers([worker[0]], worker[1], **settings) as engine:
        is_chat = getattr(engine.tokenizer, "chat_template", None) is not None
        ask = Ask("", work["tokens"], 0.0, ignore_eos=True, is_chat=is_chat)
        prompts = [prompt for name in work["sets"] for prompt in load_set(Path(work["prompts"]), name)]
        for streams, requests in work["levels"]:
            talk.say(**_level(talk, engine, [Job(ask, prompt) for prompt in take(prompts, requests)], streams))


def _level(talk: Talk, engine: LLM, jobs: Sequence[Job], streams: int) -> dict[str, Any]:
    """What so many streams at once measure, after a first round that warms up whatever is compiled or cached."""
    from dspark.bench.in_process import run_in_process

    run_in_process(engine, jobs[:streams], streams)
    talk.say(ready=True)
    talk.hear()
    before = engine.stats()
    measured = run_in_process(engine, jobs, streams)
    after = engine.stats()
    if measured.errors:
        raise DSparkError(f"{measured.errors.total()} requests failed: {measured.errors.most_common(1)[0][0]}")
    timelines = [answer.timeline for answer in measured.answers if answer.timeline is not None]
    grown = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in ("accepted_tokens_total", "drafted_rounds_total")}
    return {
        "tokens": sum(timeline.num_tokens for timeline in timelines),
        "seconds": measured.seconds,
        "ttft_s": [timeline.ttft_s for timeline in timelines],
        "tpot_s": [timeline.tpot_s for timeline in timelines if timeline.tpot_s is not None],
    } | grown


JOBS: Final[Mapping[str, Callable[..., None]]] = {
    "pair": pair,
    "peer_copy": peer_copy,
    "random_model": random_model,
    "ranks": ranks,
    "kv_giver": kv_giver,
    "kv_taker": kv_taker,
    "drafts": drafts,
}


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def _prompts(llm: LLM, work: Mapping[str, Any], count: int) -> list[list[int]]:
    """Prompts of the sets, or noise for a random model, which has no tokenizer."""
    from dspark.bench.prompt_sets import load_set, take

    if not work["noise"]:
        from dspark.prompting import encode

        return take([list(encode(llm.tokenizer, text)) for name in work["sets"] for text in load_set(Path(work["prompts"]), name)], count)
    import torch

    noise = torch.Generator().manual_seed(0)
    vocabulary = llm.engine.target.model.config.get_text_config(decoder=True).vocab_size
    return [torch.randint(0, vocabulary, (64,), generator=noise).tolist() for _ in range(count)]


def _agreement(llm: LLM, texts: Sequence[tuple[list[int], list[int]]]) -> tuple[int, int]:
    """How many tokens of given texts are the most likely ones here too, each after the text's own tokens; and of how many."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    agreed = total = 0
    for (prompt, output), result in zip(texts, llm.generate([prompt + output for prompt, output in texts], params), strict=True):
        assert result.prompt_logprobs is not None
        scored = [score for score in result.prompt_logprobs[len(prompt) :] if score is not None]
        agreed += sum(score.rank == 1 for score in scored)
        total += len(output)
    return agreed, total


def _step_ms(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, repeats: int) -> float:
    """Milliseconds of a decode step of all prompts at once: what longer texts take more than short ones."""

    def seconds(max_tokens: int) -> float:
        began = time.perf_counter()
        llm.generate(prompts, _greedy(max_tokens), max_concurrency=len(prompts))
        return time.perf_counter() - began

    short = max(1, tokens // 4)
    seconds(short)
    return median([1e3 * (seconds(tokens) - seconds(short)) / (tokens - short) for _ in range(repeats)])


def _verifier(llm: Mapping[str, Any], threads: int | None) -> tuple[EngineHost, EngineExchange]:
    from dspark.config_file import engine_config
    from dspark.workers.build import load_engine
    from dspark.workers.own_thread import call_in_own_thread
    from dspark.workers.verifier.host import EngineHost
    from dspark.workers.verifier.kv_exchange import EngineExchange

    config = engine_config({**llm, "threads": threads, "drafter": "none", "speculation": "off", "profile": False})
    loaded = call_in_own_thread(lambda: load_engine(config))
    host = EngineHost(loaded.engine)
    return host, EngineExchange(loaded.engine, str(config.model), host.between_steps)


def _request(host: EngineHost, tokens: int, salt: str) -> Request:
    """A prompt whose full blocks hold ``tokens``: the last token is always computed."""
    import torch

    vocabulary = host.engine.target.model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(0, vocabulary, (tokens + 1,), generator=torch.Generator().manual_seed(1)).tolist()
    return Request(salt, tuple(prompt), _greedy(1), cache_salt=salt)


def _compute(host: EngineHost, request: Request) -> None:
    host.start()
    ended = threading.Event()
    host.submit(request, lambda outcomes: ended.set() if any(outcome.finish for outcome in outcomes) else None)
    if not ended.wait(LEASE_S * 5):
        raise DSparkError(f"{len(request.prompt_token_ids)} tokens were not computed in {LEASE_S * 5:g} s")


async def _fetch(fetcher: Any, exchange: EngineExchange, request: Request, source: KVSource) -> dict[str, Any]:
    """Fetch one request's KV, all of it; how many bytes, in what time."""
    import dataclasses

    size = exchange.layout.block_size
    before, began = dataclasses.replace(exchange.counters), time.perf_counter()
    blocks = await fetcher.fetch(dataclasses.replace(request, kv_source=source))
    seconds = time.perf_counter() - began
    stats = TransferStats(blocks, exchange.counters.fetched_bytes - before.fetched_bytes, seconds)
    if stats.blocks != (len(request.prompt_token_ids) - 1) // size:
        raise DSparkError(f"{stats.blocks} blocks came of {(len(request.prompt_token_ids) - 1) // size}")
    if exchange.counters.fallbacks > before.fallbacks:
        raise DSparkError("there was no pair: KV came over gRPC")
    return dataclasses.asdict(stats)


if __name__ == "__main__":
    code = serve_one_job(JOBS)
    sys.stderr.flush()
    os._exit(code)  # process groups whose other end is gone may take for ever to be torn down
