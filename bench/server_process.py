"""A ``dspark serve`` of our own for the length of a measurement."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dspark.errors import ConfigError

STOP_S = 60.0
LOG_TAIL_CHARS = 2000


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(command: Sequence[str], url: str, start_s: float) -> Iterator[None]:
    """Run a server until the block ends; ConfigError with the end of its output if /health is not 200 in ``start_s``."""
    with tempfile.NamedTemporaryFile("w+", prefix="dspark-serve-", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            _wait_until_healthy(process, url, start_s, Path(log.name))
            yield
        finally:
            _stop(process)


def serve_command(model: str | None, port: int, settings: Sequence[str]) -> list[str]:
    """The command line of a server on this machine."""
    return [sys.executable, "-m", "dspark", "serve", *([model] if model else []), "--port", str(port), *settings]


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, start_s: float, log: Path) -> None:
    deadline = time.monotonic() + start_s
    while not _is_healthy(url):
        if process.poll() is not None:
            raise ConfigError(f"the server ended with status {process.returncode}:\n{log.read_text()[-LOG_TAIL_CHARS:]}")
        if time.monotonic() > deadline:
            raise ConfigError(f"the server was not healthy after {start_s:g} s:\n{log.read_text()[-LOG_TAIL_CHARS:]}")
        time.sleep(0.5)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, and insist if it does not: nothing may be left behind. (What a script starts in the background ignores SIGINT.)"""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
