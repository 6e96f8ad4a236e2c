"""A real server in a process of its own: ``python -m dspark serve``."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(log: Path, *arguments: str) -> Iterator[Server]:
    """A server that is ready, and gone afterwards with all its processes."""
    running = Server(log, *arguments)
    try:
        yield running.wait()
    finally:
        running.stop()
        left = running.processes()
    assert not left, f"processes outlived the server: {left}"


class Server:
    """Starts on construction; ``wait`` returns when it is ready."""

    def __init__(self, log: Path, *arguments: str, env: dict[str, str] | None = None, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dspark", "serve", *arguments, "--port", str(self.port)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> Server:
        deadline = time.monotonic() + START_S
        while "ready in" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not get ready:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.1)
        return self

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def processes(self) -> dict[int, str]:
        """Every living process of the server's session, by id, with its command line."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                fields = rest.split()
                if int(fields[3]) == self.process.pid and fields[0] not in "ZX":
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ") or name
            except OSError:
                continue
        return found

    def verifiers(self) -> list[int]:
        """Process ids of the verifier replicas."""
        return [pid for pid, command in self.processes().items() if "ServeReplica:dspark:Verifier" in command]

    def listening(self) -> set[tuple[str, int, str]]:
        """Address, port and command line of every TCP port that the server's processes listen on."""
        owners: dict[str, str] = {}
        for pid, command in self.processes().items():
            for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
                try:
                    target = str(descriptor.readlink())
                except OSError:
                    continue
                if target.startswith("socket:["):
                    owners[target[8:-1]] = command
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in owners:
                    host, port = fields[1].split(":")
                    words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]  # little-endian words
                    address = ipaddress.ip_address(b"".join(words))
                    address = getattr(address, "ipv4_mapped", None) or address
                    found.add((str(address), int(port, 16), owners[fields[9]]))
        return found

    def metrics(self, name: str) -> dict[str, float]:
        """The series of one metric, by replica (or the empty name)."""
        text = httpx.get(f"{self.url}/metrics").text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
        return {s.labels.get("replica", ""): s.value for s in samples}

    def ray_metrics(self, name: str) -> list[str]:
        """Lines of one metric at any of the endpoints where Ray's agents show metrics to Prometheus."""
        lines: list[str] = []
        for port in {port for _, port, _ in self.listening()} - {self.port}:
            try:
                text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=1.0).text
            except httpx.HTTPError:  # it speaks something else
                continue
            lines += [line for line in text.splitlines() if line.startswith(name)]
        return lines

    def dashboard(self, path: str) -> Any:
        """What Ray's dashboard answers; the server runs with ``--dashboard``."""
        ports = [port for _, port, command in self.listening() if "dashboard/dashboard.py" in command]
        token = os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray" / "auth_token").read_text().strip()
        for port in ports:  # it also has ports for Ray's own processes
            with contextlib.suppress(httpx.HTTPError, ValueError):
                response = httpx.get(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=20)
                if response.status_code == 200:
                    return response.json()
        raise AssertionError(f"no dashboard answers {path} at ports {ports}")

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **more) if body is not None else httpx.post(self.url + path, **more)
