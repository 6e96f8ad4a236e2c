"""A fleet over in-process links, without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from helpers.scripted import ScriptedHost

from dspark.cluster.dispatch import Dispatcher
from dspark.cluster.fleet import Fleet, ReplicaFacts
from dspark.workers.wire.link import Link
from dspark.workers.wire.local import LocalLink


def facts_of(name: str, fingerprint: str = "model") -> ReplicaFacts:
    return ReplicaFacts(name, f"local:{name}", "secret", fingerprint, "tiny", 1024, {})


@dataclass
class Hosts:
    """Verifiers that a test can add, kill and stop listing."""

    hosts: dict[str, ScriptedHost] = field(default_factory=dict)
    links: dict[str, LocalLink] = field(default_factory=dict)
    listed: dict[str, ReplicaFacts] = field(default_factory=dict)
    is_silent: bool = False  # Serve does not answer

    def add(self, name: str, host: ScriptedHost, fingerprint: str = "model") -> None:
        self.hosts[name] = host
        self.listed[name] = facts_of(name, fingerprint)

    def kill(self, name: str) -> None:
        """The process dies: its link falls, and Serve stops listing it."""
        self.links[name].kill()
        self.listed.pop(name, None)

    async def discover(self) -> Sequence[ReplicaFacts] | None:
        return None if self.is_silent else list(self.listed.values())

    def connect(self, facts: ReplicaFacts) -> Link:
        self.links[facts.replica_id] = LocalLink(facts.replica_id, self.hosts[facts.replica_id])
        return self.links[facts.replica_id]


@asynccontextmanager
async def serving(hosts: Hosts, max_waiting: int = 8, replay_wait_s: float = 3.0) -> AsyncIterator[Dispatcher]:
    fleet = Fleet(hosts.discover, hosts.connect)
    await fleet.refresh()
    await fleet.start()
    try:
        yield Dispatcher(fleet, max_waiting, replay_wait_s)
    finally:
        await fleet.close()
        for host in hosts.hosts.values():
            host.close()
