"""What the status says of draft workers: their last reports, and how busy they were between two of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from dspark.cluster import draft_watch
from dspark.cluster.draft_watch import DraftWatch


def report(name: str, busy_s: float, state: str = "ready") -> dict[str, Any]:
    stats = {"num_requests": 3.0, "num_blocks": 10.0, "num_free_blocks": 4.0, "draft_seconds_total": busy_s}
    return {"id": name, "state": state, "verifiers": 2, "described": {}, "stats": stats}


def test_busy_is_the_share_of_the_time_between_two_reports() -> None:
    answers: list[Sequence[dict[str, Any]] | None] = [
        [report("b", 5.0), report("a", 1.0)],
        [report("a", 1.5), report("b", 5.0, "no progress")],
        None,
        None,
        [report("a", 9.0)],
        [report("a", 19.0)],
        [],
    ]

    async def ask() -> Sequence[dict[str, Any]] | None:
        return answers.pop(0)

    async def test() -> None:
        watch = DraftWatch(ask)
        assert await watch() == []
        seen = []
        for now_s in (10.0, 12.0, 14.0, 22.5, 24.0, 26.0, 28.0):
            await watch.refresh(now_s)
            seen.append([(worker.id, worker.state, worker.busy) for worker in await watch()])
        assert seen[0] == [("a", "ready", None), ("b", "ready", None)]
        assert seen[1] == seen[2] == [("a", "ready", 0.25), ("b", "no progress", 0.0)]
        assert seen[3] == [("a", "silent", None), ("b", "silent", None)], "nobody knows what became of them"
        assert seen[4] == [("a", "ready", 0.625)]
        assert seen[5] == [("a", "ready", 1.0)], "a share is never over 1"
        assert seen[6] == []

    asyncio.run(test())


def test_it_goes_on_asking_whatever_is_raised(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(draft_watch, "PERIOD_S", 0.01)
    asked = 0

    async def ask() -> Sequence[dict[str, Any]]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise RuntimeError("Serve is not there")
        return [report("a", 1.0)]

    async def test() -> None:
        watch = DraftWatch(ask)
        task = asyncio.create_task(watch.run())
        async with asyncio.timeout(5):
            while not await watch():
                await asyncio.sleep(0.01)
        task.cancel()
        (worker,) = await watch()
        assert (worker.verifiers, worker.requests, worker.blocks, worker.free_blocks) == (2, 3, 10, 4)

    asyncio.run(test())
