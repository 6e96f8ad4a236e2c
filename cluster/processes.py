"""Leaving nothing behind: orphans of Ray come back to us instead of to init, and are ended with the rest."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36
_PROC: Final = Path("/proc")


def adopt_orphans() -> bool:
    """Make this process the one that orphaned descendants are handed to. False where the system cannot (not Linux)."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def descendants(of: int | None = None) -> set[int]:
    """Ids of all processes below ``of`` (this process), zombies included; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found: set[int] = set()
    frontier = [os.getpid() if of is None else of]
    while frontier:
        for child in children.get(frontier.pop(), ()):
            if child not in found:
                found.add(child)
                frontier.append(child)
    return found


def process_name(pid: int) -> str:
    """The name of a running process; empty for zombies and for processes that are gone."""
    try:
        name, _, rest = (_PROC / str(pid) / "stat").read_text().rpartition(")")
    except OSError:
        return ""
    return "" if rest.split()[0] in "ZX" else name.partition("(")[2]


def end_descendants(spare: set[int], grace_s: float) -> int:
    """End every descendant but ``spare``: wait ``grace_s`` for it to go by itself, then kill. Returns how many were killed."""
    deadline = time.monotonic() + grace_s
    killed: set[int] = set()
    while left := _living(descendants() - spare):
        if time.monotonic() >= deadline:
            killed |= left
            for pid in left:
                _signal(pid, signal.SIGKILL)
            if time.monotonic() >= deadline + 5.0:
                break
        time.sleep(0.05)
    return len(killed)


def bounded(work: Callable[[], object], timeout_s: float) -> bool:
    """Run ``work`` in a thread; False if it has not returned after ``timeout_s``. What it raises is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if raised:
        raise raised[0]
    return not thread.is_alive()


def _living(pids: set[int]) -> set[int]:
    """Those that still run; those of our own children that have ended are reaped."""
    return {pid for pid in pids if not _reap(pid) and process_name(pid)}


def _reap(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # somebody else's child, or reaped already
        return False


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
