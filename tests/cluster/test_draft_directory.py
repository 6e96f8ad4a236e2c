"""The directory names draft workers to links, whenever both are there, and only when something changed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dspark.cluster import draft_directory
from dspark.cluster.draft_directory import DraftDirectory
from dspark.drafting import DraftWorkerFacts

ONE, TWO = DraftWorkerFacts("a", "x:1", "t"), DraftWorkerFacts("b", "x:2", "t")


class Links:
    def __init__(self) -> None:
        self.named: list[list[str]] = []

    def set_workers(self, facts: Sequence[DraftWorkerFacts]) -> None:
        self.named.append([fact.worker_id for fact in facts])


def test_workers_are_named_when_they_change() -> None:
    answers: list[Sequence[DraftWorkerFacts] | None] = [[ONE], [ONE], None, [ONE, TWO], []]

    async def discover() -> Sequence[DraftWorkerFacts] | None:
        return answers.pop(0)

    async def test() -> None:
        directory, early, late = DraftDirectory(discover), Links(), Links()
        directory.attach(early)
        for _ in range(4):
            await directory.refresh()
        directory.attach(late)
        await directory.refresh()
        assert early.named == [[], ["a"], ["a", "b"], []]
        assert late.named == [["a", "b"], []]

    asyncio.run(test())


def test_it_goes_on_asking_whatever_discovery_raises(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(draft_directory, "EAGER_REFRESH_S", 0.01)
    asked = 0

    async def discover() -> Sequence[DraftWorkerFacts]:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise RuntimeError("Serve is not there")
        return [ONE]

    async def test() -> None:
        directory, links = DraftDirectory(discover), Links()
        directory.attach(links)
        directory.start()
        async with asyncio.timeout(5):
            while links.named != [[], ["a"]]:
                await asyncio.sleep(0.01)
        directory.close()

    asyncio.run(test())
